"""The attention half of a block: projections, norms of queries and keys, rotation, cache."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from trainwright.kernels.attention import Mask, attention
from trainwright.kernels.rotary import rotate
from trainwright.models.cache import LayerCache
from trainwright.models.families import DecoderConfig
from trainwright.models.norm import RMSNorm


class Attention(nn.Module):
    """Hugging Face's `self_attn`: `q_proj`, `k_proj`, `v_proj` or all in `qkv_proj`; `o_proj`."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        self.rotates = config.layer_ropes[layer] is not None
        self.attend: Callable[..., Tensor] = attention  # context parallelism puts its own here
        self.kv_heads: slice | None = None  # those that this worker's queries read, if not all
        self.widths = [config.num_heads * config.head_dim] + [
            config.num_kv_heads * config.head_dim
        ] * 2

        hidden, bias = config.hidden_size, config.qkv_bias
        self.fused = config.fused_projections
        if self.fused:
            self.qkv_proj = nn.Linear(hidden, sum(self.widths), bias=bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (
                nn.Linear(hidden, width, bias=bias) for width in self.widths
            )
        self.o_proj = nn.Linear(self.widths[0], hidden, bias=config.output_bias)

        self.qk_norm = config.qk_norm
        if self.qk_norm is not None:
            q_width, k_width, _ = (
                self.widths if self.qk_norm == "projection" else [self.head_dim] * 3
            )
            self.q_norm = RMSNorm(q_width, config.norm_eps, config.norm_offset)
            self.k_norm = RMSNorm(k_width, config.norm_eps, config.norm_offset)

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[batch, sequence, hidden] in and out; cos and sin [batch or 1, sequence, dim/2]."""
        if self.fused:
            q, k, v = self.qkv_proj(hidden).split(self.widths, dim=-1)
        else:
            q, k, v = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)

        if self.kv_heads is not None:
            k, v = k[:, :, self.kv_heads], v[:, :, self.kv_heads]
        if self.rotates:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v)

        mixed = self.attend(q, k, v, mask=mask, scale=self.scale, softcap=self.softcap)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

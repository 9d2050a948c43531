"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values from one vector.

What a cache keeps of a token is that vector and the few channels that turn with its position,
which all heads share: a small part of what its keys and values would take.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainwright.kernels.attention import Mask, attention
from trainwright.kernels.rotary import rotate
from trainwright.models.cache import LayerCache
from trainwright.models.families import DecoderConfig
from trainwright.models.norm import RMSNorm

LATENT_EPS = 1e-6  # of the norms of latent vectors, whatever `rms_norm_eps` says


class LatentAttention(nn.Module):
    """Hugging Face's `self_attn` of DeepSeek V3: `q_a_proj`, `q_b_proj`, `kv_a_proj_with_mqa`, …

    The number of heads is read off the weights, so that a worker may have some of them.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.latent is not None
        self.latent = latent = config.latent
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        self.attend: Callable[..., Tensor] = attention  # context parallelism puts its own here
        hidden, heads, bias = config.hidden_size, config.num_heads, config.qkv_bias
        queries = heads * config.head_dim
        if latent.query_rank is None:
            self.q_proj = nn.Linear(hidden, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, latent.query_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(latent.query_rank, LATENT_EPS, 0.0)
            self.q_b_proj = nn.Linear(latent.query_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, latent.rank + latent.rope_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(latent.rank, LATENT_EPS, 0.0)
        self.kv_b_proj = nn.Linear(
            latent.rank, heads * (latent.plain_dim + latent.value_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * latent.value_dim, hidden, bias=config.output_bias)

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[batch, sequence, hidden] in and out; cos and sin [batch or 1, sequence, rope_dim/2]."""
        latent = self.latent
        if latent.query_rank is None:
            q = self.q_proj(hidden)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        q = q.unflatten(-1, (-1, latent.plain_dim + latent.rope_dim))
        q_plain, q_turned = q.split([latent.plain_dim, latent.rope_dim], dim=-1)
        q = torch.cat([q_plain, self._turn(q_turned, cos, sin)], dim=-1).transpose(1, 2)

        joint, turned = self.kv_a_proj_with_mqa(hidden).split(
            [latent.rank, latent.rope_dim], dim=-1
        )
        joint = self.kv_a_layernorm(joint).unsqueeze(1)
        turned = self._turn(turned.unsqueeze(2), cos, sin).transpose(1, 2)
        if cache is not None:
            joint, turned = cache.update(joint, turned)

        k, v = self._expand(joint, turned)
        mixed = self.attend(q, k, v, mask=mask, scale=self.scale, softcap=self.softcap)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _expand(self, joint: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """Each head's keys and values of latents [batch, 1, tokens, rank] and turned channels."""
        latent = self.latent
        both = self.kv_b_proj(joint.squeeze(1))
        both = both.unflatten(-1, (-1, latent.plain_dim + latent.value_dim)).transpose(1, 2)
        plain, v = both.split([latent.plain_dim, latent.value_dim], dim=-1)
        return torch.cat([plain, turned.expand(-1, plain.shape[1], -1, -1)], dim=-1), v

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, sequence, heads, rope_dim] turned; interleaved pairs are laid apart first.

        Queries and keys are reordered alike, so that their products do not change.
        """
        if self.latent.interleaved:
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return rotate(x, cos, sin)

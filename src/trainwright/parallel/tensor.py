"""Tensor parallelism with sequence parallelism, as Megatron-LM has them (arXiv:2205.05198).

Between the blocks every worker has an equal part of the micro-batch's tokens; entering attention or
the feed-forward network they are gathered, leaving them they are summed and cut again. Inside,
each worker has some of the heads and some of the feed-forward channels. Vocabularies are cut too.

What the plan leaves `whole` is not cut: there each worker works on its own tokens alone
(`parallel.own_queries` for attention), with all heads or channels.

Weights become plain parameters of a smaller shape under their own names, noted as `Piece`s. What
stays whole on every worker (norms, biases that are added once, key-value heads that are fewer than
the workers) sees only a part of the tokens or heads on each, so its gradient is `partial`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainwright.comm.collectives import gather, scatter_sum, sum_backward, sum_forward
from trainwright.models.adapted import Adapted
from trainwright.models.adapted_linear import AdaptedProduct
from trainwright.models.attention import Attention
from trainwright.models.decoder import Block, Decoder
from trainwright.models.latent_attention import LatentAttention
from trainwright.models.mlp import GatedMLP
from trainwright.models.moe import SparseMLP
from trainwright.models.norm import RMSNorm
from trainwright.models.pieces import Piece, whole_piece
from trainwright.models.quantised import QuantisedLinear


class CutStream:
    """The stream between the blocks, cut over the workers of `group`.

    In training each has a run of its tokens, counted through the micro-batch row by row: what is
    sent and received then lies in one piece, which a cut of every row would not. While
    generating, a token at a time, every worker has all of it and only the branches' results are
    summed.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group: dist.ProcessGroup | None = group
        self.index, self.workers = dist.get_rank(group), dist.get_world_size(group)
        self.sequence = True

    def enter(self, stream: Tensor) -> Tensor:
        """The stream [batch, sequence, hidden], whole; backward sums the branches' gradients."""
        if self.sequence:
            rows, columns, hidden = stream.shape
            return gather(stream, 0, self.group).view(rows, columns * self.workers, hidden)
        return sum_backward(stream, self.group)

    def leave(self, branch: Tensor) -> Tensor:
        """The sum of every worker's share of a branch, cut as the stream is."""
        if self.sequence:
            return scatter_sum(self._parts(branch), 0, self.group)
        return sum_forward(branch, self.group)

    def summed(self, values: Tensor) -> Tensor:
        """The sum of every worker's values, without gradients."""
        total = values.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def own(self, tokens: Tensor) -> Tensor:
        """This worker's part of what there is for each token [batch, sequence, …]."""
        if not self.sequence:
            return tokens
        return self._parts(tokens).chunk(self.workers)[self.index]

    def _parts(self, tokens: Tensor) -> Tensor:
        """[batch, sequence, …] as [workers · batch, sequence / workers, …], part after part."""
        rows, columns, *rest = tokens.shape
        return tokens.reshape(rows * self.workers, columns // self.workers, *rest)


def cut_tensors(model: Decoder, group: dist.ProcessGroup, whole: Collection[str] = ()) -> CutStream:
    """Cut `model`, still on meta, over the workers of `group`; the stream's cut.

    Of every block the parts named in `whole` ("attention", "network") stay as they are. Which
    shapes can be cut is the planner's to say.
    """
    stream = CutStream(group)
    model.model.stream = stream
    if hasattr(model.model, "embed_tokens"):
        _cut_embedding(model, model.model.embed_tokens, stream)
    if hasattr(model, "lm_head"):
        _cut(model, "lm_head.weight", 0, stream)
    for number, block in model.model.layers.items():
        assert isinstance(block, Block)
        prefix = f"model.layers.{number}"
        if "attention" not in whole:
            CUTTERS[type(block.self_attn)](model, f"{prefix}.self_attn", block.self_attn, stream)
        if "network" not in whole:
            CUTTERS[type(block.mlp)](model, f"{prefix}.mlp", block.mlp, stream)
    for name, parameter in model.named_parameters():
        piece = model.pieces.get(name) or whole_piece(parameter.shape)
        if not piece.cuts("tp"):
            model.pieces[name] = Piece(
                piece.whole, piece.offsets, piece.axes, partial=True, expert=piece.expert
            )
    return stream


def _cut_attention(model: Decoder, prefix: str, module: nn.Module, stream: CutStream) -> None:
    assert isinstance(module, Attention)
    config, workers = model.config, stream.workers
    heads, kv_heads, dim = config.num_heads // workers, config.num_kv_heads, module.head_dim
    if kv_heads % workers == 0:
        shared = slice(0, 0)  # every worker has key-value heads of its own
    else:
        first = stream.index * heads * kv_heads // config.num_heads
        shared = slice(first, first + 1)
        module.kv_heads = shared if not module.fused else None
    if module.fused:
        _take_rows(module.qkv_proj, _qkv_rows(module, stream, kv_heads, heads, shared))
        own_kv = kv_heads // workers if kv_heads % workers == 0 else 1
        module.widths = [heads * dim, own_kv * dim, own_kv * dim]
    else:
        names = ["q_proj"] if module.kv_heads is not None else ["q_proj", "k_proj", "v_proj"]
        for name in names:
            _cut_columns(model, f"{prefix}.{name}", getattr(module, name), stream)
        if module.qk_norm == "projection":
            _share_norm(model, f"{prefix}.q_norm", module.q_norm, stream)
            if module.kv_heads is None:
                _share_norm(model, f"{prefix}.k_norm", module.k_norm, stream)
    _cut_rows(model, f"{prefix}.o_proj", module.o_proj, stream)
    _enter_first(module, stream)


def _qkv_rows(
    module: Attention, stream: CutStream, kv_heads: int, heads: int, shared: slice
) -> Tensor:
    """Rows of a fused projection that make this worker's queries, keys and values."""
    dim, (q_width, kv_width, _) = module.head_dim, module.widths
    own = kv_heads // stream.workers
    first, count = (shared.start, 1) if kv_heads % stream.workers else (stream.index * own, own)
    begin = stream.index * heads * dim
    parts = [torch.arange(begin, begin + heads * dim)]
    for base in (q_width, q_width + kv_width):
        parts.append(torch.arange(base + first * dim, base + (first + count) * dim))
    return torch.cat(parts)


def _cut_mlp(model: Decoder, prefix: str, module: nn.Module, stream: CutStream) -> None:
    assert isinstance(module, GatedMLP)
    cut_gated(model, prefix, module, stream)
    _enter_first(module, stream)


def cut_gated(
    model: Decoder, prefix: str, module: GatedMLP, stream: CutStream, *, leaves: bool = True
) -> None:
    """Cut a gated network's channels; `leaves` says whether its result is summed here."""
    if module.fused:
        inner = module.down_proj.in_features
        own = inner // stream.workers
        begin = stream.index * own
        rows = [torch.arange(base + begin, base + begin + own) for base in (0, inner)]
        _take_rows(module.gate_up_proj, torch.cat(rows))
    else:
        for name in ("gate_proj", "up_proj"):
            _cut_columns(model, f"{prefix}.{name}", getattr(module, name), stream)
    if leaves:
        _cut_rows(model, f"{prefix}.down_proj", module.down_proj, stream)
    else:
        _cut(model, f"{prefix}.down_proj.weight", 1, stream)
        for name in _present(module.down_proj, "lora_A.weight", "start_A.weight"):
            _cut(model, f"{prefix}.down_proj.{name}", 1, stream)
        if isinstance(module.down_proj, Adapted):
            module.down_proj.sum_squares = stream.summed


def _cut_latent(model: Decoder, prefix: str, module: nn.Module, stream: CutStream) -> None:
    """The heads are cut; the latent vectors that they share are made on every worker."""
    assert isinstance(module, LatentAttention)
    queries = "q_proj" if module.latent.query_rank is None else "q_b_proj"
    for name in (queries, "kv_b_proj"):
        _cut_columns(model, f"{prefix}.{name}", getattr(module, name), stream)
    _cut_rows(model, f"{prefix}.o_proj", module.o_proj, stream)
    _enter_first(module, stream)


def _cut_sparse(model: Decoder, prefix: str, module: nn.Module, stream: CutStream) -> None:
    """Every expert's channels are cut; every worker routes all tokens."""
    assert isinstance(module, SparseMLP)
    for name, dim in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 2)):
        _cut(model, f"{prefix}.experts.{name}", dim, stream)
    if module.shared_name is not None:
        shared = getattr(module, module.shared_name)
        cut_gated(model, f"{prefix}.{module.shared_name}", shared, stream, leaves=False)
    inner = module.forward

    def forward(x: Tensor) -> Tensor:
        return stream.leave(inner(stream.enter(x)))

    _replace_forward(module, forward)


CUTTERS: dict[type[nn.Module], Callable[[Decoder, str, Any, CutStream], None]] = {
    Attention: _cut_attention,
    LatentAttention: _cut_latent,
    GatedMLP: _cut_mlp,
    SparseMLP: _cut_sparse,
}


def cut_parameter(model: Decoder, name: str, dim: int, axis: str, index: int, workers: int) -> None:
    """Leave of a parameter on meta the `index`-th of `workers` equal parts along `dim`."""
    owner_name, _, own_name = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(owner, QuantisedLinear) and own_name == "weight":
        owner.cut(dim, index, workers)  # packed: each worker unpacks what is its own
        return
    parameter = getattr(owner, own_name)
    before = model.pieces.get(name) or whole_piece(parameter.shape)
    size, rest = divmod(parameter.shape[dim], workers)
    if rest:
        raise ValueError(f"{name}: {parameter.shape[dim]} does not divide by {workers}")
    shape, offsets = list(parameter.shape), list(before.offsets)
    shape[dim] = size
    offsets[dim] += index * size
    part = nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad)
    setattr(owner, own_name, part)
    axes = (*before.axes, (dim, axis))
    model.pieces[name] = Piece(before.whole, tuple(offsets), axes, expert=before.expert)


def _cut(model: Decoder, name: str, dim: int, stream: CutStream) -> None:
    cut_parameter(model, name, dim, "tp", stream.index, stream.workers)


def _cut_columns(model: Decoder, prefix: str, linear: nn.Linear, stream: CutStream) -> None:
    """Each worker makes some of the outputs (column-parallel, in Megatron-LM's words)."""
    _cut(model, f"{prefix}.weight", 0, stream)
    if linear.bias is not None:
        _cut(model, f"{prefix}.bias", 0, stream)
    for name in _present(linear, "lora_B.weight", "start_B.weight", "lora_magnitude_vector"):
        _cut(model, f"{prefix}.{name}", 0, stream)
    if not isinstance(linear, QuantisedLinear):
        linear.out_features = linear.weight.shape[0]


def _cut_rows(model: Decoder, prefix: str, linear: nn.Linear, stream: CutStream) -> None:
    """Each worker takes some of the inputs (row-parallel); the outputs are summed on leaving."""
    _cut(model, f"{prefix}.weight", 1, stream)
    for name in _present(linear, "lora_A.weight", "start_A.weight"):
        _cut(model, f"{prefix}.{name}", 1, stream)
    if not isinstance(linear, QuantisedLinear):
        linear.in_features = linear.weight.shape[1]
    if isinstance(linear, Adapted):
        linear.sum_squares = stream.summed
    product = _without_bias(linear)

    def forward(x: Tensor) -> Tensor:
        total = stream.leave(product(x))
        # Added once, to the sum, and not by every worker; in its type, as the product would.
        return total if linear.bias is None else total + linear.bias.to(total.dtype)

    _replace_forward(linear, forward)


def _present(module: nn.Module, *names: str) -> list[str]:
    """Those of the adapter's parameters that the layer has."""
    own = dict(module.named_parameters())
    return [name for name in names if name in own]


def _without_bias(linear: Any) -> Callable[[Tensor], Tensor]:
    """The layer's product, adapters included."""
    if linear.bias is None:
        return linear.forward  # type: ignore[no-any-return]
    if isinstance(linear, AdaptedProduct):
        return linear.unbiased
    if isinstance(linear, QuantisedLinear):
        return lambda x: linear.base_product(x, None)
    return lambda x: F.linear(x, linear.weight)


def _take_rows(linear: Any, rows: Tensor) -> None:
    """Use only these rows of a matrix that several projections share.

    They do not lie together, so the matrix stays whole on every worker.
    """
    if isinstance(linear, AdaptedProduct):
        linear.chosen = rows
        return

    def forward(x: Tensor) -> Tensor:
        own = rows.to(x.device)
        bias = None if linear.bias is None else linear.bias[own]
        quantised = isinstance(linear, QuantisedLinear)
        weight = linear.dequantised(x.dtype) if quantised else linear.weight
        return F.linear(x, weight[own], bias)

    _replace_forward(linear, forward)


def _enter_first(module: nn.Module, stream: CutStream) -> None:
    """Gather the stream before the module's forward."""
    inner = module.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return inner(stream.enter(hidden), *args, **kwargs)

    _replace_forward(module, forward)


def _share_norm(model: Decoder, prefix: str, norm: RMSNorm, stream: CutStream) -> None:
    """A norm over channels that are cut: the mean square is taken over all workers."""
    _cut(model, f"{prefix}.weight", 0, stream)

    def forward(x: Tensor) -> Tensor:
        wide = x.float()
        squares = wide.square().sum(-1, keepdim=True)
        # Summed in both directions: every worker's outputs depend on every worker's squares.
        squares = sum_backward(sum_forward(squares, stream.group), stream.group)
        mean = squares / (x.shape[-1] * stream.workers)
        normed = wide * torch.rsqrt(mean + norm.eps)
        return (normed * (norm.weight.float() + norm.offset)).to(x.dtype)

    _replace_forward(norm, forward)


def _cut_embedding(model: Decoder, embedding: nn.Embedding, stream: CutStream) -> None:
    """Each worker knows some of the tokens; the others' embeddings are zero to it."""
    _cut(model, "model.embed_tokens.weight", 0, stream)
    for name in _present(embedding, "lora_embedding_A"):
        _cut(model, f"model.embed_tokens.{name}", 1, stream)
    if isinstance(embedding, Adapted):
        embedding.sum_squares = stream.summed
    rows = embedding.weight.shape[0]
    first, padding = stream.index * rows, embedding.padding_idx
    embedding.num_embeddings = rows
    if padding is not None:
        padding = padding % (rows * stream.workers) - first
        embedding.padding_idx = padding if 0 <= padding < rows else None
    find = embedding.forward

    def forward(input_ids: Tensor) -> Tensor:
        own = input_ids - first
        here = (own >= 0) & (own < rows)
        found = find(own.clamp(0, rows - 1))
        return stream.leave(found * here.unsqueeze(-1))

    _replace_forward(embedding, forward)


def _replace_forward(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """On the instance, instead of wrapping it in another module: names stay what they are."""
    module.forward = forward

"""Every parameter of a decoder with its shape, and what of it a worker has. No torch.

Memory and traffic are counted from here: tensor parallelism cuts some weights along one dimension
and leaves others whole, expert parallelism deals out experts, a pipeline's stage has some layers,
and FSDP2 cuts what is left along the first dimension, rounding up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from trainwright.models.families import DecoderConfig
from trainwright.planner.plan import Plan
from trainwright.planner.schedules import placement

Group = Literal["block", "experts", "outer"]  # what FSDP2 gathers together


@dataclass(frozen=True)
class Weight:
    """A parameter: its whole shape, and the dimension that tp cuts (None: whole on every worker).

    Experts' first dimension, the experts, is what ep cuts.
    """

    shape: tuple[int, ...]
    cut: int | None = None
    group: Group = "block"

    def local(self, plan: Plan) -> tuple[int, ...]:
        """The shape of a worker's part under tp and ep."""
        shape = list(self.shape)
        if self.cut is not None:
            shape[self.cut] //= plan.tp
        if self.group == "experts":
            shape[0] //= plan.ep
        return tuple(shape)

    def elements(self, plan: Plan) -> int:
        """Elements of a worker's part, before sharding."""
        return math.prod(self.local(plan))

    def shard(self, plan: Plan) -> int:
        """Elements of the first worker's shard, which is the largest, padding included."""
        first, *rest = self.local(plan)
        return -(-first // self.shards(plan)) * math.prod(rest)

    def shards(self, plan: Plan) -> int:
        """Workers over which FSDP2 shards it; 1 where nothing is sharded."""
        if plan.dp_shard == 1:
            return 1
        experts = plan.ep if self.group == "experts" else 1
        return plan.dp_shard // experts * plan.cp

    def partial(self, plan: Plan) -> bool:
        """Whether each worker along tp has only a part of its gradient, to be summed."""
        return plan.tp > 1 and self.cut is None


def block_weights(
    config: DecoderConfig, layer: int, tp: int = 1, whole: tuple[str, ...] = ()
) -> Iterator[Weight]:
    """The parameters of one layer, cut as `tp` workers cut them that leave these parts `whole`."""
    hidden = config.hidden_size
    attention = _attention(config, tp)
    yield from map(_uncut, attention) if "attention" in whole else attention
    spec = config.experts
    if spec is None or not config.is_sparse(layer):
        network = _gated(config, config.intermediate_size)
        yield from map(_uncut, network) if "network" in whole else network
    else:
        yield Weight((spec.count, hidden))  # the router
        inward, outward = (spec.count, spec.width, hidden), (spec.count, hidden, spec.width)
        yield from (Weight(inward, 1, "experts"), Weight(inward, 1, "experts"))
        yield Weight(outward, 2, "experts")
        if spec.shared_width:
            yield from _gated(config, spec.shared_width)
        if spec.shared_gate:
            yield Weight((1, hidden))
    for _ in range({"pre": 2, "post": 2, "both": 4}[config.norms]):
        yield Weight((hidden,))


def outer_weights(config: DecoderConfig, *, embeds: bool, heads: bool) -> Iterator[Weight]:
    """The parameters outside the blocks; a stage that has the head of a tied model has a copy."""
    vocabulary = Weight((config.vocab_size, config.hidden_size), 0, "outer")
    if embeds or (heads and config.tied_embeddings):
        yield vocabulary
    if heads:
        yield Weight((config.hidden_size,), group="outer")
        if config.scores:
            yield Weight((1, config.hidden_size), group="outer")
        elif not config.tied_embeddings:
            yield vocabulary


def stage_weights(config: DecoderConfig, plan: Plan, stage: int) -> list[list[Weight]]:
    """The parameters of a pipeline stage: those outside its blocks, then each block's."""
    last = plan.stages - 1
    outer = list(outer_weights(config, embeds=stage == 0, heads=stage == last))
    layers = layers_of(config, plan, stage)
    blocks = (block_weights(config, layer, plan.tp, plan.whole) for layer in layers)
    return [outer, *map(list, blocks)]


def layers_of(config: DecoderConfig, plan: Plan, stage: int) -> range:
    """The layers of a pipeline stage; all of them without a pipeline."""
    layers = plan.stage_layers or (config.num_layers,)
    first = sum(layers[:stage])
    return range(first, first + layers[stage])


def stages_of(plan: Plan, pp_rank: int) -> list[int]:
    """The stages that a worker of the pipeline has, in the model's order."""
    if plan.pp == 1:
        return [0]
    ranks = placement(plan.schedule, plan.pp, plan.virtual_stages)
    return [stage for stage, rank in enumerate(ranks) if rank == pp_rank]


def _uncut(weight: Weight) -> Weight:
    return replace(weight, cut=None)


def _gated(config: DecoderConfig, width: int) -> Iterator[Weight]:
    hidden, inward = config.hidden_size, 1 + config.gated
    if config.fused_projections:  # gate and up in one matrix, which tp leaves whole
        yield Weight((2 * width, hidden))
    else:
        yield from [Weight((width, hidden), 0)] * inward
    yield Weight((hidden, width), 1)
    if config.mlp_bias:
        cut = None if config.fused_projections else 0
        widths = [2 * width] if config.fused_projections else [width] * inward
        yield from (Weight((each,), cut) for each in widths)
        yield Weight((hidden,))


def _attention(config: DecoderConfig, tp: int) -> Iterator[Weight]:
    if config.latent is not None:
        yield from _latent(config)
        return
    hidden = config.hidden_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    # Fewer key-value heads than workers: their projections stay whole.
    own = 0 if config.num_kv_heads % tp == 0 else None
    projections: list[tuple[int, int | None]] = [(queries, 0), (keys, own), (keys, own)]
    if config.fused_projections:
        projections = [(queries + 2 * keys, None)]
    for width, cut in projections:
        yield Weight((width, hidden), cut)
        if config.qkv_bias:
            yield Weight((width,), cut)
    yield Weight((hidden, queries), 1)
    if config.output_bias:
        yield Weight((hidden,))
    if config.qk_norm == "head":
        yield from (Weight((config.head_dim,)), Weight((config.head_dim,)))
    elif config.qk_norm == "projection":
        yield from (Weight((queries,), 0), Weight((keys,), own))


def _latent(config: DecoderConfig) -> Iterator[Weight]:
    latent, hidden, heads = config.latent, config.hidden_size, config.num_heads
    assert latent is not None
    queries = heads * config.head_dim
    if latent.query_rank is None:
        yield Weight((queries, hidden), 0)
    else:
        yield Weight((latent.query_rank, hidden))
        yield Weight((latent.query_rank,))
        yield Weight((queries, latent.query_rank), 0)
        if config.qkv_bias:
            yield Weight((latent.query_rank,))
    yield Weight((latent.rank + latent.rope_dim, hidden))
    if config.qkv_bias:
        yield Weight((latent.rank + latent.rope_dim,))
    yield Weight((latent.rank,))
    yield Weight((heads * (latent.plain_dim + latent.value_dim), latent.rank), 0)
    yield Weight((hidden, heads * latent.value_dim), 1)
    if config.output_bias:
        yield Weight((hidden,))

"""Bytes that a worker sends in one training step, by closed formula. No torch.

Counted as the traffic meter counts them, by ring algorithms: an all-gather sends (n-1)/n of its
output, a reduce-scatter as much of its input, an all-reduce both, an all-to-all what goes to others
(tokens are supposed to spread evenly over experts), and a message what it holds. Formulas after
Narayanan et al. 2021 (arXiv:2104.04473), Korthikanti et al. 2022 (arXiv:2205.05198) and Rajbhandari
et al. 2020 (arXiv:1910.02054), for this code's own way of doing it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

from trainwright.models.families import DecoderConfig
from trainwright.planner.memory import ELEMENT_BYTES
from trainwright.planner.parameters import Weight, layers_of, stage_weights, stages_of
from trainwright.planner.plan import Plan, Recompute
from trainwright.planner.schedules import placement

_FP32, _FP64, _INT64 = 4, 8, 8
Traffic = dict[tuple[str, str], float]  # (dimension, collective) to bytes


def traffic_bytes(
    config: DecoderConfig, plan: Plan, pp_rank: int = 0, replica: int = 0
) -> dict[str, float]:
    """Bytes that a worker of pipeline rank `pp_rank` of a replica sends a step, by dimension.

    Dimensions are named as the mesh names its groups: tp, cp, ep, pp, fsdp, expert_fsdp,
    dp_replicate, replicas (all that hold equal weights and other tokens, where nothing is sharded),
    tied, world. Those without traffic are left out.
    """
    totals: dict[str, float] = {}
    for (dimension, _), count in traffic(config, plan, pp_rank, replica).items():
        totals[dimension] = totals.get(dimension, 0.0) + count
    return {dimension: count for dimension, count in totals.items() if count}


def traffic(config: DecoderConfig, plan: Plan, pp_rank: int = 0, replica: int = 0) -> Traffic:
    """The same by dimension and collective."""
    total = _nothing()
    plan = replace(plan, accumulation=plan.accumulation_of(replica), rows_by_replica=())
    for stage in stages_of(plan, pp_rank):
        micro = _Stage(config, plan, stage).micro_batch()
        _add(total, {kind: plan.accumulation * count for kind, count in micro.items()})
        _add(total, _states(config, plan, stage))
    _add(total, _tied(config, plan, pp_rank))
    _add(total, _loads(config, plan, pp_rank))
    if plan.world_size > 1:
        # Weight, hash and stop of the batch; the loss; the norm of the gradients.
        total["world", "all_reduce"] += reduced(5 * _INT64, plan.world_size)
    return total


def gathered(output: float, workers: int) -> float:
    """What a worker sends in an all-gather of `output` bytes, or a reduce-scatter from as many."""
    return output * (workers - 1) / workers


def reduced(size: float, workers: int) -> float:
    """What a worker sends in an all-reduce of `size` bytes."""
    return 2 * size * (workers - 1) / workers


class _Stage:
    """A stage's traffic for one micro-batch, there and back."""

    def __init__(self, config: DecoderConfig, plan: Plan, stage: int) -> None:
        self.config, self.plan, self.stage = config, plan, stage
        self.element = ELEMENT_BYTES[plan.precision]
        # A row's columns on this worker, before tp cuts the stream between the blocks.
        self.tokens = plan.micro_batch * plan.sequence_length / plan.cp
        self.stream = self.tokens * config.hidden_size * self.element

    def micro_batch(self) -> Traffic:
        """All that travels for a micro-batch but weights and their gradients."""
        plan, total = self.plan, _nothing()
        for layer in layers_of(self.config, plan, self.stage):
            policy = plan.layer_recompute(layer, self.stage)
            for part in (
                self._tensor(policy),
                self._context(policy),
                self._experts(layer, policy),
                self._balance(layer, policy),
            ):
                _add(total, part)
        if plan.tp > 1:
            _add(total, self._vocabulary())
        if plan.pp > 1:
            _add(total, self._boundaries())
        return total

    def _tensor(self, recompute: Recompute) -> Traffic:
        """Gathers on entering a block's halves and reduce-scatters on leaving, and back again."""
        total, workers = _nothing(), self.plan.tp
        if workers == 1:
            return total
        once = gathered(self.stream, workers)
        again = _repeats(recompute)
        for part in ("attention", "network"):
            if part in self.plan.whole:
                continue
            # Recomputing ends with the last activation that the backward pass needs: what leaves
            # the block at last only where a norm comes after it.
            last = part == "network" and self.config.norms == "pre"
            total["tp", "all_gather"] += (1 + 1 + again) * once
            total["tp", "reduce_scatter"] += (1 + 1 + again * (not last)) * once
        if "attention" in self.plan.whole:
            _add(total, self._own_queries(again))
        elif self.config.qk_norm == "projection" and not self.config.fused_projections:
            cut = 1 + (self.config.num_kv_heads % workers == 0)  # the queries' norm, and the keys'
            squares = reduced(_FP32 * self.tokens, workers)
            total["tp", "all_reduce"] = (2 + again) * cut * squares
        return total

    def _own_queries(self, again: float) -> Traffic:
        """Keys and values of rows that lie on several workers, and their gradients."""
        plan = self.plan
        if plan.micro_batch % plan.tp == 0:  # every worker has whole rows
            return {}
        _, keys, values, _ = attention_widths(self.config)
        once = gathered((keys + values) * self.tokens * self.element, plan.tp)
        return {("tp", "all_gather"): (1 + again) * once, ("tp", "reduce_scatter"): once}

    def _context(self, recompute: Recompute) -> Traffic:
        """Keys and values, or heads for tokens."""
        plan, config, total = self.plan, self.config, _nothing()
        workers = plan.cp
        if workers == 1:
            return total
        queries, keys, values, mixed = attention_widths(config, plan.tp)
        own = self.tokens * self.element
        # Attention's own result is kept by `selective`; what is done for it outside is not.
        again, in_kernel = _repeats(recompute), _repeats(recompute, kept=True)
        if plan.cp_method == "ring":
            block = (keys + values) * own
            back = block + (keys + values) * self.tokens * _FP32
            total["cp", "send"] = (workers - 1) * ((1 + in_kernel) * block + back)
        elif plan.cp_method == "all_gather":
            whole = gathered(workers * (keys + values) * own, workers)
            total["cp", "all_gather"] = (1 + again) * whole
            total["cp", "reduce_scatter"] = whole
        else:
            heads = max(1, config.num_kv_heads // plan.tp)
            copies = math.lcm(heads, workers) // heads
            there = gathered((queries + copies * (keys + values) + mixed) * own, workers)
            total["cp", "all_to_all"] = (2 + again) * there
        return total

    def _experts(self, layer: int, recompute: Recompute) -> Traffic:
        """Tokens to their experts and back, and their gradients."""
        plan, config, total = self.plan, self.config, _nothing()
        if plan.ep == 1 or config.experts is None or not config.is_sparse(layer):
            return total
        again = _repeats(recompute)
        rows = gathered(config.experts.per_token * self.stream, plan.ep)
        counts = gathered(_INT64 * config.experts.count, plan.ep)
        total["ep", "all_to_all"] = (4 + 2 * again) * rows + (1 + again) * counts
        return total

    def _balance(self, layer: int, recompute: Recompute) -> Traffic:
        """A row's picks of experts, for the balance loss, where its columns are elsewhere."""
        plan, spec = self.plan, self.config.experts
        if plan.cp == 1 or spec is None or not spec.layers[layer] or not spec.balance_loss:
            return {}
        picks = reduced(_INT64 * plan.micro_batch * spec.count, plan.cp)
        return {("cp", "all_reduce"): (1 + _repeats(recompute)) * picks}

    def _vocabulary(self) -> Traffic:
        """The embedding's sum, the head's inputs, and three numbers a token of the loss."""
        plan, total = self.plan, _nothing()
        if self.stage == 0:
            # Looked up in fp32, unless FSDP2 has gathered the matrix in a narrow type.
            element = self.element if plan.dp_shard > 1 else _FP32
            once = gathered(self.stream / self.element * element, plan.tp)
            total["tp", "reduce_scatter"] += once
            total["tp", "all_gather"] += once
        if self.stage == plan.stages - 1:
            once = gathered(self.stream, plan.tp)
            total["tp", "all_gather"] += once
            total["tp", "reduce_scatter"] += once
            if not self.config.scores:  # whose sum is over sequences, and next to nothing
                total["tp", "all_reduce"] += reduced(3 * _FP32 * self.tokens, plan.tp)
        return total

    def _boundaries(self) -> Traffic:
        """The stream to the next stage and its gradient to the one before, where not here."""
        plan = self.plan
        ranks = placement(plan.schedule, plan.pp, plan.virtual_stages)
        neighbours = [s for s in (self.stage - 1, self.stage + 1) if 0 <= s < len(ranks)]
        elsewhere = sum(ranks[each] != ranks[self.stage] for each in neighbours)
        return {("pp", "send"): elsewhere * self.stream / plan.tp}


def attention_widths(config: DecoderConfig, tp: int = 1) -> tuple[float, float, float, float]:
    """Channels of a worker's queries, keys, values and attention's result, over its heads."""
    heads, own = config.num_heads / tp, max(1.0, config.num_kv_heads / tp)
    value = config.head_dim if config.latent is None else config.latent.value_dim
    return heads * config.head_dim, own * config.head_dim, own * value, heads * value


def _repeats(recompute: Recompute, *, kept: bool = False) -> float:
    """How often a layer's forward pass is repeated; `kept`: what `selective` keeps is not."""
    if isinstance(recompute, str):
        return float(recompute == "full" or (recompute == "selective" and not kept))
    return 0.0  # collectives end a compiled region, and no budget repeats them


def _states(config: DecoderConfig, plan: Plan, stage: int) -> Traffic:
    """Weights gathered and gradients reduced, once a step or for every micro-batch."""
    total = _nothing()
    groups = stage_weights(config, plan, stage)
    weights = [weight for group in groups for weight in group]
    if plan.dp_shard == 1:
        workers = plan.dp_replicate * plan.cp
        if workers > 1:
            whole = _FP32 * sum(weight.elements(plan) for weight in weights)
            total["replicas", "all_reduce"] += reduced(whole, workers)
    else:
        gathers = 2 * plan.accumulation if plan.zero == 3 else 1
        reductions = 1 if plan.zero == 1 else plan.accumulation
        for weight in weights:
            _add(total, _shards(weight, plan, gathers, reductions))
    if plan.tp > 1:
        partial = sum(weight.shard(plan) for weight in weights if weight.partial(plan))
        total["tp", "all_reduce"] += reduced(_FP32 * partial, plan.tp)
    return total


def _shards(weight: Weight, plan: Plan, gathers: int, reductions: int) -> Traffic:
    """One sharded weight's gathers, reduce-scatters, and the sum over replicas of its shard."""
    total = _nothing()
    workers, shard = weight.shards(plan), weight.shard(plan)
    name = "expert_fsdp" if weight.group == "experts" and plan.ep > 1 else "fsdp"
    others = (workers - 1) * shard  # what an all-gather sends, in elements, padding included
    total[name, "all_gather"] += gathers * others * ELEMENT_BYTES[plan.precision]
    total[name, "reduce_scatter"] += reductions * others * _FP32
    if plan.dp_replicate > 1:
        total["dp_replicate", "all_reduce"] += reduced(_FP32 * shard, plan.dp_replicate)
    return total


def _tied(config: DecoderConfig, plan: Plan, pp_rank: int) -> Traffic:
    """The gradient of an embedding whose copies the first and the last stage have."""
    total = _nothing()
    if plan.pp == 1 or not config.tied_embeddings:
        return total
    ranks = placement(plan.schedule, plan.pp, plan.virtual_stages)
    ends = (ranks[0], ranks[-1])
    if ends[0] != ends[1] and pp_rank in ends:
        embedding = Weight((config.vocab_size, config.hidden_size), 0, "outer")
        total["tied", "all_reduce"] += reduced(_FP32 * embedding.shard(plan), 2)
    return total


def _loads(config: DecoderConfig, plan: Plan, pp_rank: int) -> Traffic:
    """How often each expert was picked in the step, its loss and its tokens, in fp64."""
    total, spec = _nothing(), config.experts
    if spec is None:
        return total
    layers = [
        layer for stage in stages_of(plan, pp_rank) for layer in layers_of(config, plan, stage)
    ]
    routers = sum(spec.layers[layer] for layer in layers)
    workers = plan.data_ranks * plan.cp
    total["replicas", "all_reduce"] = reduced(_FP64 * routers * (spec.count + 2), workers)
    total["pp", "all_reduce"] = reduced(_FP64 * 5, plan.pp)
    return total


def _nothing() -> Traffic:
    return defaultdict(float)


def _add(total: Traffic, part: Traffic) -> None:
    for kind, count in part.items():
        total[kind] += count

"""Bytes that training holds on a worker, by closed formula: states and activations.

The formulas leave out what an allocator, a communicator or a kernel's workspace adds; the planner
therefore fills only part of the memory.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from trainwright.models.families import DecoderConfig
from trainwright.planner.parameters import Weight, layers_of, stage_weights, stages_of
from trainwright.planner.plan import Plan, Recompute
from trainwright.planner.schedules import make_schedule, splits_backward
from trainwright.recipe.schema import PAGED, Adapter

# Of the stream and of weights that are gathered; float8 is made within each product.
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "float8": 2, "float4": 2}
_FP32 = 4
# What an optimizer keeps of a parameter.
_OPTIMIZER_BYTES = {"adamw": 8, "muon": 4, "adamw-8bit": 2}
_OPTIMIZER_BYTES |= {"paged-adamw": 8, "paged-adamw-8bit": 2}
_HEAD_CHUNK_BYTES = 3 * 4 * (1 << 24)  # a chunk's logits, their gradient and a copy, in fp32


@dataclass(frozen=True)
class Memory:
    """Bytes of a worker's states, as they rest between micro-batches.

    `parameters` and `gradients` are the worker's own fp32 parts; `whole_gradients` those that
    ZeRO-1 adds up whole, and has instead of its own until the last; `gathered` what FSDP2 has
    gathered, in the type of products; `reducing` the gradients in fp32 that it reduced last, which
    it lets go of with the next; `narrow` autocast's copies of whole weights; `frozen` the weights
    that an adapter leaves as they are, quantised or not. `host` of them lie in the host's memory by
    `offload`, or may go there page by page.
    """

    parameters: float
    gradients: float
    optimizer: float
    whole_gradients: float = 0.0
    gathered: float = 0.0
    reducing: float = 0.0
    narrow: float = 0.0
    frozen: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on the device."""
        held = self.parameters + (self.whole_gradients or self.gradients) + self.optimizer
        return held + self.gathered + self.reducing + self.narrow + self.frozen - self.host


def state_bytes(config: DecoderConfig, plan: Plan, pp_rank: int | None = None) -> Memory:
    """States of a worker of `pp_rank`, or of the fullest one (None); the first of its shards."""
    if pp_rank is None:
        every = [state_bytes(config, plan, rank) for rank in range(plan.pp)]
        return max(every, key=lambda memory: memory.total)
    stages = [stage_weights(config, plan, stage) for stage in stages_of(plan, pp_rank)]
    weights = [weight for groups in stages for group in groups for weight in group]
    own = sum(weight.shard(plan) for weight in weights)
    whole = sum(weight.elements(plan) for weight in weights)
    element, sharded = ELEMENT_BYTES[plan.precision], plan.dp_shard > 1
    optimizer = sum(_optimizer_bytes(weight, plan) for weight in weights)
    host = _leaves_device(plan) * optimizer
    if host and plan.offload == "parameters":
        host += 2 * _FP32 * own
    gathered = reducing = narrow = 0.0
    if sharded:
        gathered = element * (whole if plan.zero < 3 else gathered_at_once(stages, plan))
        if plan.zero > 1 and plan.accumulation > 1:
            reducing = _FP32 * _reduced_last(stages, plan)
    elif plan.precision != "fp32":
        # Made anew in every forward pass, and kept for its backward pass.
        narrow = element * whole * max(1, len(in_flight(plan, pp_rank)))
    return Memory(
        parameters=_FP32 * own,
        gradients=_FP32 * own,
        optimizer=optimizer,
        whole_gradients=_FP32 * whole if plan.zero == 1 and plan.accumulation > 1 else 0.0,
        gathered=gathered,
        reducing=reducing,
        narrow=narrow,
        host=host,
    )


def adapted_state_bytes(
    config: DecoderConfig, plan: Plan, adapter: Adapter, pp_rank: int | None = None
) -> Memory:
    """`state_bytes` where an adapter is trained on a model that stays as it is.

    Every matrix of the blocks is counted as having one, and all of `train_also` as embeddings: a
    little more than there is where fewer are meant.
    """
    if pp_rank is not None:
        return _adapted_bytes(config, plan, adapter, pp_rank)
    every = [_adapted_bytes(config, plan, adapter, rank) for rank in range(plan.pp)]
    return max(every, key=lambda memory: memory.total)


def _adapted_bytes(config: DecoderConfig, plan: Plan, adapter: Adapter, pp_rank: int) -> Memory:
    packed = {"none": None, "int8": 1.02, "nf4": 0.52}[adapter.quantise]
    base = trained = narrow = 0.0
    for stage in stages_of(plan, pp_rank):
        for weight in (each for group in stage_weights(config, plan, stage) for each in group):
            matrix, held = weight.group == "block" and len(weight.shape) == 2, _frozen(weight, plan)
            if matrix:
                if packed is not None:
                    held = packed * weight.shard(plan)
                elif adapter.dora:  # reads their rows' lengths in fp32 besides
                    narrow += held if plan.dp_shard == 1 and plan.precision != "fp32" else 0.0
                    held = _FP32 * weight.shard(plan)
                trained += adapter.rank * sum(weight.local(plan)) / weight.shards(plan)
            elif weight.group == "outer" and len(weight.shape) == 2:
                trained += weight.shard(plan) * min(1, len(adapter.train_also))
            base += held
    optimizer = _OPTIMIZER_BYTES[plan.optimizer] * trained
    return Memory(
        parameters=_FP32 * trained,
        gradients=_FP32 * trained,
        optimizer=optimizer,
        narrow=narrow,
        frozen=base,
        host=_leaves_device(plan) * optimizer,
    )


def reference_bytes(config: DecoderConfig, plan: Plan) -> float:
    """A second model that answers are compared with, on the fullest worker."""
    return max(
        sum(
            _frozen(weight, plan)
            for stage in stages_of(plan, pp_rank)
            for group in stage_weights(config, plan, stage)
            for weight in group
        )
        for pp_rank in range(plan.pp)
    )


def _frozen(weight: Weight, plan: Plan) -> float:
    """A weight that is not trained: matrices are held in the type of products."""
    element = ELEMENT_BYTES[plan.precision] if len(weight.shape) > 1 else _FP32
    return element * weight.shard(plan)


def teacher_bytes(config: DecoderConfig, plan: Plan, rows: int) -> float:
    """What a teacher leaves until a step's losses: its last hidden states of a worker's `rows`.

    All tokens are counted as trained. Where weights are sharded there is a whole head besides.
    """
    tokens = rows * plan.sequence_length / plan.cp
    head = config.vocab_size // plan.tp if plan.dp_shard > 1 else 0
    return ELEMENT_BYTES[plan.precision] * config.hidden_size * (tokens + head)


def activation_bytes(config: DecoderConfig, plan: Plan, pp_rank: int | None = None) -> float:
    """Bytes that a row of a micro-batch keeps between its forward and backward pass on a worker.

    In a pipeline a row stands for one in each of the micro-batches that are under way, on the
    worker of `pp_rank` or on the fullest one (None).
    """
    if pp_rank is None:
        return max(activation_bytes(config, plan, rank) for rank in range(plan.pp))
    kept = {stage: stage_bytes(config, plan, stage) for stage in stages_of(plan, pp_rank)}
    held = sum(kept[stage] for stage in in_flight(plan, pp_rank, kept))
    at_once = max(_brought_back(config, plan, stage) for stage in kept)
    return (held + at_once) * plan.sequence_length / plan.cp


def head_bytes(config: DecoderConfig, plan: Plan, *, trained: bool = True) -> float:
    """What the chunked output head holds besides: a chunk's logits, and its weight's gradient.

    Where the head is not `trained` there is no such gradient.
    """
    if config.scores:
        return 4 * config.hidden_size
    gradient = 4 * config.vocab_size // plan.tp * config.hidden_size if trained else 0
    return _HEAD_CHUNK_BYTES + gradient


def in_flight(plan: Plan, pp_rank: int, cost: dict[int, float] | None = None) -> list[int]:
    """The stages of the micro-batches that a worker holds when it holds the most.

    One entry a (stage, micro-batch) that has gone forward and not wholly back; `cost` weighs them.
    """
    if plan.pp == 1:
        return [0]

    def weight(stages: list[int]) -> float:
        return sum(cost[stage] for stage in stages) if cost else len(stages)

    return max(fullest_moments(plan, pp_rank), key=weight)


def fullest_moments(plan: Plan, pp_rank: int) -> list[list[int]]:
    """All that `in_flight` may be, whatever the stages weigh: no entry is part of another."""
    if plan.pp == 1:
        return [[0]]
    many = plan.accumulation
    if plan.schedule == "gpipe":
        return [stages_of(plan, pp_rank) * many]  # all go forward before any goes back
    # The others are full after a few rounds; what is over goes through in larger groups.
    rounds = max(4 * plan.virtual_stages, plan.pp + 1)
    many = min(many, rounds * plan.pp + many % plan.pp)
    every = _moments(plan.schedule, plan.pp, plan.virtual_stages, many)[pp_rank]
    return [list(moment.elements()) for moment in every]


@lru_cache(maxsize=256)
def _moments(name: str, ranks: int, virtual: int, many: int) -> list[list[Counter[int]]]:
    """The fullest moments of each rank: micro-batches under way by stage."""
    fullest = []
    for actions in make_schedule(name, ranks, virtual, many):
        held, seen = Counter[int](), {}
        for action in actions:
            if action.kind == "F":
                held[action.stage] += 1
                seen[frozenset(held.items())] = Counter(held)
            elif action.kind in ("B", "W"):
                held[action.stage] -= 1
        moments = list(seen.values())
        fullest.append([m for m in moments if not any(m < other for other in moments)])
    return fullest


def layer_bytes(config: DecoderConfig, plan: Plan, layer: int, recompute: Recompute) -> float:
    """Bytes that a layer keeps a token between its forward and its backward pass.

    In elements, under tp divided by it but where said: inputs of norms 2h, inputs of the
    projections 2h (gathered, so not divided), queries and attention output 2q, keys and values 2k,
    gate, its activation, up and their product 4f, or 2f where there is no gate; an fp32 sum a head;
    another q + k where queries and keys are normalised or split from one matrix, and 2h where there
    are norms behind each half. Experts keep as much for each one that a token goes to, and their
    inputs and outputs. Attention keeps no scores, on any device. `full` keeps the layer's input,
    `selective` the outputs of matrix products and attention besides, and a budget something
    between. What tp leaves whole gathers no inputs; of attention it gathers keys and values where
    rows are cut.
    """
    hidden, tp, element = config.hidden_size, plan.tp, ELEMENT_BYTES[plan.precision]
    if "attention" in plan.whole:
        attention, products, sums = (each / tp for each in attention_elements(config, 1))
        if plan.micro_batch % tp:
            attention += _keys_and_values(config) * (1 - 1 / tp)
    else:
        attention, products, sums = attention_elements(config, tp)
    inner, inner_products, extra = network_elements(config, layer, tp)
    entry = hidden / tp
    norms = 4 if config.norms == "both" else 2
    inputs = sum(hidden / (tp if part in plan.whole else 1) for part in ("attention", "network"))
    whole = element * (norms * hidden / tp + inputs + attention + inner) + sums + extra
    if recompute == "none":
        return whole
    if recompute == "full":
        return element * entry
    if recompute == "selective":
        return element * (entry + inputs + products + inner_products) + sums
    assert not isinstance(recompute, str)
    return recompute * whole + (1 - recompute) * element * entry


def end_bytes(config: DecoderConfig, plan: Plan, stage: int) -> float:
    """Bytes that the last stage keeps a token behind its layers; 0 on the others.

    The last hidden states, their norm, and the gradients of both.
    """
    if stage < plan.stages - 1:
        return 0.0
    hidden = config.hidden_size
    return ELEMENT_BYTES[plan.precision] * (2 * hidden / plan.tp + 2 * hidden)


def attention_elements(config: DecoderConfig, tp: int) -> tuple[float, float, float]:
    """Elements of all that attention keeps, of its products alone, and bytes of its fp32 sums."""
    heads, dim = config.num_heads / tp, config.head_dim
    sums = 4 * heads
    if config.latent is not None:
        latent = config.latent
        ranks = (latent.query_rank or 0) + latent.rank
        expanded = heads * (latent.plain_dim + latent.value_dim)
        mixed = heads * latent.value_dim
        products = ranks + latent.rope_dim + heads * dim + expanded + mixed
        return products + ranks + 2 * heads * dim + mixed, products, sums
    queries, keys = heads * dim, max(1.0, config.num_kv_heads / tp) * dim
    kept = 2 * queries + 2 * keys
    again = config.qk_norm is not None or config.fused_projections
    return kept + (queries + keys if again else 0), kept, sums


def _keys_and_values(config: DecoderConfig) -> float:
    """Channels of a token's keys and values, over all heads."""
    value = config.head_dim if config.latent is None else config.latent.value_dim
    return config.num_kv_heads * (config.head_dim + value)


def network_elements(config: DecoderConfig, layer: int, tp: int) -> tuple[float, float, float]:
    """The same of the feed-forward network; the bytes are the router's, in fp32."""
    spec = config.experts
    if spec is None or not config.is_sparse(layer):
        inward = 1 + config.gated  # a product and its activation; with a gate, one more of each
        width = config.intermediate_size / tp
        return 2 * inward * width, inward * width, 0.0
    rows, shared = spec.per_token, spec.shared_width / tp
    outputs = 2 * rows * config.hidden_size  # an expert's inputs and outputs, a row each
    whole = outputs + 4 * rows * spec.width / tp + 4 * shared
    products = outputs / 2 + 2 * rows * spec.width / tp + 2 * shared
    return whole, products, 3.0 * _FP32 * spec.count


def stage_bytes(config: DecoderConfig, plan: Plan, stage: int) -> float:
    """Bytes that a stage keeps a token, over all its layers and the head."""
    return end_bytes(config, plan, stage) + sum(
        layer_bytes(config, plan, layer, plan.layer_recompute(layer, stage))
        for layer in layers_of(config, plan, stage)
    )


def _brought_back(config: DecoderConfig, plan: Plan, stage: int) -> float:
    """The most that recomputing a layer of a stage brings back, beyond what is free again by then.

    The layers after it have gone back, and what they kept with them; but where backward passes are
    split, weights' gradients still want it.
    """
    most = freed = 0.0
    for layer in reversed(layers_of(config, plan, stage)):
        kept = layer_bytes(config, plan, layer, plan.layer_recompute(layer, stage))
        most = max(most, layer_bytes(config, plan, layer, "none") - kept - freed)
        if plan.pp == 1 or not splits_backward(plan.schedule):
            freed += kept
    return most


def _leaves_device(plan: Plan) -> bool:
    """Whether the optimizer's state lies on the host, or can go there."""
    return plan.device == "cuda" and (plan.offload != "none" or plan.optimizer in PAGED)


def _optimizer_bytes(weight: Weight, plan: Plan) -> float:
    """Muon keeps one moment of the blocks' matrices, and AdamW's two of the rest."""
    name = plan.optimizer
    if name == "muon" and (weight.group == "outer" or len(weight.shape) < 2):
        name = "adamw"
    return _OPTIMIZER_BYTES[name] * weight.shard(plan)


def gathered_at_once(stages: list[list[list[Weight]]], plan: Plan) -> int:
    """Elements gathered at a time: what lies outside the blocks, a block and the one after it."""
    sizes = [[sum(w.elements(plan) for w in group) for group in groups] for groups in stages]
    outer = sum(groups[0] for groups in sizes)
    return outer + 2 * max((size for groups in sizes for size in groups[1:]), default=0)


def _reduced_last(stages: list[list[list[Weight]]], plan: Plan) -> int:
    """Elements of each stage's first group, the last to be reduced in its backward pass."""
    groups = [next(group for group in groups if group) for groups in stages]
    return sum(weight.elements(plan) for group in groups for weight in group)

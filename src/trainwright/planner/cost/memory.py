"""A device's memory under a plan, by the software that runs it, and how it goes through a step.

What our own software holds is told by `planner.memory`, whose formulas are measured; what others
hold by the same shapes and by a `Stack`'s bytes (Korthikanti et al. 2022, arXiv:2205.05198, for the
activations of Megatron-LM). Beside what is counted, an allocator holds more than is in use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from trainwright.planner import memory
from trainwright.planner.budget import LIBRARIES, worker_lines
from trainwright.planner.cluster.describe import Cluster, Pool
from trainwright.planner.cost.prediction import Interval, MemoryPrediction
from trainwright.planner.job import Job
from trainwright.planner.parameters import layers_of, stage_weights, stages_of
from trainwright.planner.plan import Plan, Recompute
from trainwright.planner.stacks import TRAINWRIGHT
from trainwright.planner.timeline import Timed, Timeline

_SPREAD = 0.08  # holds four of five published runs; our own formulas are nearer
_OWN_SPREAD = 0.05
_MASK, _SCORE = 1, 2  # bytes of a dropout mask's element, and of a score in 16 bits


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a pipeline rank's worker: what stays, and what comes and goes with micro-batches.

    `kept` is what a micro-batch leaves on each of the rank's stages until it goes back, `working`
    what a layer needs for as long as it computes, `logits` what the head does.
    """

    lines: dict[str, float]
    kept: dict[int, float]
    working: float
    logits: float

    @property
    def resting(self) -> float:
        """What stays from step to step."""
        return sum(self.lines.values())


def predict_memory(job: Job, plan: Plan, cluster: Cluster) -> MemoryPrediction:
    """The memory of the device that has the least left, when it is fullest.

    Ranks are laid out with the pipeline outermost, so that each of its ranks has devices of its
    own. Raises IndexError where the plan has more workers than the cluster devices.
    """
    every = [_predict_rank(job, plan, cluster, rank) for rank in range(plan.pp)]
    return max(every, key=lambda each: each.total.value / each.limit)


def memory_timeline(
    job: Job, plan: Plan, timeline: Timeline, cluster: Cluster | None = None
) -> list[list[tuple[float, float]]]:
    """Of each pipeline rank, (seconds, bytes) in the order of time, to be joined by straight lines.

    A forward pass adds what it keeps, a backward pass takes it away (split, the weights' half
    does). The most is `predict_memory`'s total on devices that have room for it; `cluster` is
    needed where it knows what was measured of its processes.
    """
    curves = []
    for pp_rank in range(len(timeline.ranks)):
        pools = [] if cluster is None else _pools(plan, cluster, pp_rank)
        constant, share = _constant(job, plan, _measured(pools)), 1 + _hole_share(job, pools)
        rank = rank_memory(job, plan, pp_rank)
        moving = list(_moving(rank, plan, timeline.ranks[pp_rank])) or [(0.0, 0.0)]
        curves.append([(when, constant + share * (rank.resting + held)) for when, held in moving])
    return curves


def _predict_rank(job: Job, plan: Plan, cluster: Cluster, pp_rank: int) -> MemoryPrediction:
    pools = _pools(plan, cluster, pp_rank)
    limit = min(pool.device.memory_bytes for pool in pools)
    rank = rank_memory(job, plan, pp_rank)
    lines = dict(rank.lines)
    lines["activations"] = lines.get("activations", 0.0) + _most_held(plan, pp_rank, rank.kept)
    lines["activations"] += rank.working
    lines["logits"] = rank.logits
    lines["libraries"] = _constant(job, plan, _measured(pools))
    counted = sum(lines.values())
    share = _hole_share(job, pools)
    lines["holes"] = _holes(share * (counted - lines["libraries"]), limit - counted)
    lines = {name: size for name, size in lines.items() if size}
    spread = _OWN_SPREAD if _own(job) else _SPREAD
    return MemoryPrediction(Interval.around(sum(lines.values()), spread), limit, lines, pp_rank)


def _pools(plan: Plan, cluster: Cluster, pp_rank: int) -> list[Pool]:
    """The pools that have any of a pipeline rank's workers."""
    share = plan.world_size // plan.pp
    start, stop = pp_rank * share, (pp_rank + 1) * share
    found, first = [], 0
    for pool in cluster.pools:
        if first < stop and start < first + pool.devices:
            found.append(pool)
        first += pool.devices
    if first < stop:
        raise IndexError(stop - 1)
    return found


def _measured(pools: Iterable[Pool]) -> float:
    return max((pool.rates.memory_bytes for pool in pools), default=0.0)


def _own(job: Job) -> bool:
    return job.stack.name == TRAINWRIGHT.name


def _constant(job: Job, plan: Plan, measured: float) -> float:
    """What a process holds whatever the model: as measured, or as its software is known to."""
    return measured or job.stack.memory_bytes or (LIBRARIES[plan.device] if _own(job) else 0.0)


def _hole_share(job: Job, pools: Iterable[Pool]) -> float:
    """What the allocator holds beside, of what is counted: as measured here, or of a stack."""
    measured = max((pool.rates.holes for pool in pools), default=0.0) if _own(job) else 0.0
    return measured or job.stack.holes


def _holes(holes: float, left: float) -> float:
    """What of the holes stays: where memory is short the allocator gives up to half back."""
    return min(holes, max(left, holes / 2))


def rank_memory(job: Job, plan: Plan, pp_rank: int) -> RankMemory:
    """What the workers of `pp_rank` hold, without the allocator's holes and the libraries."""
    if _own(job):
        return _own_memory(job, plan, pp_rank)
    config, stack = job.config, job.stack
    tokens = plan.micro_batch * job.sequence_length / plan.cp
    stages = stages_of(plan, pp_rank)
    kept = {stage: tokens * _stage_bytes(job, plan, stage) for stage in stages}
    working = max(
        (
            _layer_bytes(job, plan, layer, "none")
            - _layer_bytes(job, plan, layer, plan.layer_recompute(layer, stage))
            for stage in stages
            for layer in layers_of(config, plan, stage)
        ),
        default=0.0,
    )
    has_head = plan.stages - 1 in stages
    logits = stack.keeps_logits * tokens * config.vocab_size / plan.tp * has_head
    return RankMemory(_state_lines(job, plan, pp_rank), kept, tokens * working, logits)


def _own_memory(job: Job, plan: Plan, pp_rank: int) -> RankMemory:
    lines, _ = worker_lines(job.config, plan, pp_rank, job.adapter, job.beside)
    lines.pop("libraries")
    logits = lines.pop("logits", 0.0)
    if plan.device == "cpu" and plan.dp_shard > 1:
        lines["collectives"] = _gloo_bytes(job, plan, pp_rank)
    if plan.activation_offload and plan.device == "cuda":
        # What is kept goes to the host; what is on its way is there all the time.
        return RankMemory(lines, dict.fromkeys(stages_of(plan, pp_rank), 0.0), 0.0, logits)
    activations = lines.pop("activations")
    tokens = plan.micro_batch * plan.sequence_length / plan.cp
    kept = {
        stage: tokens * memory.stage_bytes(job.config, plan, stage)
        for stage in stages_of(plan, pp_rank)
    }
    working = activations - _most_held(plan, pp_rank, kept)
    return RankMemory(lines, kept, working, logits)


def _gloo_bytes(job: Job, plan: Plan, pp_rank: int) -> float:
    """What gloo and FSDP2 hold while the largest group of weights is gathered or reduced.

    Gloo reduces and scatters in a copy of the whole; what was gathered is copied out of one.
    """
    groups = [
        sum(weight.elements(plan) for weight in group)
        for stage in stages_of(plan, pp_rank)
        for group in stage_weights(job.config, plan, stage)
    ]
    return max(groups) * (job.stack.gradient_bytes + memory.ELEMENT_BYTES[plan.precision])


def _most_held(plan: Plan, pp_rank: int, kept: dict[int, float]) -> float:
    return sum(kept[stage] for stage in memory.in_flight(plan, pp_rank, kept))


def _state_lines(job: Job, plan: Plan, pp_rank: int) -> dict[str, float]:
    """Weights, gradients and optimizer, and what is gathered of sharded weights.

    ZeRO-1 cuts the optimizer's, ZeRO-2 gradients too, ZeRO-3 weights too (Rajbhandari et al. 2020,
    arXiv:1910.02054).
    """
    stack, element = job.stack, memory.ELEMENT_BYTES[plan.precision]
    stages = [stage_weights(job.config, plan, stage) for stage in stages_of(plan, pp_rank)]
    weights = [weight for groups in stages for group in groups for weight in group]
    # Context parallelism's workers share states too, with or without other data ranks.
    over = replace(plan, dp_shard=plan.dp_shard * plan.cp, cp=1) if plan.zero else plan
    own = sum(weight.shard(over) for weight in weights)
    whole = sum(weight.elements(plan) for weight in weights)
    keeps_whole = stack.whole_in_pipeline and plan.pp > 1 and plan.zero > 0
    cuts_weights = plan.zero > 2 or (stack.fsdp and plan.zero > 0)
    cuts_gradients = plan.zero > 1 and not keeps_whole
    gathered = 0.0
    if cuts_weights:
        at_once = whole if keeps_whole or plan.zero < 3 else memory.gathered_at_once(stages, plan)
        gathered = element * at_once
    return {
        "weights": stack.weight_bytes * (own if cuts_weights else whole) + stack.copy_bytes * whole,
        "gradients": stack.gradient_bytes * (own if cuts_gradients else whole),
        "optimizer": (stack.optimizer_bytes + stack.step_bytes) * own,
        "copies": gathered,
    }


def _stage_bytes(job: Job, plan: Plan, stage: int) -> float:
    """Bytes that a stage keeps of a token, over its layers and the head.

    The head has the last hidden states, their norm, and the gradients of both.
    """
    kept = sum(
        _layer_bytes(job, plan, layer, plan.layer_recompute(layer, stage))
        for layer in layers_of(job.config, plan, stage)
    )
    if stage == plan.stages - 1:
        kept += memory.ELEMENT_BYTES[plan.precision] * 2 * (_stream(job, plan) + _input(job, plan))
    return kept


def _layer_bytes(job: Job, plan: Plan, layer: int, policy: Recompute) -> float:
    """Bytes that a layer keeps of a token between its passes.

    Of a GPT in 16 bits with masks, s b h (10 + 24/t + 5as/(ht)) in all; a t-th of everything under
    sequence parallelism; without the term of scores where attention is fused or `selective`
    recomputes it; and 2 s b h, or a t-th of it, where everything is recomputed (Korthikanti et al.
    2022, table 2).
    """
    config, stack, element = job.config, job.stack, memory.ELEMENT_BYTES[plan.precision]
    stream = _stream(job, plan)
    if policy == "full":
        return element * stream
    inputs = 2 * _input(job, plan)
    attention, products, sums = memory.attention_elements(config, plan.tp)
    inner, inner_products, extra = memory.network_elements(config, layer, plan.tp)
    if policy == "selective" and not stack.selects_attention:
        made = inputs + products + inner_products
        return element * (stream + stack.keeps_products * made) + sums
    masks = 2 * _MASK * stream if stack.dropout else 0.0
    scores = 0.0
    if not stack.flash:
        sums = 0.0
        if policy != "selective":
            keys = job.sequence_length * config.num_heads / plan.tp
            scores = keys * (2 * _SCORE + _MASK if stack.dropout else _SCORE)
    if stack.fuses_elementwise and config.gated:
        # One kernel makes gate and up into their product, and keeps no activation beside.
        inner -= _width(job, layer) / plan.tp
    whole = element * (2 * stream + inputs + attention + inner) + masks + scores + sums + extra
    if isinstance(policy, float):
        return policy * whole + (1 - policy) * element * stream
    return whole


def _width(job: Job, layer: int) -> float:
    """Channels of the networks that a token goes through."""
    config, spec = job.config, job.config.experts
    if spec is None or not config.is_sparse(layer):
        return config.intermediate_size
    return spec.per_token * spec.width + spec.shared_width


def _stream(job: Job, plan: Plan) -> float:
    """Channels of a token that a worker has between the halves of a block."""
    return job.config.hidden_size / (plan.tp if job.stack.sequence_parallel else 1)


def _input(job: Job, plan: Plan) -> float:
    """Channels of a token that go into projections: gathered, and kept so or gathered again."""
    return _stream(job, plan) if job.stack.regathers_sequence else job.config.hidden_size


def _moving(
    rank: RankMemory, plan: Plan, actions: Iterable[Timed]
) -> Iterator[tuple[float, float]]:
    """What micro-batches hold at each action's start and end, and right before and behind it."""
    held = Counter[int]()
    last = plan.stages - 1
    for (kind, stage, _), start, end in actions:
        before = sum(rank.kept[each] * many for each, many in held.items())
        if kind == "F":
            held[stage] += 1
        elif kind in ("B", "W"):
            held[stage] -= 1
        after = sum(rank.kept[each] * many for each, many in held.items())
        working = rank.working if kind != "W" else 0.0
        logits = rank.logits if stage == last and kind != "W" else 0.0
        yield start, before
        yield start, before + working + (logits if kind != "F" else 0.0)
        yield end, after + working + (logits if kind == "F" else 0.0)
        yield end, after

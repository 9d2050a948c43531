"""From the sharding program to a Plan: what our workers can run, and which of it is best. No torch.

`parallel.tensor` cuts a block's halves by heads and by channels, or leaves them whole with a part
of the tokens for each worker; `parallel.expert` deals out experts over workers with other rows.
Each is the same program with fewer strategies (`tensor_ways`, `expert_ways`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from trainwright.models.families import DecoderConfig
from trainwright.planner import memory
from trainwright.planner.cluster.describe import Cluster
from trainwright.planner.cluster.topology import route
from trainwright.planner.conditions import cut_badly
from trainwright.planner.cost import collectives
from trainwright.planner.cost.kernels import kernels_of
from trainwright.planner.job import Job
from trainwright.planner.plan import Plan
from trainwright.planner.search.graph import Graph, Operator, decoder_graph
from trainwright.planner.search.sharding import PARTIAL, Choice, Line, Sharding, Strategy

PARTS = {"attention": "self_attn", "network": "mlp"}
_CUT_AXES = {
    "heads", "kv_heads", "value_heads", "channels", "expert_channels", "shared_channels",
}  # fmt: skip
_BETWEEN = ("norm", "norm_after", "add")  # on the stream, which is cut by tokens
_MARGIN = 0.9  # of what a device has, for the states that are counted here


class Ways(NamedTuple):
    """What a kind of parallelism can run: the arguments of `Sharding` that restrict it."""

    allowed: Callable[[Operator, Strategy], bool]
    alike: Sequence[Mapping[str, Collection[str | None]]]
    own: str  # the axis along which the stream is cut


def tensor_ways(graph: Graph, config: DecoderConfig, workers: int, own_attention: bool) -> Ways:
    """Of tensor parallelism: each half of a block cut inside, or whole with own tokens.

    Attention is left whole only with `own_attention`, networks where they are no experts.
    """
    own = "rows" if graph.axes["rows"].parts % workers == 0 else "sequence"
    shared = config.num_kv_heads < workers  # key-value heads, each on several workers
    bad = cut_badly(config, workers)
    whole = {"attention": own_attention, "network": config.experts is None}

    def allowed(operator: Operator, strategy: Strategy) -> bool:
        part = part_of(operator.name)
        if operator.name in ("embed_tokens", "lm_head", "loss"):
            return strategy.axis == "vocabulary"
        if part is None:
            return strategy.axis == own
        if strategy.axis == own:
            return whole[part]
        if part in bad:
            return False
        if operator.linear:
            return strategy.output == PARTIAL
        inside = _CUT_AXES.intersection(operator.axes) - operator.keeps
        if strategy.axis is not None:
            return strategy.axis in inside
        # Made by every worker alike: what has no such axis, and key-value heads that are too few.
        everywhere = not inside or (shared and inside == {"kv_heads"})
        return everywhere and strategy.wants == PARTIAL

    alike = [{name: {own} for name in graph.operators if part_of(name) == part} for part in PARTS]
    return Ways(allowed, [group for group in alike if group], own)


def expert_ways(graph: Graph) -> Ways:
    """Of expert parallelism: other rows on every worker, experts dealt out or whole."""

    def allowed(operator: Operator, strategy: Strategy) -> bool:
        dealt = ".mlp.experts." in operator.name and "experts" in operator.axes
        return strategy.axis == "rows" or (dealt and strategy.axis == "experts")

    dealt = {name: {"experts"} for name in graph.operators if ".mlp.experts." in name}
    return Ways(allowed, [dealt] if dealt else [], "rows")


def part_of(name: str) -> str | None:
    """The part of a block that an operator belongs to; None where it is between them."""
    for part, module in PARTS.items():
        _, found, inside = name.partition(f".{module}.")
        if found:
            return None if inside in _BETWEEN else part
    return None


def left_whole(choice: Choice, own: str) -> tuple[str, ...]:
    """The parts in which every worker does its own tokens."""
    names = choice.sharding.graph.operators
    return tuple(
        part
        for part in PARTS
        if any(part_of(name) == part and choice[name].axis == own for name in names)
    )


def choose_whole(job: Job, plan: Plan, cluster: Cluster) -> tuple[str, ...]:
    """The parts of a block that `plan` had better leave whole: its `whole`, without tp ().

    By the integer program, within a device's memory; where nothing is within it, what takes least.
    Whatever else the plan says stays; the plan with the result is legal where any is.
    """
    if plan.tp == 1:
        return ()
    return _choose(job, replace(plan, whole=(), stage_layers=()), cluster)


@lru_cache(maxsize=4096)
def _choose(job: Job, plan: Plan, cluster: Cluster) -> tuple[str, ...]:
    forced = cut_badly(job.config, plan.tp)
    sharding, ways = tensor_sharding(job, replace(plan, whole=forced), cluster)
    choice = sharding.solve()
    return forced if choice is None else left_whole(choice, ways.own)


def tensor_sharding(job: Job, plan: Plan, cluster: Cluster) -> tuple[Sharding, Ways]:
    """The program of what to leave whole under a plan's tensor parallelism, for a micro-batch."""
    graph = decoder_graph(job.config, plan.micro_batch, plan.sequence_length // plan.cp)
    ways = tensor_ways(graph, job.config, plan.tp, own_attention=plan.cp == 1)
    line = line_of(job, plan, cluster, "tp", plan.tp)
    budget = plan.pp * room(job, plan, cluster)
    return Sharding(graph, line, allowed=ways.allowed, alike=ways.alike, budget=budget), ways


def planned_sharding(job: Job, plan: Plan, cluster: Cluster) -> Sharding:
    """The same with what the plan says is whole, whatever memory it takes."""
    free, ways = tensor_sharding(job, plan, cluster)

    def allowed(operator: Operator, strategy: Strategy) -> bool:
        part = part_of(operator.name)
        own = strategy.axis == ways.own
        return ways.allowed(operator, strategy) and (part is None or own == (part in plan.whole))

    return Sharding(free.graph, free.line, allowed=allowed)


def expert_sharding(job: Job, plan: Plan, cluster: Cluster) -> tuple[Sharding, Ways]:
    """The program of a plan's expert parallelism, for a micro-batch on each of its workers."""
    length = plan.sequence_length // plan.cp // plan.tp
    graph = decoder_graph(job.config, plan.ep * plan.micro_batch, length)
    ways, line = expert_ways(graph), line_of(job, plan, cluster, "ep", plan.ep)
    return Sharding(graph, line, allowed=ways.allowed, alike=ways.alike), ways


def line_of(job: Job, plan: Plan, cluster: Cluster, group: str, workers: int) -> Line:
    """The workers of a plan's groups along one axis."""
    pool = cluster.pool_of(0)
    kernels, way = kernels_of(pool), route(cluster, plan, group)
    shards = plan.dp_shard * plan.cp if plan.dp_shard > 1 else 1
    stack = job.stack
    held = stack.weight_bytes + stack.gradient_bytes + stack.optimizer_bytes

    def states(elements: float) -> float:
        """Of the update, which reads and writes states, and of what micro-batches do to weights."""
        moved = 2 * held / shards + plan.accumulation * _moved_bytes(job, plan)
        return kernels.elements(moved * elements, 0) if job.adapter is None else 0.0

    return Line(
        workers,
        kernels,
        lambda kind, size: collectives.seconds(kind, size, way),
        plan.precision,
        memory.ELEMENT_BYTES[plan.precision],
        plan.accumulation,
        _state_bytes(job, plan, shards),
        states,
        trains=job.adapter is None,
    )


def _moved_bytes(job: Job, plan: Plan) -> float:
    """Bytes of a weight's element that a micro-batch reads and writes beside its products.

    It is narrowed, or taken out of what was gathered; its gradient is widened, and added up where
    it is whole.
    """
    if not job.stack.copies_weights:
        return 0.0
    narrow, gradient = memory.ELEMENT_BYTES[plan.precision], job.stack.gradient_bytes
    sharded = plan.dp_shard > 1
    moved = 0.0 if sharded and plan.zero > 1 else 3 * gradient
    if sharded:
        return moved + 3 * narrow + gradient
    return moved + (2 * (narrow + gradient) if narrow < gradient else 0.0)


def _state_bytes(job: Job, plan: Plan, shards: int) -> float:
    """Bytes of a parameter's states on a worker, as its ZeRO stage cuts them."""
    stack = job.stack
    if job.adapter is not None:
        return memory.ELEMENT_BYTES[plan.precision] / shards
    parts = (stack.optimizer_bytes, stack.gradient_bytes, stack.weight_bytes)
    return sum(size / (shards if plan.zero > stage else 1) for stage, size in enumerate(parts))


def room(job: Job, plan: Plan, cluster: Cluster) -> float:
    """Bytes of a device that activations and logits leave for states."""
    pool = cluster.pool_of(0)
    # Stages hold a pp-th of the layers of as many micro-batches as are under way.
    alone = replace(plan, pp=1, virtual_stages=1, schedule="1f1b", stage_layers=())
    kept = plan.micro_batch * memory.activation_bytes(job.config, alone) / plan.pp
    held = kept * min(plan.pp, plan.accumulation) + memory.head_bytes(job.config, plan)
    return max(0.0, _MARGIN * (pool.device.memory_bytes - pool.rates.memory_bytes) - held)

"""Seconds that a pipeline stage takes for a micro-batch, there and back, with what it waits for.

Durations are of kernels one after the other, and of collectives; a collective is hidden as far as
the software starts it beside kernels that do not need it, and slows those down (Galvatron,
arXiv:2211.13878, measures 1.1 to 1.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from trainwright.planner.cost.calls import Call, context_calls, expert_calls, tensor_calls
from trainwright.planner.cost.kernels import Kernels
from trainwright.planner.cost.operators import (
    Operators,
    Product,
    embedding_operators,
    head_operators,
    layer_operators,
)
from trainwright.planner.job import Job
from trainwright.planner.memory import ELEMENT_BYTES
from trainwright.planner.parameters import layers_of, stage_weights
from trainwright.planner.plan import Plan, Recompute

Seconds = Callable[[Call], float]  # of all its times
_MATRICES = 8  # of a layer, or so: what is done with weights is done with each
_ELEMENTS_BACKWARD = 2.0  # of the bytes that the forward pass moves


@dataclass
class Work:
    """Seconds of a device by what it does, and of communication that nothing hides."""

    products: float = 0.0
    attention: float = 0.0
    elements: float = 0.0
    exposed: dict[str, float] = field(default_factory=dict)

    @property
    def compute(self) -> float:
        """Of kernels."""
        return self.products + self.attention + self.elements

    @property
    def total(self) -> float:
        """Of kernels and of waiting."""
        return self.compute + sum(self.exposed.values())

    def add(self, other: Work, times: float = 1.0) -> Work:
        """The same and `times` as much of another."""
        exposed = dict(self.exposed)
        for name, seconds in other.exposed.items():
            exposed[name] = exposed.get(name, 0.0) + times * seconds
        return Work(
            self.products + times * other.products,
            self.attention + times * other.attention,
            self.elements + times * other.elements,
            exposed,
        )

    def wait(self, dimension: str, seconds: float) -> None:
        """Seconds of communication that are not hidden."""
        if seconds > 0:
            self.exposed[dimension] = self.exposed.get(dimension, 0.0) + seconds


@dataclass(frozen=True)
class StageTimes:
    """A micro-batch on a stage: forward, backward to the inputs, and to the weights."""

    forward: Work
    backward_input: Work
    backward_weight: Work

    @property
    def all(self) -> Work:
        """The three together."""
        return self.forward.add(self.backward_input).add(self.backward_weight)


def stage_times(job: Job, plan: Plan, stage: int, kernels: Kernels, seconds: Seconds) -> StageTimes:
    """What `stage` takes for a micro-batch on a device with these `kernels`.

    `seconds` tells what a collective takes there.
    """
    once = kernels.rates.pass_seconds
    forward, inputs, weights = Work(elements=once), Work(elements=once), Work()
    known: dict[tuple[object, ...], tuple[Work, Work, Work]] = {}
    groups = stage_weights(job.config, plan, stage)
    for layer, group in zip(layers_of(job.config, plan, stage), groups[1:], strict=True):
        policy = layer_policy(plan, stage, layer)
        own = sum(weight.elements(plan) for weight in group)
        key = (job.config.is_sparse(layer), job.config.layer_windows[layer], policy, own)
        if key not in known:
            known[key] = _layer(job, plan, layer, policy, own, kernels, seconds)
        there, back, late = known[key]
        forward, inputs, weights = forward.add(there), inputs.add(back), weights.add(late)
    for operators in _ends(job, plan, stage):
        there, back, late = passes(job, plan, operators, kernels)
        forward, inputs, weights = forward.add(there), inputs.add(back), weights.add(late)
    outer = float(sum(weight.elements(plan) for weight in groups[0]))
    if outer:
        _states(job, plan, outer, forward, Work(), weights, kernels, seconds)
    if plan.tp > 1 and plan.stages - 1 == stage:  # the head's inputs, and three sums a token
        size = plan.micro_batch * job.sequence_length / plan.cp
        stream = size * job.config.hidden_size * ELEMENT_BYTES[plan.precision]
        for work, kind in ((forward, "all_gather"), (inputs, "reduce_scatter")):
            work.wait("tp", seconds(Call("tp", kind, stream)))  # type: ignore[arg-type]
        forward.wait("tp", seconds(Call("tp", "all_reduce", 4 * size, 3)))
    return StageTimes(forward, inputs, weights)


def layer_policy(plan: Plan, stage: int, layer: int) -> Recompute:
    """What a layer recomputes."""
    by_layer = plan.recompute_by_layer
    return by_layer[layer] if by_layer else plan.stage_recompute(stage)


def _ends(job: Job, plan: Plan, stage: int) -> Iterable[Operators]:
    if stage == 0:
        yield embedding_operators(job, plan)
    if stage == plan.stages - 1:
        yield head_operators(job, plan)


def _layer(
    job: Job,
    plan: Plan,
    layer: int,
    policy: Recompute,
    elements: int,
    kernels: Kernels,
    seconds: Seconds,
) -> tuple[Work, Work, Work]:
    """A layer's forward pass, and the two halves of its backward pass."""
    operators = layer_operators(job, plan, layer)
    forward, inputs, weights = passes(job, plan, operators, kernels)
    forward.elements *= kernels.small_kernels
    inputs.elements *= kernels.small_kernels
    tensor = tensor_calls(job, plan)
    within = sum(map(seconds, tensor)) * (1 - job.stack.overlaps_tensor)
    context = _context(job, plan, forward.attention, seconds)
    experts = sum(map(seconds, expert_calls(job, plan, layer))) * (1 - job.stack.overlaps_experts)
    for dimension, exposed in (("tp", within), ("cp", context), ("ep", experts)):
        forward.wait(dimension, exposed)
        # Keys' and values' gradients go round with them, in fp32 where they are summed.
        inputs.wait(dimension, exposed * (2 if dimension == "cp" else 1))
    if plan.tp > 1 and job.stack.regathers_sequence:
        gathers = [call for call in tensor if call.kind == "all_gather"]
        weights.wait("tp", sum(map(seconds, gathers)) * (1 - job.stack.overlaps_tensor))
    inputs = inputs.add(_again(forward, policy, job))
    _states(job, plan, elements, forward, inputs, weights, kernels, seconds)
    return forward, inputs, weights


def _states(
    job: Job,
    plan: Plan,
    elements: float,
    forward: Work,
    inputs: Work,
    weights: Work,
    kernels: Kernels,
    seconds: Seconds,
) -> None:
    """Adds what a micro-batch costs for having weights at all: gathers, reductions, copies."""
    sharded = plan.dp_shard > 1
    if sharded and plan.zero == 3:
        _shard(job, plan, elements, forward, inputs, weights, kernels, seconds)
    elif sharded and plan.zero == 2:
        call = Call("fsdp", "reduce_scatter", job.stack.gradient_bytes * _trained(job, elements))
        _hide(weights, inputs.compute + weights.compute, [call], kernels, seconds, job)
    if not job.stack.copies_weights or job.adapter is not None:
        return
    # A weight is narrowed for its products, or taken out of what was gathered, and its gradient
    # widened; where whole gradients are added up, they are read and written once more.
    narrow, element = ELEMENT_BYTES[plan.precision], job.stack.gradient_bytes
    adds = 3 * element if not sharded or plan.zero == 1 else 0.0
    copied = 2 * narrow if sharded else (narrow + element if narrow < element else 0.0)
    widened = narrow + element if sharded or narrow < element else 0.0
    forward.elements += kernels.elements(elements * copied, _MATRICES)
    if sharded and plan.zero == 3 and job.stack.gathers_again:
        inputs.elements += kernels.elements(elements * copied, _MATRICES)
    weights.elements += kernels.elements(elements * (widened + adds), 2 * _MATRICES)


def passes(job: Job, plan: Plan, operators: Operators, kernels: Kernels) -> tuple[Work, Work, Work]:
    """Kernels alone: forward, of the inputs' gradients, and of the weights'."""
    forward, inputs, weights = Work(), Work(), Work()
    slower = 1 / job.stack.float8_rate if plan.precision == "float8" else 1.0
    for product in operators.products:
        forward.products += slower * kernels.product(product, plan.precision)
        inputs.products += slower * kernels.product(_of_inputs(product), plan.precision)
        if product.trained:
            weights.products += slower * kernels.product(_of_weights(product), plan.precision)
    if operators.attention is not None:
        kind = (operators.attention, plan.precision, job.stack.flash, job.stack.causal)
        forward.attention = kernels.attention(*kind)
        inputs.attention = kernels.attention_backward(*kind)
    forward.elements = kernels.elements(operators.element_bytes, operators.kernels)
    inputs.elements = kernels.elements(
        _ELEMENTS_BACKWARD * operators.element_bytes, 2 * operators.kernels
    )
    return forward, inputs, weights


def _of_inputs(product: Product) -> Product:
    return product._replace(columns=product.inner, inner=product.columns)


def _of_weights(product: Product) -> Product:
    return product._replace(rows=product.inner, inner=product.rows)


def _again(forward: Work, policy: Recompute, job: Job) -> Work:
    """What is computed a second time before a layer goes backward."""
    if policy == "none":
        return Work()
    if policy == "full":
        return forward
    if policy == "selective":
        # Megatron-LM recomputes attention's core; ours and torchtitan's what no product makes.
        if job.stack.selects_attention:
            return Work(attention=forward.attention)
        return Work(elements=forward.elements).add(
            Work(exposed={k: v for k, v in forward.exposed.items() if k == "tp"})
        )
    assert not isinstance(policy, str)
    share = (1 - policy) ** 2  # the cheapest to compute for its bytes goes first
    return Work(forward.products * share, forward.attention * share, forward.elements)


def _context(job: Job, plan: Plan, attention: float, seconds: Seconds) -> float:
    """Exposed seconds of context parallelism in a forward pass: a ring hides in attention."""
    calls = context_calls(job, plan)
    if not calls:
        return 0.0
    taken = sum(map(seconds, calls))
    if plan.cp_method != "ring" or not job.stack.overlaps_ring:
        return taken
    return max(0.0, taken - attention * (plan.cp - 1) / plan.cp)


def _shard(
    job: Job,
    plan: Plan,
    elements: float,
    forward: Work,
    inputs: Work,
    weights: Work,
    kernels: Kernels,
    seconds: Seconds,
) -> None:
    """FSDP gathers the next layer's weights, and reduces the last one's gradients, meanwhile."""
    width = ELEMENT_BYTES[plan.precision]
    gather = Call("fsdp", "all_gather", width * elements)
    reduce = Call("fsdp", "reduce_scatter", job.stack.gradient_bytes * _trained(job, elements))
    _hide(forward, forward.compute, [gather], kernels, seconds, job)
    calls = [gather, reduce] if job.stack.gathers_again else [reduce]
    _hide(weights, inputs.compute + weights.compute, calls, kernels, seconds, job)


def _trained(job: Job, elements: float) -> float:
    """Of a layer's weights those that are trained; a low-rank adapter has two slices of each."""
    if job.adapter is None:
        return elements
    return elements * min(1.0, 2 * job.adapter.rank / job.config.hidden_size)


def _hide(
    work: Work, window: float, calls: list[Call], kernels: Kernels, seconds: Seconds, job: Job
) -> None:
    """Adds to `work` what `calls` cost beside a `window` of computing: waiting, and slowness."""
    taken = sum(map(seconds, calls))
    if not job.stack.overlaps_gathers:
        work.wait(calls[0].dimension, taken)
        return
    slower = (kernels.rates.overlap_slowdown - 1) * min(window, taken)
    work.wait(calls[0].dimension, max(0.0, taken - window) + slower)

"""A plan in words: how the work is spread, what a worker holds, how long a pipeline idles."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from trainwright.models.families import DecoderConfig
from trainwright.planner import memory
from trainwright.planner.advice import Advice
from trainwright.planner.budget import Budget
from trainwright.planner.cost.prediction import Prediction
from trainwright.planner.plan import Plan
from trainwright.planner.schedules import make_schedule, placement
from trainwright.planner.shapes import flops_per_token, parameter_count
from trainwright.planner.timeline import simulate

_GIB = 1 << 30
_ZERO = {
    1: "optimizer state sharded (ZeRO-1)",
    2: "gradients and optimizer state sharded (ZeRO-2)",
    3: "weights sharded (FSDP)",
}


def explain_plan(
    plan: Plan, config: DecoderConfig | None, budget: Budget | None = None
) -> list[tuple[str, str]]:
    """Rows for the screen, name and value; sizes and costs only where `config` is known.

    `budget` is what is known of its memory, where more than the plan is.
    """
    rows = [
        ("workers", _workers(plan)),
        *_layout(plan),
        ("batch", f"{plan.batch_sequences} rows = {plan.batch_tokens:,} tokens a step"),
        ("micro-batches", _micro_batches(plan)),
        ("precision", plan.precision),
        ("recompute", _recompute(plan)),
        ("compile", "on" if plan.compile else "off"),
    ]
    if config is None:
        return rows
    flops = 3 * flops_per_token(config, plan.sequence_length) * plan.batch_tokens
    rows = [
        ("parameters", f"{parameter_count(config):,}"),
        *rows,
        ("model FLOPs", f"{in_words(flops, 'FLOP')} a step"),
    ]
    if budget is not None:
        return [*rows, ("memory", _memory(budget))]
    states = memory.state_bytes(config, plan).total
    activations = plan.micro_batch * memory.activation_bytes(config, plan)
    return [
        *rows,
        ("states", f"{in_bytes(states)} a worker"),
        ("activations", f"{in_bytes(activations + memory.head_bytes(config, plan))} a worker"),
    ]


def foretold(prediction: Prediction | None) -> list[tuple[str, str]]:
    """A row for the screen on a plan's predicted step; none where nothing is foretold."""
    if prediction is None:
        return []
    step, rate = prediction.step_seconds, prediction.tokens_per_second
    words = f"{in_seconds(step.value)} a step ({in_seconds(step.low)} to {in_seconds(step.high)})"
    rates = f"rates {prediction.source}" if prediction.source else ""
    return [("predicted", ", ".join(filter(None, [words, f"{rate:,.0f} tokens/s", rates])))]


def memory_lines(budget: Budget, measured: Mapping[str, float] | None = None) -> list[str]:
    """The budget as a table, in GiB, with what was `measured` beside it.

    `measured` are bytes by the budget's own names, "sum" and "limit".
    """
    beside = measured or {}
    shown = [*budget.lines.items(), ("sum", budget.total), ("limit", budget.limit)]
    lines = [f"{'memory of a worker':<20}{'GiB':>9}{'  measured' if measured else ''}"]
    for name, size in shown:
        found = f"{beside[name] / _GIB:10.2f}" if name in beside else ""
        lines.append(f"  {name:<18}{size / _GIB:9.2f}{found}")
    if budget.host:
        lines.append(f"  {'(on the host)':<18}{budget.host / _GIB:9.2f}")
    return lines


def advice_lines(found: Sequence[Advice]) -> list[str]:
    """What would make a recipe fit, one way a line, with the GiB that a worker would hold."""
    if not found:
        return ["No change of the recipe alone helps: a smaller model would, or more devices."]
    width = max(len(str(each.change)) for each in found)
    ways = [f"  {each.change!s:<{width}}{each.total / _GIB:9.2f} GiB" for each in found]
    return ["What would make it fit, the least slow first:", *ways]


def _memory(budget: Budget) -> str:
    parts = ", ".join(f"{name} {in_bytes(size)}" for name, size in budget.lines.items())
    return f"{in_bytes(budget.total)} of {in_bytes(budget.limit)} a worker: {parts}"


def bubble(plan: Plan) -> float:
    """Share of a step that the pipeline's workers idle, with equal stages; 0 without a pipeline.

    Simulated with a backward pass that takes twice a forward pass, half of it for the weights.
    """
    if plan.pp == 1:
        return 0.0
    schedule = make_schedule(plan.schedule, plan.pp, plan.virtual_stages, plan.accumulation)
    ranks = placement(plan.schedule, plan.pp, plan.virtual_stages)
    even = [1.0] * len(ranks)
    timeline = simulate(schedule, ranks, even, even, even)
    return sum(timeline.idle) / len(timeline.idle)


def _workers(plan: Plan) -> str:
    on_cpu = plan.device == "cpu"
    threads = "1 thread" if plan.threads == 1 else f"{plan.threads} threads"
    if plan.world_size == 1:
        return f"1 {'process on the CPU' if on_cpu else 'GPU'}, {threads}"
    if plan.dp_shard == 1:
        layout = "each with whole weights (DDP)" if plan.dp_replicate > 1 else ""
    elif plan.dp_replicate == 1:
        layout = _ZERO[plan.zero]
        if plan.dp_shard * plan.cp == plan.world_size:
            layout = layout.replace("sharded", "sharded over all")
    else:
        layout = f"{plan.dp_replicate} replicas of {plan.dp_shard} shards (HSDP)"
        layout += f", {_ZERO[plan.zero]}" if plan.zero < 3 else ""
    kind = "processes on the CPU" if on_cpu else "GPUs"
    return ", ".join(filter(None, [f"{plan.world_size} {kind}", layout, f"{threads} each"]))


def _layout(plan: Plan) -> list[tuple[str, str]]:
    """What cuts the model and its rows, besides data parallelism; only what is above 1."""
    rows = []
    if plan.data_ranks > 1 and plan.data_ranks < plan.world_size:
        parts = [("replicas", plan.dp_replicate), ("shards", plan.dp_shard)]
        words = " × ".join(f"{size} {name}" for name, size in parts if size > 1)
        rows.append(("data", f"rows over {words}"))
    if plan.tp > 1:
        whole = f"; {' and '.join(plan.whole)} whole, own tokens each" if plan.whole else ""
        rows.append(("tensor", f"products and the stream cut over {plan.tp} workers{whole}"))
    if plan.cp > 1:
        method = plan.cp_method.replace("_", "-")
        rows.append(("context", f"each row's tokens over {plan.cp} workers ({method})"))
    if plan.ep > 1:
        rows.append(("experts", f"dealt out over {plan.ep} workers"))
    if plan.pp > 1:
        layers = " ".join(map(str, plan.stage_layers))
        rows.append(
            (
                "pipeline",
                f"{plan.stages} stages on {plan.pp} workers"
                + (f" of {layers} layers" if layers else "")
                + f", {plan.schedule}, idle {bubble(plan):.0%} of the time",
            )
        )
    if plan.offload != "none" or plan.activation_offload:
        what = {"none": [], "optimizer": ["optimizer state"], "parameters": ["weights and states"]}
        moved = what[plan.offload] + ["activations"] * plan.activation_offload
        rows.append(("offloaded", f"{' and '.join(moved)} to the host's memory"))
    return rows


def _micro_batches(plan: Plan) -> str:
    if not plan.rows_by_replica:
        return f"{plan.accumulation} × {plan.micro_batch} rows a worker"
    counts = ", ".join(str(plan.accumulation_of(each)) for each in range(plan.dp_replicate))
    return f"{counts} (by replica) × {plan.micro_batch} rows a worker"


def _recompute(plan: Plan) -> str:
    if plan.recompute_by_layer:
        counts = Counter(plan.recompute_by_layer)
        return "by layer: " + ", ".join(f"{n} {_policy(each)}" for each, n in counts.items())
    if plan.recompute_by_stage:
        return "by stage: " + " ".join(map(_policy, plan.recompute_by_stage))
    return _policy(plan.recompute)


def _policy(policy: str | float) -> str:
    return policy if isinstance(policy, str) else f"to {policy:.0%} of the memory"


def in_bytes(count: float) -> str:
    """A number of bytes as a person reads it: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("not reached")


def in_seconds(seconds: float) -> str:
    """A step's time as a person reads it: "1.24 s", "35.1 ms"."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def in_words(count: float, unit: str) -> str:
    """A large count with its prefix: "3.2 TFLOP"."""
    power = min(6, max(0, int(math.log10(count) // 3))) if count > 0 else 0
    return f"{count / 1000**power:.1f} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}{unit}"

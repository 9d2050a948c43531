"""A plan's sharding in words: how each operator is cut, what it sends, and why so. No torch.

Verdicts are AutoParallel's: the chosen way is cheaper, another one would be, both are the same, or
the other cannot be.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from trainwright.planner.cluster.describe import Cluster
from trainwright.planner.explain import in_bytes
from trainwright.planner.job import Job
from trainwright.planner.plan import Plan
from trainwright.planner.search.cut import (
    PARTS,
    cut_badly,
    expert_sharding,
    planned_sharding,
    room,
)
from trainwright.planner.search.graph import layer_of
from trainwright.planner.search.sharding import Choice, Moved, Sharding

_TIE = 0.005  # of the seconds of both ways
_VERBS = {
    "all_gather": "gathers",
    "reduce_scatter": "sums and cuts",
    "all_reduce": "sums",
    "all_to_all": "exchanges",
}


class Alternative(NamedTuple):
    """Another way for a part of a block: its seconds a micro-batch, beside the chosen ones."""

    part: str
    chosen: str
    other: str
    seconds: float
    other_seconds: float | None  # None where it cannot be
    verdict: str
    why: str = ""


def sharding_lines(job: Job, plan: Plan, cluster: Cluster) -> list[str]:
    """A table of operators for each of tp and ep that is above 1, and what else could be.

    Milliseconds are of a micro-batch through all layers, forward and backward, with nothing hidden;
    what comes once a step is spread over its micro-batches.
    """
    lines = []
    if plan.tp > 1:
        choice = planned_sharding(job, plan, cluster).solve()
        assert choice is not None, "the plan is not legal"
        lines += _table(f"tp {plan.tp}", choice)
        lines += [_sentence(each) for each in alternatives(job, plan, cluster)]
        lines += _unbuilt(choice)
    if plan.ep > 1:
        choice = expert_sharding(job, plan, cluster)[0].solve()
        assert choice is not None
        lines += _table(f"ep {plan.ep}", choice, within=".mlp.")
    return lines


def alternatives(job: Job, plan: Plan, cluster: Cluster) -> list[Alternative]:
    """For each part of a block what the other way would take: cut by tp, or left whole."""
    found = []
    planned = planned_sharding(job, plan, cluster).solve()
    assert planned is not None, "the plan is not legal"
    for part in PARTS:
        whole = part in plan.whole
        left = set(plan.whole) ^ {part}
        other = replace(plan, whole=tuple(each for each in PARTS if each in left))
        words = ("whole", "cut") if whole else ("cut", "whole")
        choice = planned_sharding(job, other, cluster).solve()
        if choice is None:
            why = _impossible(job, plan, part)
            found.append(Alternative(part, *words, planned.seconds, None, "unavailable", why))
            continue
        verdict, why = _verdict(planned, choice), ""
        taken, there = choice.memory / plan.pp, room(job, other, cluster)
        if verdict == "cheaper" and taken > there:
            verdict = "too large"
            why = f"takes {in_bytes(taken)} of states a device, which has {in_bytes(there)} left"
        found.append(Alternative(part, *words, planned.seconds, choice.seconds, verdict, why))
    return found


def _verdict(planned: Choice, other: Choice) -> str:
    if abs(other.seconds - planned.seconds) < _TIE * planned.seconds:
        return "tie"
    return "cheaper" if other.seconds < planned.seconds else "dearer"


def _impossible(job: Job, plan: Plan, part: str) -> str:
    config = job.config
    if part in cut_badly(config, plan.tp):
        if part == "network":
            return f"{plan.tp} does not divide the networks' widths"
        return f"{plan.tp} does not go into {config.num_heads} and {config.num_kv_heads} heads"
    if part == "attention":
        return f"cp {plan.cp} brings keys together already"
    return "experts are cut or dealt out"


def _sentence(each: Alternative) -> str:
    name = f"{each.part} {each.chosen}: {1e3 * each.seconds:.2f} ms a micro-batch"
    if each.other_seconds is None:
        return f"  {name}; {each.other} cannot be: {each.why}"
    there = f"{each.other} {1e3 * each.other_seconds:.2f} ms"
    says = {
        "dearer": "the chosen way is cheaper",
        "cheaper": f"cheaper: try `whole` {'without' if each.chosen == 'whole' else 'with'} it",
        "tie": "the same within half a percent",
        "too large": each.why,
    }[each.verdict]
    return f"  {name}; {there}: {says}"


def _table(title: str, choice: Choice, within: str = "") -> list[str]:
    graph = choice.sharding.graph
    names = [
        name
        for name, operator in graph.operators.items()
        if within in name and (operator.kind != "share" or choice.moved(name))
    ]
    label = {name: _label(name, graph.operators[name].times) for name in names}
    wide = max(map(len, label.values()))
    lines = [f"{title:<{wide}}  {'cut along':<24}{'ms':>8}  sends"]
    for name in names:
        along, milliseconds = choice[name].words, 1e3 * choice.seconds_of(name)
        sends = _sends(choice.moved(name))
        lines.append(f"{label[name]:<{wide}}  {along:<24}{milliseconds:8.2f}  {sends}".rstrip())
    return lines


def _label(name: str, times: int) -> str:
    return f"{layer_of(name)} × {times}" if times > 1 else layer_of(name)


def _sends(moved: list[Moved]) -> str:
    """Collectives in words, equal ones once: "gathers input, sums and cuts input's gradient"."""
    words = Counter(f"{_VERBS[each.kind]} {each.why}" for each in moved)
    sizes = sum(each.size for each in moved)
    told = ", ".join(f"{word} × {count}" if count > 1 else word for word, count in words.items())
    return f"{told} ({in_bytes(sizes)})" if moved else ""


def _unbuilt(choice: Choice) -> list[str]:
    """What the program would do if our workers could run all of it."""
    sharding = choice.sharding
    free = Sharding(sharding.graph, sharding.line, budget=choice.memory).solve()
    if free is None or free.seconds > (1 - _TIE) * choice.seconds:
        return ["  no other way to cut single operators is cheaper in as much memory"]
    other = [
        f"{layer_of(name)} along {free[name].words}"
        for name, operator in sharding.graph.operators.items()
        if operator.kind != "share" and free[name].axis not in (None, choice[name].axis)
    ]
    saved = 1 - free.seconds / choice.seconds
    return [f"  not built, and {saved:.1%} cheaper in as much memory: {', '.join(other[:4])}"]

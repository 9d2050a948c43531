"""What is wrong with a way to spread a run, and the nearest way that is legal. No torch."""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import replace
from typing import Any

from trainwright.errors import Mistake
from trainwright.planner.candidate import DEGREES, Candidate
from trainwright.planner.rules import RULES, Rule

# How far a change of a field is, beside doubling or halving a degree, which counts 1.
_DISTANCES = {
    "zero": 0.5,
    "schedule": 1.0,
    "virtual_stages": 0.4,
    "stage_layers": 0.4,
    "recompute_by_stage": 0.6,
    "recompute_by_layer": 0.6,
    "rows_by_replica": 0.3,
    "cp_method": 0.7,
    "whole": 0.8,
    "offload": 1.0,
    "recompute": 1.0,
    "compile": 0.5,
    "optimizer": 2.0,
    "precision": 3.0,
    "dropout": 3.0,
    "neftune_alpha": 3.0,
    "router_keys": 3.0,
}
_FIELDS = (*DEGREES, "ep", *_DISTANCES, "sequence_length", "rows", "micro_batch")
_MOST_TRIED = 1000  # candidates looked at in an exact search: a tenth of a second
_GREED = 4.0  # more than any single change costs
# Fields that a user would sooner leave out than set to what stands here.
_LEFT_OUT: dict[str, Any] = {
    "zero": 0,
    "whole": (),
    "stage_layers": (),
    "recompute_by_stage": (),
    "recompute_by_layer": (),
    "rows_by_replica": (),
    "dropout": 0.0,
    "neftune_alpha": 0.0,
}
_SECTIONS = {
    "recompute": "training",
    "compile": "training",
    "precision": "training",
    "dropout": "training",
    "neftune_alpha": "training",
    "sequence_length": "data",
}


def broken_rules(candidate: Candidate) -> list[Rule]:
    """The rules that do not hold for the candidate, in the table's order."""
    return [rule for rule in RULES if not rule.holds(candidate)]


def is_legal(candidate: Candidate) -> bool:
    """Whether every rule holds."""
    return all(rule.holds(candidate) for rule in RULES)


def nearest_legal(candidate: Candidate) -> Candidate | None:
    """A legal candidate that differs from this one as little as can be; None if none is found.

    A best-first search over the changes that broken rules propose: degrees count by their ratio,
    features as `_DISTANCES` has them, and what is derived counts nothing. Where a wish is wrong in
    so many ways that this takes too long, rules still broken count as well, and the result is
    merely near.
    """
    nearest = _search(candidate, _MOST_TRIED, 0.0)
    return nearest or _search(candidate, 20 * _MOST_TRIED, _GREED)


def _search(candidate: Candidate, most: int, greed: float) -> Candidate | None:
    """The first legal one of `most` candidates, by distance and `greed` for each broken rule."""
    order = itertools.count()
    waiting = [(0.0, next(order), candidate)]
    seen = {_identity(candidate)}
    while waiting and len(seen) < most:
        _, _, nearest = heapq.heappop(waiting)
        broken = next((rule for rule in RULES if not rule.holds(nearest)), None)
        if broken is None:
            return nearest
        for change in broken.mends(nearest):
            other = nearest.changed(**change)
            identity = _identity(other)
            if identity not in seen:
                seen.add(identity)
                cost = distance(candidate, other)
                cost += greed * len(broken_rules(other)) if greed else 0.0
                heapq.heappush(waiting, (cost, next(order), other))
    return None


def legality_mistakes(candidate: Candidate) -> list[Mistake]:
    """Everything that is wrong with the candidate, each with what would make it legal.

    Each mistake tells those changes towards the nearest legal candidate that concern it; the first
    one also those that follow from them.
    """
    broken = broken_rules(candidate)
    if not broken:
        return []
    nearest = nearest_legal(candidate)
    if nearest is None:
        fix = "docs/parallelism.md says what works with what"
        return [Mistake(rule.says(candidate), fix, rule.key_of(candidate)) for rule in broken]
    changes = _changes(candidate, nearest)
    told = {key for rule in broken for key in _blamed(rule, candidate)}
    mistakes = []
    for number, rule in enumerate(broken):
        keys = _blamed(rule, candidate)
        own = {k: v for k, v in changes.items() if k in keys or (number == 0 and k not in told)}
        fix = in_words(own or changes)
        mistakes.append(Mistake(rule.says(candidate), fix + rule.hint, rule.key_of(candidate)))
    return mistakes


def beside_mistakes(candidate: Candidate) -> list[Mistake]:
    """What keeps the model beside the trained one from being spread in the same way."""
    beside = candidate.beside
    if beside is None or beside.key == "objective":  # the trained model itself
        return []
    other = replace(
        candidate,
        model=beside.config,
        native=beside.native,
        # What its plan settles by itself, and what is done in training only.
        ep=1,
        stage_layers=(),
        router_keys=(),
        adapter=None,
        dropout=0.0,
        neftune_alpha=0.0,
    )
    name = beside.key.rpartition(".")[2]
    own = {rule.name for rule in broken_rules(candidate)}
    return [
        Mistake(
            f"the {name} is spread as the model is: {rule.says(other)}",
            f"choose a {name} that the degrees divide, or other degrees: {rule.reason}",
            key=beside.key,
        )
        for rule in broken_rules(other)
        if rule.name not in own
    ]


def distance(a: Candidate, b: Candidate) -> float:
    """How far apart two candidates are; 0 where they differ in what is derived only."""
    total = 0.0
    for number, name in enumerate(_FIELDS):
        before, after = getattr(a, name), getattr(b, name)
        if before == after or name in a.derived:
            continue
        if name in _DISTANCES:
            total += _DISTANCES[name]
        elif name in ("sequence_length", "rows"):
            total += 0.3 + 2 * abs(math.log2(after / before))
        elif name == "micro_batch":
            total += 0.2 + 0.5 * abs(math.log2(after / before))
        else:
            total += abs(math.log2(after / before))
        # Of two that are equally far, the larger degree, and the outer axis.
        total += 1e-3 * (number + 1) + (0 if type(after) is int and after > before else 1e-4)
    return total


def _identity(candidate: Candidate) -> tuple[Any, ...]:
    return tuple(getattr(candidate, name) for name in _FIELDS)


def _blamed(rule: Rule, candidate: Candidate) -> set[str]:
    """Keys whose change is told with the rule."""
    keys = {*rule.concerns, rule.key_of(candidate)}
    if "training.batch_sequences" in keys:
        keys.add("training.batch_tokens")
    return keys


def _changes(before: Candidate, after: Candidate) -> dict[str, str | None]:
    """What a user would write, by key; None where a key is better left out."""
    changes: dict[str, str | None] = {}
    for name in _FIELDS:
        old, new = getattr(before, name), getattr(after, name)
        if old == new or name in before.derived:
            continue
        if name == "router_keys":
            changes |= {f"training.{key}": None for key in old if key not in new}
        elif name == "rows" and before.counts_tokens:
            changes["training.batch_tokens"] = str(new * (after.sequence_length or 1))
        elif name == "rows":
            changes["training.batch_sequences"] = str(new)
        else:
            key = (
                "optimizer.name"
                if name == "optimizer"
                else f"{_SECTIONS.get(name, 'parallel')}.{name}"
            )
            left_out = name in _LEFT_OUT and new == _LEFT_OUT[name]
            changes[key] = None if left_out else _yaml(new)
    return changes


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)).replace("'", "") if isinstance(value, tuple) else str(value)


def in_words(changes: dict[str, str | None]) -> str:
    """Changes as an instruction: "write `tp: 2` and `cp: 1`, and leave `zero` out"."""
    written = [f"`{key.rpartition('.')[2]}: {value}`" for key, value in changes.items() if value]
    dropped = [f"`{key.rpartition('.')[2]}`" for key, value in changes.items() if value is None]
    parts = []
    if written:
        parts.append(f"write {_listed(written)}")
    if dropped:
        parts.append(f"leave {_listed(dropped)} out")
    return ", and ".join(parts)


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))

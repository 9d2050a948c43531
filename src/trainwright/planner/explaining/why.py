"""Why one plan is better than another, and what would make a plan fit that does not. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainwright.errors import UserError
from trainwright.planner.cost.prediction import Prediction
from trainwright.planner.explaining.question import Question
from trainwright.planner.search.ranking import Ranked, Ranking

# Predictions that are nearer than this cannot be told apart.
NOISE = 0.03
_MOST_SHOWN = 3
_MOST_FREED = 2


@dataclass(frozen=True)
class Difference:
    """A term of the step's time and how many seconds more of it the other plan has."""

    term: str
    seconds: float


def step_terms(prediction: Prediction) -> dict[str, float]:
    """Seconds of a step by what they are for; their sum is the step."""
    return {
        "computing": prediction.compute,
        **{f"{name} traffic": seconds for name, seconds in prediction.exposed.items()},
        "waiting for other stages": prediction.idle,
        "the optimizer": prediction.optimizer,
        "what every step has": prediction.constant,
    }


def differences(best: Prediction, other: Prediction) -> list[Difference]:
    """How `other`'s time differs from `best`'s, the largest difference first."""
    one, two = step_terms(best), step_terms(other)
    every = [
        Difference(term, two.get(term, 0.0) - one.get(term, 0.0))
        for term in dict.fromkeys([*one, *two])
    ]
    return sorted((each for each in every if each.seconds), key=lambda each: -abs(each.seconds))


@dataclass(frozen=True)
class Named:
    """The plan that a recipe names, among all plans.

    `ranked` is the best plan with the recipe's layout; None where none fits, and then `nearest` is
    the one that lacks least, and `mends` are the smallest changes with which one fits. `position`
    is its place among the best, None beyond those that were looked at.
    """

    layout: Mapping[str, Any]
    ranked: Ranked | None
    nearest: Ranked | None
    position: int | None
    mends: tuple[Mend, ...] = ()


@dataclass(frozen=True)
class Mend:
    """A change of a few keys of a layout, and the best plan that it leads to."""

    changes: Mapping[str, Any]
    ranked: Ranked


def look_up(question: Question, ranking: Ranking) -> Named | None:
    """Where the recipe's own plan stands in `ranking`; None where it names none.

    Raises `UserError` where the layout is not legal.
    """
    layout = question.layout
    if not layout:
        return None
    found = question.best(1, question.named)
    if found.winner is None:
        nearest = found.near_misses[0] if found.near_misses else None
        mends = tuple(itertools.islice(_mends(question, question.named), _MOST_SHOWN))
        return Named(layout, None, nearest, None, mends)
    own = found.winner
    ahead = sum(each.score < own.score and each.plan != own.plan for each in ranking.best)
    position = ahead + 1 if ahead < len(ranking.best) else None
    return Named(layout, own, None, position)


def _mends(question: Question, layout: Mapping[str, Any]) -> Iterator[Mend]:
    """With one key left to the planner; with two, where no single one helps."""
    for size in range(1, _MOST_FREED + 1):
        found = []
        for freed in itertools.combinations(layout, size):
            kept = {name: value for name, value in layout.items() if name not in freed}
            try:
                winner = question.best(1, kept).winner
            except UserError:
                continue
            if winner is not None:
                found.append(Mend({name: _value(winner, name) for name in freed}, winner))
        if found:
            yield from sorted(found, key=lambda mend: mend.ranked.score)
            return


def _value(ranked: Ranked, name: str) -> Any:
    if name == "recompute" and ranked.plan.recompute_by_layer:
        return "by layer"
    return getattr(ranked.plan, name)

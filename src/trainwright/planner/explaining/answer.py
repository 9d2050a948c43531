"""The whole of `trainwright plan` as a function: read, search, compare. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainwright.planner.check import planning_checks
from trainwright.planner.cluster.calibration import read_calibration
from trainwright.planner.cluster.describe import Cluster
from trainwright.planner.cluster.load import load_cluster
from trainwright.planner.explaining import tables
from trainwright.planner.explaining.question import Question, ask
from trainwright.planner.explaining.ways import Way, ways_out
from trainwright.planner.explaining.what_if import WhatIf, what_if
from trainwright.planner.explaining.why import Named, look_up
from trainwright.planner.plan import Machine
from trainwright.planner.search.asked import machines_here
from trainwright.planner.search.objective import Objective
from trainwright.planner.search.ranking import Ranking
from trainwright.recipe.load import load_recipe


@dataclass(frozen=True)
class Answer:
    """The best plans, the recipe's own among them, and what changes would bring."""

    question: Question
    ranking: Ranking
    named: Named | None
    ways: tuple[Way, ...]  # where nothing fits
    changed: WhatIf | None
    seconds: float  # that it took

    def lines(self) -> list[str]:
        """All of it in words, at most 100 columns wide."""
        winner, aims = self.ranking.winner, tuple(self.question.objective.weights)
        parts = [tables.header(self.question)]
        if winner is None:
            parts.append(tables.nothing_fits_lines(self.ranking))
            parts.append(tables.ways_lines(self.ways, self.question.tokens is not None))
        else:
            parts.append(tables.ranking_lines(self.ranking, aims))
            parts += tables.step_parts(winner.prediction)
            parts.append(tables.runner_up_lines(self.ranking, aims))
        if self.named is not None:
            parts.append(tables.named_lines(self.named, self.ranking, aims))
        if self.changed is not None:
            parts.append(tables.what_if_lines(self.changed, aims))
        parts.append(tables.last_lines(self.ranking, self.seconds))
        return "\n\n".join("\n".join(part) for part in parts if part).splitlines()


def answer(
    recipe: Path,
    overrides: Sequence[str] = (),
    cluster: Path | None = None,
    *,
    top: int = 10,
    objective: str = "time",
    changes: Sequence[str] = (),
    machine: Callable[[], Machine],
) -> Answer:
    """Plan the recipe at a path for the machine described at `cluster`, or for the one at hand.

    `machine` finds out what is at hand, where that is asked for; `changes` are tried besides.
    Raises `UserError` with every mistake in the files and the changes.
    """
    began = time.perf_counter()
    aim = Objective.parse(objective)
    here: list[Machine] = []

    def asking(of_recipe: Sequence[str], of_machine: Sequence[str]) -> Question:
        loaded = load_recipe(recipe, [*overrides, *of_recipe], planning_checks)
        file = cluster or loaded.cluster
        if file is not None:
            return ask(loaded, [load_cluster(file, of_machine)], aim)
        if not here:
            here.append(machine())
        clusters: list[Cluster] = machines_here(here[0], read_calibration(here[0]))
        return ask(loaded, clusters, aim)

    question = asking((), ())
    ranking = question.best(top)
    named = look_up(question, ranking)
    nearest = ranking.near_misses[0].plan if ranking.near_misses else None
    ways = tuple(ways_out(question, nearest)) if ranking.winner is None else ()
    described = cluster is not None or question.recipe.cluster is not None
    changed = what_if(changes, asking, ranking, file=described) if changes else None
    seconds = time.perf_counter() - began
    return Answer(question, ranking, named, ways, changed, seconds)

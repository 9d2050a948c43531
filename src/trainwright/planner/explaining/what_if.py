"""What another machine or another recipe would change: `--what-if key=value`. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainwright.errors import Mistake, UserError
from trainwright.planner.cluster.schema import ClusterSection
from trainwright.planner.explaining.question import Question
from trainwright.planner.search.ranking import Ranked, Ranking

# (changes of the recipe, changes of the machine's file) to what is then asked.
Asking = Callable[[Sequence[str], Sequence[str]], Question]
_MACHINE_KEYS = frozenset(ClusterSection.model_fields) - {"name"}


@dataclass(frozen=True)
class WhatIf:
    """The best plan before and after some changes, and what has become of the one before."""

    changes: tuple[str, ...]
    before: Ranking
    after: Ranking
    kept: Ranked | None  # the plan that was best, where it still runs

    @property
    def winner_changes(self) -> bool:
        """Whether another plan is best now."""
        before, after = self.before.winner, self.after.winner
        if before is None or after is None:
            return before is not after
        return self.kept is None or self.kept.score > after.score * (1 + 1e-9)


def what_if(changes: Sequence[str], asking: Asking, before: Ranking, *, file: bool) -> WhatIf:
    """Ask again with `changes`, and compare with the ranking `before`.

    `file` says whether the machine is described in a file, whose keys can be changed. Raises
    `UserError` for keys that neither a recipe nor a machine has.
    """
    machine = [change for change in changes if is_of_machine(change)]
    if machine and not file:
        raise UserError(
            Mistake(
                f"`{machine[0]}` is of a machine's file, and none is given",
                "describe the machine (docs/cluster.md) and name the file with --cluster",
            )
        )
    question = asking([change for change in changes if not is_of_machine(change)], machine)
    return WhatIf(
        tuple(changes), before, question.best(len(before.best) or 1), _kept(question, before)
    )


def is_of_machine(change: str) -> bool:
    """Whether the key is one of `cluster.yaml`."""
    return change.partition("=")[0].strip().partition(".")[0] in _MACHINE_KEYS


_SAME = (
    "pp",
    "dp_replicate",
    "dp_shard",
    "cp",
    "tp",
    "ep",
    "zero",
    "schedule",
    "virtual_stages",
    "cp_method",
    "offload",
    "micro_batch",
    "recompute",
)


def _kept(question: Question, before: Ranking) -> Ranked | None:
    """The plan that was best, as it is now."""
    if before.winner is None:
        return None
    layout = {name: getattr(before.winner.plan, name) for name in _SAME}
    try:
        return question.best(1, layout).winner
    except UserError:
        return None

"""A plan in a line, for lists of plans. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from trainwright.planner.combinations import dimensions
from trainwright.planner.plan import Plan


def in_words(plan: Plan) -> str:
    """A plan in a line: only what is not as in one process."""
    words = [f"{axis} {getattr(plan, axis)}" for axis in dimensions(plan)]
    if plan.whole:
        words.append(f"{' and '.join(plan.whole)} whole")
    if plan.dp_shard > 1:
        words.append(f"zero {plan.zero}")
    if plan.cp > 1:
        words.append(plan.cp_method)
    if plan.pp > 1:
        words.append(plan.schedule)
        if plan.virtual_stages > 1:
            words[-1] += f" × {plan.virtual_stages}"
        if len(set(plan.stage_layers)) > 1:
            words.append(f"layers {_sum(plan.stage_layers)}")
    if plan.rows_by_replica:
        words.append(f"rows {_sum(plan.rows_by_replica)}")
    if plan.recompute != "none":
        words.append(f"recompute {plan.recompute}")
    if plan.recompute_by_layer:
        words.append("recompute by layer")
    if plan.offload != "none":
        words.append(f"offload {plan.offload}")
    return ", ".join(words) or "one process"


def _sum(numbers: Sequence[int]) -> str:
    """ "5+6+6+5", and "1+62×2+1" where many are alike."""
    parts = []
    for number, alike in itertools.groupby(numbers):
        count = len(list(alike))
        parts.append(f"{count}×{number}" if count > 3 else "+".join([str(number)] * count))
    return "+".join(parts)

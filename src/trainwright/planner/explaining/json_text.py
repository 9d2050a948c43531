"""An answer of `trainwright plan` as JSON, for other programs. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from trainwright.planner.cost.prediction import Interval
from trainwright.planner.explaining.answer import Answer
from trainwright.planner.explaining.why import step_terms
from trainwright.planner.search.ranking import Ranked, Ranking


def json_text(answer: Answer) -> str:
    """All numbers in seconds, bytes, joules, dollars and grams, of a step where nothing is said."""
    document: dict[str, Any] = {
        "recipe": answer.question.recipe.name,
        "machine": answer.question.clusters[0].name,
        "objective": dict(answer.question.objective.weights),
        "plans": [_plan(each) for each in answer.ranking.best],
        "considered": answer.ranking.considered,
        "too_large": answer.ranking.too_large,
        "predicted": answer.ranking.predicted,
    }
    if answer.named is not None:
        own = answer.named
        document["named"] = {
            "layout": dict(own.layout),
            "position": own.position,
            "plan": None if own.ranked is None else _plan(own.ranked),
            "nearest": None if own.nearest is None else _plan(own.nearest),
            "mends": [
                {"changes": dict(mend.changes), "plan": _plan(mend.ranked)} for mend in own.mends
            ],
        }
    if answer.ranking.winner is None:
        document["nearest"] = _first(answer.ranking.near_misses)
        document["ways"] = [
            {
                "change": str(way.change),
                "devices": way.devices,
                "run_seconds": way.seconds,
                "run_dollars": way.dollars,
                "plan": _plan(way.ranked),
            }
            for way in answer.ways
        ]
    if answer.changed is not None:
        changed = answer.changed
        document["what_if"] = {
            "changes": list(changed.changes),
            "winner_changes": changed.winner_changes,
            "after": _best(changed.after),
            "before_now": None if changed.kept is None else _plan(changed.kept),
        }
    return json.dumps(document, indent=2, default=list)


def _best(ranking: Ranking) -> dict[str, Any] | None:
    return _first(ranking.best)


def _first(ranked: tuple[Ranked, ...]) -> dict[str, Any] | None:
    return _plan(ranked[0]) if ranked else None


def _plan(ranked: Ranked) -> dict[str, Any]:
    p = ranked.prediction
    return {
        "plan": asdict(p.plan),
        "hash": p.plan.hash,
        "step_seconds": _interval(p.step_seconds),
        "terms": step_terms(p),
        "exposed": dict(p.exposed),
        "tokens_per_second": p.tokens_per_second,
        "mfu": p.mfu,
        "bubble": p.bubble,
        "memory_bytes": {**_interval(p.memory.total), "limit": p.memory.limit},
        "memory_lines": dict(p.memory.lines),
        "joules_per_token": p.joules_per_token,
        "dollars": p.dollars,
        "grams": p.grams,
        "goodput": ranked.goodput,
        "score": ranked.score,
        "rates": p.source,
    }


def _interval(interval: Interval) -> dict[str, float]:
    return {"low": interval.low, "value": interval.value, "high": interval.high}

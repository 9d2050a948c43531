"""Small real runs: no honest peer is given a strike in 200 rounds, and no liar does any harm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from benchmarks.swarm_liars import LIES
from tests.swarm.small_peers import DILOCO, PYTHON, TABLES, rehearse
from trainwright.recipe.swarm import Trust
from trainwright.swarm.settings import DEFAULTS, Settings

pytestmark = pytest.mark.prove


def never(round: int, index: int) -> bool:
    return False


@pytest.mark.parametrize("settings", [DILOCO, DEFAULTS["sparseloco"]], ids=lambda each: each.method)
@pytest.mark.parametrize(
    ("texts", "batches", "hot"),
    [
        pytest.param([PYTHON] * 4, (), never, id="alike"),
        pytest.param([PYTHON, PYTHON, PYTHON, TABLES], (), never, id="one unlike"),
        pytest.param([PYTHON, PYTHON, TABLES, TABLES], (), never, id="two and two"),
        pytest.param([PYTHON] * 4, (64, 64, 64, 4), never, id="few tokens"),
        pytest.param([PYTHON] * 4, (1, 1, 1, 1), never, id="all noise"),
        pytest.param([PYTHON] * 4, (512, 512, 512, 512), never, id="hardly any noise"),
        pytest.param([PYTHON] * 4, (), lambda r, i: 20 <= r < 40 and i == 3, id="one diverges"),
        pytest.param([PYTHON] * 4, (), lambda r, i: 20 <= r < 40, id="all diverge"),
    ],
)
def test_nobody_honest_is_ever_given_a_strike(
    texts: list, batches: tuple[int, ...], hot: Callable[[int, int], bool], settings: Settings
) -> None:
    many = sum(batches) > 1000
    told = rehearse(
        texts,
        60 if many else 200,
        inner_steps=5,
        batches=batches,
        hot=hot,
        settings=replace(settings, inner_steps=5),
    )
    assert told.court.struck == set(), told.court.named
    assert told.court.barred == {}


@cache
def honest_three() -> float:
    return rehearse([PYTHON] * 3, 20).loss


@pytest.mark.parametrize("lie", LIES)
def test_a_liar_does_no_harm(lie: str) -> None:
    told = rehearse([PYTHON] * 4, 20, lie=lie)
    assert told.loss < 1.02 * honest_three()
    assert told.court.struck <= {told.names[-1]}


@pytest.mark.parametrize("lie", ["flipped", "random", "zero", "stale"])
def test_it_would_without_the_ledger(lie: str) -> None:
    rules = Trust(conduct=False, scores=False, clip_to_median=False)
    assert rehearse([PYTHON] * 4, 20, lie=lie, rules=rules).loss > 1.02 * honest_three()

"""Learning rates against their definitions."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from trainwright.optim.schedules import learning_rate, warmup_steps
from trainwright.recipe.schema import Schedule


def rates(total: int = 100, peak: float = 2.0, **section) -> list[float]:
    schedule = Schedule(**section)
    return [learning_rate(step, total, peak, schedule) for step in range(total)]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_warmup_rises_in_equal_steps_to_the_peak(name):
    got = rates(name=name, warmup=10, final=0.1)
    assert got[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(got) == pytest.approx(2.0)


def test_cosine_follows_its_formula_and_ends_on_the_final_share():
    got = rates(name="cosine", warmup=0, final=0.1)
    assert got[49] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert got[24] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert got[-1] == pytest.approx(0.2)


def test_linear_falls_in_equal_steps():
    got = rates(name="linear", warmup=20, final=0.0)
    falls = {round(a - b, 9) for a, b in pairwise(got[20:])}
    assert falls == {round(2.0 / 80, 9)}
    assert got[-1] == pytest.approx(0.0)


def test_constant_stays():
    assert set(rates(name="constant", warmup=0)) == {2.0}


def test_wsd_is_flat_until_its_decay():
    got = rates(name="wsd", warmup=5, decay=0.2, final=0.0)
    assert got[5:80] == pytest.approx([2.0] * 75)
    assert got[80] < 2.0
    assert got[-1] == pytest.approx(0.0)


def test_a_warmup_below_one_is_a_share_of_the_run():
    assert warmup_steps(Schedule(warmup=0.25), 100) == 25
    assert warmup_steps(Schedule(warmup=25), 100) == 25
    assert warmup_steps(Schedule(warmup=500), 100) == 100

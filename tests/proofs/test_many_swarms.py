"""Twenty thousand simulated swarms, each with other peers, links, rules and faults."""

import pytest

from tests.swarm.scenarios import check, simulate

RUNS, BLOCK = 20_000, 200


@pytest.mark.prove
@pytest.mark.parametrize("first", range(0, RUNS, BLOCK))
def test_they_agree_and_go_on(first: int) -> None:
    for seed in range(first, first + BLOCK):
        check(simulate(seed))

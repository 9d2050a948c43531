"""The integer program against every choice there is, one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from trainwright.planner.search.program import Program, solve


def random_program(seed: int) -> Program:
    """4 to 7 nodes of 2 to 4 options, some edges, on odd seeds a budget, on every third a group."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(2, 5, draw.integers(4, 8)).tolist()
    pairs = list(itertools.combinations(range(len(sizes)), 2))
    edges = {
        (a, b): draw.choice([0.0, 1.0], (sizes[a], sizes[b])) * draw.random((sizes[a], sizes[b]))
        for a, b in pairs
        if b == a + 1 or draw.random() < 0.4
    }
    memory = [draw.random(size) for size in sizes]
    alike = []
    if seed % 3 == 0:
        nodes = draw.choice(len(sizes), 3, replace=False).tolist()
        alike.append({node: np.arange(sizes[node]) < 1 for node in nodes})
    return Program(
        costs=[1e-5 * draw.random(size) for size in sizes],
        edges={ends: 1e-5 * costs for ends, costs in edges.items()},
        memory=memory,
        budget=0.42 * len(sizes) if seed % 2 else np.inf,
        alike=alike,
    )


def every_choice(program: Program) -> Iterator[Sequence[int]]:
    """All that keep the budget and the groups."""
    for options in itertools.product(*(range(len(costs)) for costs in program.costs)):
        taken = sum(program.memory[node][option] for node, option in enumerate(options))
        groups = ([marks[options[node]] for node, marks in each.items()] for each in program.alike)
        if taken <= program.budget and all(len(set(group)) == 1 for group in groups):
            yield options


def cost(program: Program, options: Sequence[int]) -> float:
    nodes = sum(program.costs[node][option] for node, option in enumerate(options))
    return nodes + sum(each[options[a], options[b]] for (a, b), each in program.edges.items())


@pytest.mark.parametrize("seed", range(50))
def test_no_choice_is_cheaper(seed: int) -> None:
    program = random_program(seed)
    allowed = {tuple(options): cost(program, options) for options in every_choice(program)}
    found = solve(program)
    assert found is not None and found.options in allowed
    assert found.cost == pytest.approx(allowed[found.options], rel=1e-9)
    assert found.cost <= min(allowed.values()) * (1 + 1e-6)


def test_the_relaxation_alone_would_not_do() -> None:
    """Some of those programs have an optimum in halves, so that the second solve is needed."""
    relaxed = [solve(random_program(seed)).relaxed for seed in range(50)]  # type: ignore[union-attr]
    assert 5 <= sum(relaxed) <= 45


def test_what_no_choice_can_keep_is_told() -> None:
    costs = [np.array([1.0, 2.0])] * 2
    memory = [np.array([3.0, 2.0])] * 2
    found = solve(Program(costs, memory=memory, budget=4.0))
    assert found is not None and found.options == (1, 1)
    assert solve(Program(costs, memory=memory, budget=3.9)) is None
    never = {0: np.array([True, True]), 1: np.array([False, False])}
    assert solve(Program(costs, alike=[never])) is None

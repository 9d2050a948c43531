"""The integer program: one option a node, so that nodes and edges together cost least. No torch.

As Alpa has it (Zheng et al. 2022, arXiv:2201.12023, section 4.2): a node's options are binary
variables of which one is 1; an edge has a variable for each pair of its ends' options, and those of
a row or a column of its matrix sum to the option at that end. Linear relaxations of such programs
are mostly whole already (exactly so on trees), so that is solved first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

Floats = NDArray[np.float64]
_WHOLE = 1e-6  # a relaxed variable that is as near to 0 or 1 is whole


@dataclass(frozen=True)
class Program:
    """Costs of the nodes' options, and of pairs of them at the ends of an edge.

    `memory` is what each node's options take of `budget`. `alike` are groups of nodes, each with a
    mark on some of its options: within a group all choose marked ones, or none does.
    """

    costs: Sequence[Floats]
    edges: Mapping[tuple[int, int], Floats] = field(default_factory=dict)
    memory: Sequence[Floats] = ()
    budget: float = np.inf
    alike: Sequence[Mapping[int, NDArray[np.bool_]]] = ()

    def cost(self, options: Sequence[int]) -> float:
        """Of all nodes and edges, for one option a node."""
        nodes = sum(float(each[o]) for each, o in zip(self.costs, options, strict=True))
        pairs = self.edges.items()
        return nodes + sum(float(each[options[a], options[b]]) for (a, b), each in pairs)

    def taken(self, options: Sequence[int]) -> float:
        """Of the budget."""
        return sum(float(each[o]) for each, o in zip(self.memory, options, strict=False))


class Solution(NamedTuple):
    """The best options; `relaxed` says that the linear relaxation found them."""

    options: tuple[int, ...]
    cost: float
    relaxed: bool


def solve(program: Program) -> Solution | None:
    """The options that cost least within the budget, by HiGHS; None where nothing is within it."""
    matrices = _Matrices(program)
    whole = np.zeros(matrices.columns)
    for relaxed in (True, False):
        if not relaxed:
            whole[: matrices.nodes] = 1  # edges' variables follow
        result = milp(
            matrices.objective,
            integrality=whole,
            bounds=Bounds(0, 1),
            constraints=matrices.constraints,
            options={"mip_rel_gap": 1e-9},
        )
        if result.x is None:
            return None
        chosen = result.x[: matrices.nodes]
        if not relaxed or np.all(np.minimum(chosen, 1 - chosen) < _WHOLE):
            break
    options = tuple(
        int(np.argmax(chosen[start : start + len(costs)]))
        for start, costs in zip(matrices.starts, program.costs, strict=True)
    )
    return Solution(options, program.cost(options), relaxed)


class _Matrices:
    """The program as HiGHS takes it: nodes' variables first, then edges', row by row."""

    def __init__(self, program: Program) -> None:
        sizes = [len(costs) for costs in program.costs]
        self.starts = [0, *np.cumsum(sizes).tolist()][:-1]
        self.nodes = sum(sizes)
        self.columns = self.nodes + sum(each.size for each in program.edges.values())
        self.rows: list[int] = []
        self.places: list[int] = []
        self.values: list[float] = []
        self.low: list[float] = []
        self.high: list[float] = []
        costs = [*program.costs, *(each.ravel() for each in program.edges.values())]
        objective = np.concatenate(costs)
        # Scaled, since tolerances are absolute.
        self.objective = objective / (np.abs(objective).max() or 1.0)
        for start, size in zip(self.starts, sizes, strict=True):
            self._row(range(start, start + size), [1.0] * size, 1, 1)
        self._edges(program)
        for group in program.alike:
            self._alike(group)
        if program.memory and np.isfinite(program.budget):
            taken = np.concatenate(program.memory) / (program.budget or 1.0)
            self._row(range(self.nodes), taken.tolist(), -np.inf, 1.0 if program.budget else 0.0)
        shape = (len(self.low), self.columns)
        matrix = coo_array((self.values, (self.rows, self.places)), shape=shape).tocsr()
        self.constraints = LinearConstraint(matrix, self.low, self.high)

    def _row(self, places: Sequence[int], values: Sequence[float], low: float, high: float) -> None:
        self.rows += [len(self.low)] * len(places)
        self.places += places
        self.values += values
        self.low.append(low)
        self.high.append(high)

    def _edges(self, program: Program) -> None:
        place = self.nodes
        for (first, second), costs in program.edges.items():
            height, width = costs.shape
            own = np.arange(place, place + costs.size).reshape(height, width)
            place += costs.size
            ends = ((first, own), (second, own.T))
            for node, lines in ends:
                for option, line in enumerate(lines):
                    values = [*[1.0] * len(line), -1.0]
                    self._row([*line.tolist(), self.starts[node] + option], values, 0, 0)

    def _alike(self, group: Mapping[int, NDArray[np.bool_]]) -> None:
        (first, marks), *others = group.items()
        own = (self.starts[first] + np.flatnonzero(marks)).tolist()
        for node, other in others:
            theirs = (self.starts[node] + np.flatnonzero(other)).tolist()
            self._row([*own, *theirs], [1.0] * len(own) + [-1.0] * len(theirs), 0, 0)

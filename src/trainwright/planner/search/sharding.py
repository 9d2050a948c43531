"""Which way each operator is cut over a line of workers, by integer program. No torch.

An operator is cut along one of its axes, or not at all: what has that axis is cut, what has it not
is whole, and a result that was summed over it is a partial sum. Backward, a tensor's gradient has
the dual layout. Between two operators that do not agree a tensor is gathered, summed, scattered or
exchanged, both ways. Columns then rows (Megatron-LM, arXiv:1909.08053), sequence parallelism
(arXiv:2205.05198), split vocabularies and dealt-out experts are all in the space; none is known by
name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from trainwright.planner.cost.calls import Collective
from trainwright.planner.cost.kernels import Kernels
from trainwright.planner.cost.operators import Attention, Product
from trainwright.planner.search.graph import Axes, Edge, Graph, Operator
from trainwright.planner.search.program import Program, Solution, solve

WHOLE, PARTIAL = "whole", "partial sums"  # layouts beside an axis's name, along which it is cut
_BACKWARD_ATTENTION = 2.5  # of the forward pass: five products where there were two, after Dao 2022


@dataclass(frozen=True)
class Line:
    """Equal workers in a line: what they compute, send and hold. Seconds and bytes.

    `seconds` is of a collective over all of them, `states` what a worker's weights of so many
    elements cost a step outside of the line (gradients over replicas, the update), and
    `state_bytes` what it holds of each. `accumulation` is micro-batches a step, over which all
    that comes once a step is spread. `trains` is False where an adapter leaves weights as they are.
    """

    workers: int
    kernels: Kernels
    seconds: Callable[[Collective, float], float]
    precision: str = "bf16"
    element: int = 2
    accumulation: int = 1
    state_bytes: float = 16.0
    states: Callable[[float], float] = lambda elements: 0.0
    trains: bool = True


class Strategy(NamedTuple):
    """A way to cut an operator: the axis, and layouts forward and backward.

    `inputs` and `output` are the tensors'; `gradients` are those of the inputs, as they are made,
    and `wants` that of the output, as it is taken.
    """

    axis: str | None
    inputs: tuple[str, ...]
    output: str
    gradients: tuple[str, ...]
    wants: str

    @property
    def words(self) -> str:
        """Its axis, or what is done without one."""
        if self.axis is not None:
            return self.axis
        if self.output == PARTIAL:
            return PARTIAL
        return WHOLE if self.wants == WHOLE else "whole, gradient in parts"


class Moved(NamedTuple):
    """A collective of a micro-batch: what for, which, and the bytes of the whole tensor."""

    why: str
    kind: Collective
    size: float


def strategies(operator: Operator, graph: Graph, workers: int) -> list[Strategy]:
    """All ways to cut an operator over so many workers. Those of equal layouts are one."""
    found = [
        _cut(operator, graph, axis, workers)
        for axis in operator.axes
        if axis not in operator.keeps and graph.axes[axis].parts % workers == 0
    ]
    none = (WHOLE,) * len(operator.inputs)
    found.append(Strategy(None, none, WHOLE, none, WHOLE))
    if operator.output and operator.inputs:
        # All compute the same, and each passes back its part of the gradient: backward is linear.
        parts = (PARTIAL,) * len(operator.inputs)
        found.append(Strategy(None, none, WHOLE, parts, PARTIAL))
    if operator.linear:
        # Partial sums go through, and are summed later; what multiplies them gets its gradient so.
        many, rest = operator.linear, len(operator.inputs) - operator.linear
        inputs = (PARTIAL,) * many + (WHOLE,) * rest
        gradients = (WHOLE,) * many + (PARTIAL,) * rest
        found.append(Strategy(None, inputs, PARTIAL, gradients, WHOLE))
    return found


def _cut(operator: Operator, graph: Graph, axis: str, workers: int) -> Strategy:
    def layout(axes: Axes) -> str | None:
        names = (axis, *operator.alias.get(axis, ()))
        return next((n for n in names if n in axes and graph.axes[n].parts % workers == 0), None)

    inputs = [layout(axes) for axes in operator.inputs]
    output = layout(operator.output)
    return Strategy(
        axis,
        tuple(each or WHOLE for each in inputs),
        output or PARTIAL,
        tuple(each or PARTIAL for each in inputs),
        output or WHOLE,
    )


def conversion(before: str, after: str) -> Collective | None:
    """What turns one layout into another; None where each worker can do it alone."""
    if before in (after, WHOLE) or after == PARTIAL:
        return None
    if before == PARTIAL:
        return "all_reduce" if after == WHOLE else "reduce_scatter"
    return "all_gather" if after == WHOLE else "all_to_all"


class Sharding:
    """The program of a graph on a line of workers, and what its solution says.

    `allowed` restricts operators to some axes, by name; `alike` are groups of operators and an axis
    each, of which all are cut along it or none; `budget` is a worker's bytes for states.
    """

    def __init__(
        self,
        graph: Graph,
        line: Line,
        *,
        allowed: Callable[[Operator, Strategy], bool] = lambda operator, strategy: True,
        alike: Sequence[Mapping[str, Collection[str | None]]] = (),
        budget: float = np.inf,
    ) -> None:
        self.graph, self.line = graph, line
        self.names = list(graph.operators)
        self.options = {
            name: [
                each
                for each in strategies(operator, graph, line.workers)
                if allowed(operator, each)
            ]
            for name, operator in graph.operators.items()
        }
        self.alike, self.budget = [*alike], budget
        if graph.tied and "lm_head" in graph.operators:  # one matrix is cut one way
            for axis in ("vocabulary", "hidden"):
                self.alike.append({"embed_tokens": {axis}, "lm_head": {axis}})

    def solve(self) -> Choice | None:
        """The cheapest choice within the budget; None where there is none."""
        found = solve(self.program) if all(self.options.values()) else None
        return None if found is None else Choice(self, found)

    @cached_property
    def program(self) -> Program:
        """As numbers, where every operator has an option."""
        number = {name: index for index, name in enumerate(self.names)}
        return Program(
            costs=[self._nodes(name) for name in self.names],
            edges=self._edges(number),
            memory=[self._memory(name) for name in self.names],
            budget=self.budget,
            alike=[
                {
                    number[name]: np.array([each.axis in axes for each in self.options[name]])
                    for name, axes in group.items()
                }
                for group in self.alike
            ],
        )

    def _nodes(self, name: str) -> np.ndarray:
        operator = self.graph.operators[name]
        return np.array(
            [
                operator.times
                * (
                    self.compute_seconds(operator, each)
                    + sum(self._seconds(moved) for moved in self.inner(operator, each))
                )
                for each in self.options[name]
            ]
        )

    def _edges(self, number: Mapping[str, int]) -> dict[tuple[int, int], np.ndarray]:
        summed: dict[tuple[int, int], np.ndarray] = {}
        for edge in self.graph.edges:
            ends = (number[edge.producer], number[edge.consumer])
            befores, afters = self.options[edge.producer], self.options[edge.consumer]
            costs = edge.times * np.array(
                [
                    [sum(map(self._seconds, self.between(edge, a, b))) for b in afters]
                    for a in befores
                ],
                dtype=float,
            )
            summed[ends] = summed.get(ends, 0.0) + costs
        return summed

    def between(self, edge: Edge, before: Strategy, after: Strategy) -> Iterator[Moved]:
        """Collectives of a tensor and of its gradient between two operators."""
        size = self.line.element * self.graph.size(self.graph.operators[edge.producer].output)
        there = conversion(before.output, after.inputs[edge.operand])
        back = conversion(after.gradients[edge.operand], before.wants)
        if there is not None:
            yield Moved("input", there, size)
        if back is not None:
            yield Moved("input's gradient", back, size)

    def inner(self, operator: Operator, strategy: Strategy) -> Iterator[Moved]:
        """Collectives of an operator itself, a micro-batch: weights' gradients, softmax's sums."""
        if strategy.axis is not None and strategy.axis in operator.reduces:
            yield Moved("its sums", "all_reduce", operator.reduces[strategy.axis])
        # Each worker has seen some of the tokens, or has a part of the gradient.
        apart = strategy.axis is not None or strategy.wants == PARTIAL
        trained = operator.weight and self.line.trains
        if trained and strategy.axis not in operator.weight and apart:
            yield Moved("weight's gradient", "all_reduce", 4 * self.graph.size(operator.weight))

    def compute_seconds(self, operator: Operator, strategy: Strategy) -> float:
        """Of a worker's kernels for a micro-batch, and of its weights' update spread over them."""
        graph, line, axis = self.graph, self.line, strategy.axis
        if operator.kind == "share":
            return 0.0
        seconds = 0.0
        if operator.weight and operator.counted:
            elements = graph.size(operator.weight, axis, line.workers)
            seconds = line.states(elements) / line.accumulation
        if operator.kind == "product":
            rows, columns, inner, times = self.product(operator, axis)[:4]
            # Forward, of the inputs, and of the weight.
            shapes = ((rows, columns, inner), (rows, inner, columns), (columns, inner, rows))
            passes = (Product(*shape, times) for shape in shapes)
            return seconds + sum(line.kernels.product(each, line.precision) for each in passes)
        if operator.kind == "attention":
            scores = self.scores(operator, axis)
            forward = line.kernels.attention(scores, line.precision, True, True)
            return seconds + (1 + _BACKWARD_ATTENTION) * forward
        element = 4 if operator.kind == "loss" else line.element
        tensors = [*zip(operator.inputs, strategy.inputs, strict=True)]
        tensors += [(operator.output, strategy.output)] if operator.output else []
        moved = sum(graph.size(axes, layout, line.workers) for axes, layout in tensors)
        return seconds + 3 * line.kernels.elements(element * moved, 1)

    def product(self, operator: Operator, axis: str | None = None) -> Product:
        """A worker's share of a matrix product that is cut along an axis."""
        tensors = (operator.inputs[0], operator.weight, operator.output)

        def size(*having: bool) -> float:
            axes = (a for a in operator.axes if tuple(a in tensor for tensor in tensors) == having)
            return self.graph.size(tuple(axes), axis, self.line.workers)

        return Product(
            rows=size(True, False, True),
            columns=size(False, True, True),
            inner=size(True, True, False),
            times=size(True, True, True),
        )

    def scores(self, operator: Operator, axis: str | None = None) -> Attention:
        """A worker's share of attention that is cut along an axis: the most that any has."""
        scores, workers = operator.scores, self.line.workers
        assert scores is not None
        rows, heads = self.graph.axes["rows"].size, self.graph.axes["heads"].parts
        queries, keys = float(scores.length), scores.keys
        if axis == "sequence":
            queries /= workers
            if keys == scores.length / 2:  # the last tokens see nearly all, the first next to none
                keys *= 2 - 1 / workers
        elif axis is not None:
            heads /= workers  # type: ignore[assignment]
        return Attention(
            rows * heads, queries, keys, float(scores.length), scores.width, scores.value_width
        )

    def _memory(self, name: str) -> np.ndarray:
        operator, line = self.graph.operators[name], self.line
        held = []
        for strategy in self.options[name]:
            weight = self.graph.size(operator.weight, strategy.axis, line.workers)
            states = line.state_bytes * weight if operator.weight and operator.counted else 0.0
            held.append(operator.times * states)
        return np.array(held)

    def _seconds(self, moved: Moved) -> float:
        size, line = moved.size, self.line
        if moved.kind == "all_to_all":
            size /= line.workers
        seconds = line.seconds(moved.kind, size)
        return seconds / line.accumulation if moved.why == "weight's gradient" else seconds


class Choice:
    """A solution: a strategy for every operator."""

    def __init__(self, sharding: Sharding, solution: Solution) -> None:
        self.sharding, self.seconds, self.relaxed = sharding, solution.cost, solution.relaxed
        self.numbers = dict(zip(sharding.names, solution.options, strict=True))
        self.memory = sharding.program.taken(solution.options)

    def __getitem__(self, name: str) -> Strategy:
        return self.sharding.options[name][self.numbers[name]]

    def seconds_of(self, name: str) -> float:
        """All such operators and what their inputs cost to bring; over all names, `seconds`."""
        program, place = self.sharding.program, self.sharding.names.index(name)
        options = [self.numbers[each] for each in self.sharding.names]
        edges = (
            float(costs[options[first], options[second]])
            for (first, second), costs in program.edges.items()
            if second == place
        )
        return float(program.costs[place][options[place]]) + sum(edges)

    def moved(self, name: str) -> list[Moved]:
        """All collectives of one such operator: its own, and those of its inputs."""
        sharding, graph = self.sharding, self.sharding.graph
        found = list(sharding.inner(graph.operators[name], self[name]))
        for edge in graph.edges:
            if edge.consumer == name:
                found += sharding.between(edge, self[edge.producer], self[name])
        return found

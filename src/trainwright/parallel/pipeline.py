"""Pipeline parallelism: a rank's stages, worked through as the schedule says.

A stage is a function from the stream before it to the stream after it; the last one ends in the
scalar to differentiate. The schedule is data (`planner.schedules`), what travels between ranks is
in `parallel.boundaries`, and here is the loop that carries it out: forward and backward passes,
whole or split, with the graphs of the micro-batches that are under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from trainwright.parallel.boundaries import Boundaries, Crossing, Shape
from trainwright.parallel.mesh import Mesh
from trainwright.parallel.weight_gradients import WeightQueue, deferred
from trainwright.planner.plan import Plan
from trainwright.planner.schedules import Action, make_schedule, placement

# (stage, micro-batch, the stream before it or None for the first stage) to the stream after it, or
# from the last stage what is wanted of it.
StageFunction = Callable[[int, int, Tensor | None], Tensor]
ShapeOf = Callable[[int], Shape]  # of the stream of a micro-batch between stages


class Pass(NamedTuple):
    """What a backward pass needs: where the stream came in, and where the graph ends.

    An edge instead of the output: the graph need not hold the stream that has been sent on.
    """

    leaf: Tensor | None
    end: GradientEdge | None  # None where nothing before it is trained
    gradient: Tensor | None  # of the last stage's scalar: one


class Pipeline:
    """This rank's part of a pipeline. `stages` are the numbers of its stages, in their order.

    Building it is collective.
    """

    def __init__(self, plan: Plan, mesh: Mesh, device: torch.device) -> None:
        self.plan, self.mesh, self.device = plan, mesh, device
        self.rank, self.ranks = mesh.index("pp"), mesh.ranks("pp")
        self.placement = placement(plan.schedule, plan.pp, plan.virtual_stages)
        self.last_stage = len(self.placement) - 1
        self.stages = tuple(s for s, rank in enumerate(self.placement) if rank == self.rank)
        self._groups = self._groups_by_direction() if device.type == "cuda" else {}
        self._passes: dict[tuple[int, int], Pass] = {}
        self._queues: dict[tuple[int, int], WeightQueue] = {}

    @property
    def last_rank(self) -> int:
        """The rank, in the world, that has the last stage of this pipeline."""
        return self.ranks[self.placement[self.last_stage]]

    def run(
        self,
        forward: StageFunction,
        micro_batches: int,
        stream: ShapeOf,
        before_last_backward: Callable[[int], None] | None = None,
        after_weights: Callable[[int], None] | None = None,
    ) -> list[Tensor]:
        """All micro-batches forward and backward; gradients are added to the parameters'.

        `before_last_backward` is called with a stage's number before the last of its actions that
        give gradients, and `after_weights` after each W, which no hook on gradients sees. Returns
        what the last stage gave for each micro-batch, detached; an empty list on ranks without it.
        """
        actions = own_actions(self.plan, micro_batches, self.rank)
        last_turn = {action.stage: turn for turn, action in enumerate(actions)}
        boundaries = self._boundaries(map(self._awaited, actions), stream)
        results: list[Tensor] = []
        try:
            for turn, action in enumerate(actions):
                if turn == last_turn[action.stage] and before_last_backward is not None:
                    before_last_backward(action.stage)
                if action.kind == "F":
                    results += self._forward(action, forward, boundaries)
                elif action.kind == "W":
                    self._queues.pop(action[1:]).run()
                    if after_weights is not None:
                        after_weights(action.stage)
                else:
                    self._backward(action, boundaries)
            boundaries.finish()
        finally:
            self._passes.clear()
            self._queues.clear()
        return results

    @torch.no_grad()
    def run_forward(
        self, forward: StageFunction, micro_batches: int, stream: ShapeOf
    ) -> list[Tensor]:
        """All micro-batches forward only; what the last stage gave for each, where it is."""
        # A stage at a time: no rank waits for a stage that comes after another of its own.
        actions = [Action("F", stage, m) for stage in self.stages for m in range(micro_batches)]
        boundaries = self._boundaries(map(self._awaited, actions), stream)
        results: list[Tensor] = []
        for _, stage, micro_batch in actions:
            before = Crossing(False, stage - 1, micro_batch)
            output = forward(stage, micro_batch, boundaries.receive(before) if stage else None)
            if stage == self.last_stage:
                results.append(output)
            else:
                boundaries.send(Crossing(False, stage, micro_batch), output)
        boundaries.finish()
        return results

    def _forward(
        self, action: Action, forward: StageFunction, boundaries: Boundaries
    ) -> list[Tensor]:
        """A stage's forward pass; its result where it is the last."""
        _, stage, micro_batch = action
        awaited, leaf, gradient = self._awaited(action), None, None
        if awaited is not None:
            leaf = boundaries.receive(awaited).requires_grad_()
        output = forward(stage, micro_batch, leaf)
        if stage == self.last_stage:
            if output.numel() != 1:
                raise ValueError(f"the last stage gives a scalar, not {list(output.shape)}")
            gradient = torch.ones_like(output)
        else:
            boundaries.send(Crossing(False, stage, micro_batch), output)
        end = get_gradient_edge(output) if output.requires_grad else None
        self._passes[stage, micro_batch] = Pass(leaf, end, gradient)
        return [output.detach()] if stage == self.last_stage else []

    def _backward(self, action: Action, boundaries: Boundaries) -> None:
        """A stage's backward pass: whole, or (I) with the weights' gradients left for later."""
        kind, stage, micro_batch = action
        leaf, end, gradient = self._passes.pop((stage, micro_batch))
        awaited = self._awaited(action)
        if awaited is not None:
            gradient = boundaries.receive(awaited)
        if kind == "I":
            with deferred() as queue:
                _differentiate(end, gradient)
            self._queues[stage, micro_batch] = queue
        else:
            _differentiate(end, gradient)
        if leaf is not None:
            # None where the result does not depend on the stream: a micro-batch without targets.
            of_leaf = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            boundaries.send(Crossing(True, stage - 1, micro_batch), of_leaf)

    def _awaited(self, action: Action) -> Crossing | None:
        """What an action waits for from another stage."""
        kind, stage, micro_batch = action
        if kind == "F" and stage > 0:
            return Crossing(False, stage - 1, micro_batch)
        if kind in "BI" and stage < self.last_stage:
            return Crossing(True, stage, micro_batch)
        return None

    def _boundaries(self, awaited: Iterable[Crossing | None], stream: ShapeOf) -> Boundaries:
        expected = [crossing for crossing in awaited if crossing is not None]
        return Boundaries(self.ranks, self.placement, expected, stream, self._group_of, self.device)

    def _group_of(self, crossing: Crossing) -> dist.ProcessGroup:
        group = self._groups.get(crossing[:2]) or self.mesh.group("pp")
        assert group is not None
        return group

    def _groups_by_direction(self) -> dict[tuple[bool, int], dist.ProcessGroup]:
        """A group of two for every boundary and direction, for NCCL, which knows no tags."""
        groups = {}
        for boundary, (here, there) in enumerate(pairwise(self.placement)):
            for backward in (False, True):
                if here != there:
                    group = self.mesh.pair(f"pp {boundary} {backward}", here, there)
                    if group is not None:
                        groups[backward, boundary] = group
                        self._greet(group, there if backward else here, here if backward else there)
        return groups

    def _greet(self, group: dist.ProcessGroup, origin: int, destination: int) -> None:
        """Send a number from one rank to another, and so connect them.

        NCCL connects two ranks when they first talk, and keeps each waiting there for the other.
        In a schedule that would be for ever: receives are posted ahead of what they depend on.
        """
        number = torch.zeros(1, device=self.device)
        if self.rank == origin:
            work = dist.isend(number, self.ranks[destination], group)
        else:
            work = dist.irecv(number, self.ranks[origin], group)
        assert work is not None
        work.wait()


@cache
def own_actions(plan: Plan, micro_batches: int, rank: int) -> list[Action]:
    """What a rank of the pipeline does in a step."""
    return make_schedule(plan.schedule, plan.pp, plan.virtual_stages, micro_batches)[rank]


def _differentiate(end: GradientEdge | None, gradient: Tensor | None) -> None:
    if end is not None:
        torch.autograd.backward(end, gradient)


# Types that a tensor may travel in, by their place in its header; then its shape.
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)
_HEADER = 8  # numbers: the type's, how many dimensions, and those


class PipelinedCache(dict[int, Any]):
    """A generation's cache: that of each stage that is here, by its number."""


class PipelinedModel(nn.Module):
    """A pipeline called like one model, without gradients: for generation, and to ask about it.

    All ranks of the pipeline call it together, with the same arguments, and all have the result.
    """

    def __init__(self, parts: Sequence[Any], pipeline: Pipeline) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.training = parts[0].training
        self.pipeline = pipeline
        self.config, self.vocab_size = parts[0].config, parts[0].vocab_size
        self.pads_left: bool = parts[0].pads_left
        self.max_positions: int | None = parts[0].max_positions
        self.stop_token_ids: tuple[int, ...] = parts[0].stop_token_ids
        self.refill_lengths: frozenset[int] = parts[0].refill_lengths

    def new_cache(self, capacity: int = 256) -> PipelinedCache:
        """An empty cache with room for `capacity` tokens a row, for the layers that are here."""
        parts: list[Any] = list(self.parts)
        stages = zip(self.pipeline.stages, parts, strict=True)
        return PipelinedCache((stage, part.new_cache(capacity)) for stage, part in stages)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: PipelinedCache | None = None,
        **options: Any,
    ) -> Tensor:
        """As `Decoder.forward`; `head` must give one tensor, which all ranks receive."""
        pipeline, stream = self.pipeline, None
        parts: list[Any] = list(self.parts)
        for stage, part in zip(pipeline.stages, parts, strict=True):
            if stage and pipeline.placement[stage - 1] != pipeline.rank:
                stream = self._receive(pipeline.placement[stage - 1])
            if stage:
                options["hidden"] = stream
            own = None if cache is None else cache[stage]
            stream = part(input_ids, cache=own, **options)
            if stage < pipeline.last_stage and pipeline.placement[stage + 1] != pipeline.rank:
                self._send(stream, pipeline.placement[stage + 1])
        return self._share(stream)

    def _send(self, tensor: Tensor, rank: int) -> None:
        for part, tag in ((_header(tensor), 0), (tensor.contiguous(), 1)):
            work = dist.isend(part, self.pipeline.ranks[rank], self._group, tag)
            assert work is not None
            work.wait()

    def _receive(self, rank: int) -> Tensor:
        header = torch.empty(_HEADER, dtype=torch.int64, device=self.pipeline.device)
        tensor = header
        for tag in (0, 1):
            work = dist.irecv(tensor, self.pipeline.ranks[rank], self._group, tag)
            assert work is not None
            work.wait()
            if tag == 0:
                tensor = _announced(header)
        return tensor

    def _share(self, tensor: Tensor | None) -> Tensor:
        """The last stage's result, on every rank."""
        source = self.pipeline.last_rank
        here = self.pipeline.last_stage in self.pipeline.stages
        if here:
            assert tensor is not None
            result, header = tensor.contiguous(), _header(tensor)
        else:
            header = torch.empty(_HEADER, dtype=torch.int64, device=self.pipeline.device)
        dist.broadcast(header, source, self._group)
        if not here:
            result = _announced(header)
        dist.broadcast(result, source, self._group)
        return result

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return self.pipeline.mesh.group("pp")


def _header(tensor: Tensor) -> Tensor:
    """What a receiver must know before: shapes differ from token to token of a generation."""
    numbers = [_TYPES.index(tensor.dtype), tensor.dim(), *tensor.shape]
    padding = [0] * (_HEADER - len(numbers))
    return torch.tensor(numbers + padding, device=tensor.device)


def _announced(header: Tensor) -> Tensor:
    """An empty tensor as `header` describes it."""
    kind, dimensions, *shape = header.tolist()
    return torch.empty(shape[:dimensions], dtype=_TYPES[kind], device=header.device)

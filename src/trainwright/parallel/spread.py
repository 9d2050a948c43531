"""From a Plan to a model spread over the workers: the order, on one screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trainwright.models.decoder import Context, Decoder, Span
from trainwright.models.fallback import FallbackModel
from trainwright.models.pieces import Piece
from trainwright.parallel import context, own_queries
from trainwright.parallel.expert import cut_experts
from trainwright.parallel.gradients import gradient_norm, sum_partial
from trainwright.parallel.mesh import Mesh, build_mesh
from trainwright.parallel.pipeline import Pipeline, PipelinedModel
from trainwright.parallel.precision import convert_to_float8
from trainwright.parallel.recompute import recompute_block
from trainwright.parallel.replicas import ReplicaGradients
from trainwright.parallel.shard import (
    reduce_deferred,
    release,
    set_micro_batch,
    shard,
    widen_gradients,
)
from trainwright.parallel.tensor import cut_tensors
from trainwright.parallel.tied import TiedEmbedding
from trainwright.parallel.weight_gradients import defer_weight_gradients
from trainwright.parallel.world import World
from trainwright.planner.plan import Plan
from trainwright.planner.schedules import placement, splits_backward

Model = Decoder | FallbackModel
Build = Callable[[Span | None], Model]  # a model, or a stage of one, on meta


@dataclass
class SpreadModel:
    """This worker's part of a model: the stages it has, and what its gradients need.

    `parts` are modules with plain parameter names; without pipelining there is one.
    """

    parts: list[Model]
    plan: Plan
    mesh: Mesh
    stages: tuple[int, ...] = (0,)  # the number of each part
    pipeline: Pipeline | None = None
    replicas: ReplicaGradients | None = None
    tied: TiedEmbedding | None = None
    pieces: Mapping[str, Piece] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        """Whether weights are sharded, so that all workers must run the model together."""
        return self.plan.dp_shard > 1

    @property
    def alone(self) -> bool:
        """Whether this worker has the whole model and can run it by itself."""
        return not self.sharded and self.plan.pp == self.plan.tp == 1

    @property
    def context(self) -> Context | None:
        """What cuts rows over workers and lets their attention see each other's keys."""
        part = self.parts[0]
        return part.model.context if isinstance(part, Decoder) else None

    @property
    def model(self) -> Model | PipelinedModel:
        """What generates and is asked about the model: a stage alone could not."""
        if self.pipeline is None:
            return self.parts[0]
        return PipelinedModel(self.parts, self.pipeline)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter that this worker has, by name; a tied copy has its original's."""
        for part in self.parts:
            yield from part.named_parameters()

    def unique_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same without copies of tied weights: every weight of the model on one stage."""
        for part in self.parts:
            copied = isinstance(part, Decoder) and part.span.heads and not part.span.embeds
            for name, parameter in part.named_parameters():
                if not (copied and name == "model.embed_tokens.weight"):
                    yield name, parameter

    def trained_parameters(self) -> list[nn.Parameter]:
        """All that are trained, copies included."""
        return [p for _, p in self.named_parameters() if p.requires_grad]

    def train(self, mode: bool = True) -> None:
        """Set all parts to training, or to evaluation."""
        for part in self.parts:
            part.train(mode)

    @property
    def training(self) -> bool:
        """Whether the parts are set to training."""
        return self.parts[0].training

    # A step's gradients, from its beginning to their norm.

    def begin_step(self) -> None:
        """Before the first micro-batch."""
        if self.replicas is not None:
            self.replicas.begin()

    def before_backward(self, stage: int, *, last: bool) -> None:
        """Before a stage's backward pass; `last` is the last one of the step."""
        if self.sharded:
            # Deferred weight gradients are reduced when all of them are there.
            last_here = last and not defers_weight_gradients(self.plan)
            set_micro_batch(self.parts[self.stages.index(stage)], self.plan, last=last_here)
        if self.replicas is not None and last and self.pipeline is None:
            self.replicas.expect_last()

    def after_weights(self, stage: int) -> None:
        """After weight gradients that had waited have been added to a stage's."""
        if self.sharded:
            widen_gradients(self.parts[self.stages.index(stage)])

    def finish_gradients(self) -> None:
        """After the last backward pass: whole gradients, equal wherever the weights are."""
        if self.sharded:
            for part in self.parts:
                if defers_weight_gradients(self.plan):
                    set_micro_batch(part, self.plan, last=True)
                    reduce_deferred(part)
                release(part)
        if self.replicas is not None:
            self.replicas.finish()
        sum_partial(self.named_parameters(), self.pieces, self.mesh)
        if self.tied is not None:
            self.tied.sum_gradients()

    def gradient_norm(self) -> Tensor:
        """The norm of the whole model's gradients, over all axes."""
        return gradient_norm(self.unique_parameters(), self.pieces, self.mesh)


def spread(build: Build, plan: Plan, world: World, fill: Callable[[Model], None]) -> SpreadModel:
    """A stage at a time: build, float8, experts, tensors, context, recompute, compile, shard, fill.

    `build` makes a stage (None: all of the model) on meta, or a model that holds its weights
    already; `fill` writes the weights of what was on meta, each worker its own part.
    """
    mesh = build_mesh(plan, world)
    stages, spans = own_stages(plan, mesh)
    parts = [build(span) for span in spans]
    pieces: dict[str, Piece] = {}
    for stage, part in zip(stages, parts, strict=True):
        if plan.precision == "float8":
            convert_to_float8(part.blocks, world.device, cuts=plan.tp)
        if defers_weight_gradients(plan):
            # First: what else replaces a layer's forward goes around it.
            defer_weight_gradients(part)
        if isinstance(part, Decoder):
            _cut(part, plan, mesh)
            pieces.update(part.pieces)
        blocks = list(part.blocks)
        first = part.span.first if isinstance(part, Decoder) else 0
        for layer, block in enumerate(blocks, first):
            recompute_block(block, plan.layer_recompute(layer, stage))
        if plan.compile:
            for block in blocks:
                block.compile()
        if plan.dp_shard > 1:
            shard(part, blocks, plan, mesh)
        _materialise(part, plan, world, fill)
    model = SpreadModel(parts, plan, mesh, stages, pieces=pieces)
    if plan.pp > 1:
        model.pipeline = Pipeline(plan, mesh, world.device)
        model.tied = TiedEmbedding.between(parts, mesh)
    group = mesh.group("replicas")
    if group is not None and not model.sharded:
        model.replicas = ReplicaGradients(model.trained_parameters(), group)
    return model


def own_stages(plan: Plan, mesh: Mesh) -> tuple[tuple[int, ...], Sequence[Span | None]]:
    """The stages that this worker has, by number, and which part of the model each is."""
    if plan.pp == 1:
        return (0,), (None,)
    ranks = placement(plan.schedule, plan.pp, plan.virtual_stages)
    stages = tuple(s for s, rank in enumerate(ranks) if rank == mesh.index("pp"))
    return stages, [stage_span(plan, stage) for stage in stages]


def stage_span(plan: Plan, stage: int) -> Span:
    """Which layers a stage has; the first embeds, the last has the head."""
    first = sum(plan.stage_layers[:stage])
    last_stage = len(plan.stage_layers) - 1
    return Span(first, first + plan.stage_layers[stage], stage == 0, stage == last_stage)


def defers_weight_gradients(plan: Plan) -> bool:
    """Whether a pipeline runs whose schedule splits the backward pass."""
    return plan.pp > 1 and splits_backward(plan.schedule)


def whole_model(model: Model, device: torch.device) -> SpreadModel:
    """A model that this process has to itself, for evaluation and generation."""
    world = World(0, 1, device)
    plan = Plan.alone("cuda" if device.type == "cuda" else "cpu")
    return SpreadModel([model], plan, build_mesh(plan, world))


def _cut(part: Decoder, plan: Plan, mesh: Mesh) -> None:
    if plan.ep > 1:
        cut_experts(part, mesh)
    tensor_group, context_group = mesh.group("tp"), mesh.group("cp")
    if tensor_group is not None:
        stream = cut_tensors(part, tensor_group, plan.whole)
        if "attention" in plan.whole:
            own_queries.install(part, stream)
    if context_group is not None:
        context.install(part, plan.cp_method, context_group)


def _materialise(part: Model, plan: Plan, world: World, fill: Callable[[Model], None]) -> None:
    if not any(parameter.is_meta for parameter in part.parameters()):
        part.to(world.device)
        return
    # Offloaded shards rest on the host.
    device = torch.device("cpu") if plan.offload == "parameters" else world.device
    part.to_empty(device=device)
    fill(part)
    for module in part.modules():  # buffers are no shards: they stay with what is computed
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(world.device))


def force_eager() -> AbstractContextManager:
    """Run compiled blocks plainly: generation's shapes change with every token."""
    return torch.compiler.set_stance("force_eager")

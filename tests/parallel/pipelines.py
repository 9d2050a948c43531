"""Small models cut into stages, and the same in one piece: what the pipeline tests compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.models.decoder import Decoder, Span
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.models.output_head import OutputHead
from trainwright.parallel.mesh import Mesh, build_mesh
from trainwright.parallel.pipeline import Pipeline
from trainwright.parallel.spread import SpreadModel, own_stages, spread
from trainwright.parallel.weight_gradients import defer_weight_gradients
from trainwright.parallel.world import World
from trainwright.planner.plan import Plan
from trainwright.planner.schedules import splits_backward

VOCABULARY, SEQUENCE, ROWS = 37, 12, 2
TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def make_plan(
    ranks: int, schedule: str, stage_layers: Sequence[int], micro_batches: int = 4, **more: Any
) -> Plan:
    """A plan of these degrees on as many workers as they make."""
    values: dict[str, Any] = {
        "dp_replicate": 1,
        "dp_shard": 1,
        "micro_batch": ROWS,
        "accumulation": micro_batches,
        "threads": 1,
        "precision": "fp32",
        "recompute": "none",
        "compile": False,
        "device": "cpu",
        "sequence_length": SEQUENCE,
        "optimizer": "adamw",
        "pp": ranks,
        "schedule": schedule,
        "virtual_stages": len(stage_layers) // ranks,
        "stage_layers": tuple(stage_layers),
        **more,
    }
    size = ranks * values["dp_replicate"] * values["dp_shard"] * values.get("tp", 1)
    return Plan(world_size=size, **values)


def this_world() -> World:
    """This process among the ranks of a test; alone where there are none."""
    if not dist.is_initialized():
        return World(0, 1, torch.device("cpu"))
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def join(plan: Plan) -> tuple[Mesh, Pipeline]:
    """The mesh of `plan`, and this rank's pipeline in it."""
    mesh = build_mesh(plan, this_world())
    return mesh, Pipeline(plan, mesh, torch.device("cpu"))


# A model without attention, in float64: whatever differs is the pipeline's doing.


class Layer(nn.Module):
    """A residual layer whose last product has a bias."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.rise = nn.Linear(width, 2 * width, bias=False)
        self.fall = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fall(torch.tanh(self.rise(self.norm(x))))


def plain_layers(count: int) -> nn.ModuleList:
    """The same layers in every process."""
    torch.manual_seed(7)
    return nn.ModuleList(Layer() for _ in range(count)).double()


def plain_rows(micro_batches: int) -> Tensor:
    """[micro_batches, rows, width]."""
    return torch.randn(micro_batches, 3, 6, dtype=torch.float64, generator=_seeded(1))


def plain_loss(x: Tensor, micro_batch: int) -> Tensor:
    """A scalar that differs by micro-batch for the same `x`."""
    return (x.square() * (micro_batch + 1)).sum() / 10


def plain_reference(layers: int, micro_batches: int) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and gradients in one piece."""
    model, losses = plain_layers(layers), []
    for number, x in enumerate(plain_rows(micro_batches)):
        for layer in model:
            x = layer(x)
        loss = plain_loss(x, number)
        loss.backward()
        losses.append(loss.item())
    return losses, gradients(model.named_parameters())


def plain_pipeline(plan: Plan, fault: str = "") -> tuple[list[float], dict[str, np.ndarray]]:
    """The same on this rank of `plan`; `fault` is what shall go wrong on its first rank."""
    _, pipeline = join(plan)
    model, rows = plain_layers(sum(plan.stage_layers)), plain_rows(plan.accumulation)
    stages = spans(plan, model)
    if splits_backward(plan.schedule):
        defer_weight_gradients(model)

    def forward(stage: int, number: int, hidden: Tensor | None) -> Tensor:
        x = rows[number] if hidden is None else hidden
        for index, layer in enumerate(stages[stage]):
            x = layer(x)
            if fault == "layer twice" and stage == 0 and index == 0:
                x = layer(x)
        if fault == "micro-batch dropped" and number == 1:
            x = x * 0
        return plain_loss(x, number) if stage == pipeline.last_stage else x

    losses = pipeline.run(forward, plan.accumulation, lambda number: ((3, 6), torch.float64))
    own = {id(p) for stage in pipeline.stages for p in stages[stage].parameters()}
    return [loss.item() for loss in losses], gradients(
        (name, p) for name, p in model.named_parameters() if id(p) in own
    )


def spans(plan: Plan, layers: nn.ModuleList) -> list[nn.ModuleList]:
    """The layers of each stage."""
    starts = np.cumsum([0, *plan.stage_layers]).tolist()
    return [layers[a:b] for a, b in pairwise(starts)]


# The real decoder.


def tiny_decoder(span: Span | None = None, family: str = "llama", **keys: Any) -> Decoder:
    """A decoder, or a stage of it, with the weights that the whole one has for this seed."""
    vocabulary = keys.pop("vocab_size", VOCABULARY)
    hf = new_hf_config(family, {**TINY, **keys}, vocabulary)
    config = decoder_config(hf)
    torch.manual_seed(11)
    whole = Decoder(config)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(std=0.2).add_(0.1 if parameter.dim() == 1 else 0.0)
    if span is None:
        return whole
    stage = Decoder(config, span)
    weights = whole.state_dict()
    stage.load_state_dict({name: weights[name] for name in stage.state_dict()})
    return stage


def token_rows(micro_batches: int, rows: int = ROWS) -> list[dict[str, Tensor]]:
    """Micro-batches of packed documents: ids, labels, positions and segments [rows, sequence]."""
    batches = []
    for number in range(micro_batches):
        generator = _seeded(100 + number)
        ids = torch.randint(VOCABULARY, (rows, SEQUENCE + 1), generator=generator)
        border = 5 + number % 3
        segments = (torch.arange(SEQUENCE) >= border).long().expand(rows, -1)
        positions = torch.arange(SEQUENCE) - segments * border
        batches.append(
            {
                "input_ids": ids[:, :-1].contiguous(),
                "labels": ids[:, 1:].contiguous(),
                "position_ids": positions.contiguous(),
                "segment_ids": segments.contiguous(),
            }
        )
    return batches


def token_loss(batch: Mapping[str, Tensor]) -> Any:
    """The head that makes a micro-batch's loss sum."""

    def head(hidden: Tensor, output: OutputHead) -> Tensor:
        logits = output.logits(hidden)
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"
        )

    return head


def call(part: Any, batch: Mapping[str, Tensor], hidden: Tensor | None = None) -> Tensor:
    """One stage, or all, on a micro-batch."""
    return part(
        batch["input_ids"],
        position_ids=batch["position_ids"],
        segment_ids=batch["segment_ids"],
        head=token_loss(batch),
        hidden=hidden,
    )


def decoder_reference(
    micro_batches: int, precision: torch.dtype | None = None, **keys: Any
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and gradients of the decoder in one piece."""
    model, losses = tiny_decoder(**keys), []
    for batch in token_rows(micro_batches):
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss = call(model, batch)
        loss.backward()
        losses.append(loss.item())
    return losses, gradients(model.named_parameters())


def own_parts(plan: Plan, mesh: Mesh, **keys: Any) -> list[Decoder]:
    """This rank's stages of the tiny decoder."""
    return [tiny_decoder(span, **keys) for span in own_stages(plan, mesh)[1]]


def spread_decoder(plan: Plan, **keys: Any) -> SpreadModel:
    """The tiny decoder spread as `plan` says, by the way that training takes."""
    whole = tiny_decoder(**keys)
    weights = whole.state_dict()

    def build(span: Span | None) -> Decoder:
        with torch.device("meta"):
            return Decoder(whole.config, span)

    @torch.no_grad()
    def fill(part: Any) -> None:
        for name, parameter in part.named_parameters():
            value, piece = weights[name], part.pieces.get(name)
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                own = value.chunk(mesh.size(-1))[mesh.get_local_rank(-1)]
                parameter.to_local().copy_(own)
            elif piece is not None:
                parameter.copy_(value[box(piece.offsets, parameter.shape)])
            else:
                parameter.copy_(value)

    return spread(build, plan, this_world(), fill)


def box(offsets: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """Where a piece of this shape lies in the whole."""
    return tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))


def gradients(named: Any) -> dict[str, np.ndarray]:
    """Gradients by name."""
    return {name: p.grad.numpy().copy() for name, p in named if p.grad is not None}


def compare(
    results: Sequence[tuple[list[float], dict[str, np.ndarray]]],
    reference: tuple[list[float], dict[str, np.ndarray]],
    tolerance: float,
) -> None:
    """All ranks' losses and gradients against those of one piece; AssertionError with the name."""
    expected_losses, expected = reference
    (losses,) = [losses for losses, _ in results if losses]
    np.testing.assert_allclose(losses, expected_losses, rtol=tolerance)
    found = {name: gradient for _, part in results for name, gradient in part.items()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = np.linalg.norm(found[name] - gradient) / np.linalg.norm(gradient)
        assert difference <= tolerance, f"{name} differs by {difference:.1e}"


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

"""Micro-batches through a spread model: this worker's rows and columns, forward and backward.

The objective is called the same way however the model is spread: with something that is called
like a model, exactly once a micro-batch. Under pipelining that is one stage of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainwright.data.batches import Batch
from trainwright.kernels.dropout import token_keys
from trainwright.models.decoder import Decoder
from trainwright.objectives.objective import Objective, Sums, Tensors
from trainwright.parallel.activation_offload import offloaded_activations
from trainwright.parallel.precision import COMPUTE_DTYPES, autocast
from trainwright.parallel.spread import SpreadModel


def to_tensors(
    batch: Batch, start: int, stop: int, spread: SpreadModel, keys: tuple[int, int, int] | None
) -> dict[str, Tensor | None]:
    """Rows `start`…`stop` of `batch` on the device: what this worker sees of them.

    Where rows are cut over workers (context parallelism), input_ids, labels and token_keys are
    its columns; position_ids and segment_ids stay whole, for attention needs the others'. `keys`
    are (seed, step, first row of the batch in the global one) where there is dropout. Of examples
    there are also values, own_segments and ends (as columns; where sequences end) and the number
    of segments, a scalar.
    """
    device = spread.mesh.world.device

    def move(array: NDArray | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(array[start:stop]).to(device)

    tensors = {
        "input_ids": move(batch.input_ids),
        "labels": move(batch.labels),
        "position_ids": move(batch.position_ids),
        "segment_ids": move(batch.segment_ids),
        "token_keys": None,
    }
    rows, sequence = batch.input_ids[start:stop].shape
    if batch.values is not None and batch.segment_ids is not None:  # examples
        tensors["values"] = move(batch.values)
        tensors["own_segments"] = tensors["segment_ids"]
        following = np.pad(batch.segment_ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        tensors["ends"] = move((batch.segment_ids >= 0) & (batch.segment_ids != following))
        # An even number, for examples of two sequences; on the host, lest a GPU be waited for.
        most = int(batch.segment_ids[start:stop].max()) + 1
        tensors["segments"] = torch.tensor(most + most % 2)
        if batch.reference is not None:
            tensors["reference"] = move(batch.reference[:, : most + most % 2])
    if keys is not None:
        seed, step, first = keys
        numbers = torch.arange(first + start, first + start + rows, device=device)
        slots = torch.arange(sequence, device=device)
        tensors["token_keys"] = token_keys(seed, step, numbers, slots)
    context = spread.context
    if context is not None:
        columns = context.slots(sequence, device)
        for name in ("input_ids", "labels", "token_keys", "own_segments", "ends"):
            tensor = tensors.get(name)
            tensors[name] = None if tensor is None else tensor[:, columns]
    return tensors


def train_micro_batches(
    spread: SpreadModel,
    objective: Objective,
    micro_batches: Sequence[Tensors],
    scales: Mapping[str, float],
) -> list[tuple[Sums, Sums]]:
    """Forward and backward over all of them; each one's loss sums and figures, detached.

    Empty where this worker does not compute them. `scales` by weight are what the sums are
    multiplied by for the backward pass.
    """
    results: list[tuple[Sums, Sums]] = [({}, {})] * len(micro_batches)

    def forward(stage: int, number: int, hidden: Tensor | None) -> Tensor:
        part = spread.parts[spread.stages.index(stage)]
        runner = _Stage(part, hidden)
        with offloaded_activations(spread.plan.activation_offload), compute_context(spread):
            found = objective(runner, micro_batches[number])  # type: ignore[arg-type]
        if runner.stream is not None:
            return runner.stream
        sums, figures = found
        results[number] = {name: each.detach() for name, each in sums.items()}, figures
        return torch.stack([each * scales[name] for name, each in sums.items()]).sum()

    spread.begin_step()
    if spread.pipeline is None:
        for number in range(len(micro_batches)):
            spread.before_backward(0, last=number == len(micro_batches) - 1)
            forward(0, number, None).backward()
    else:
        for stage in spread.stages:
            spread.before_backward(stage, last=False)
        spread.pipeline.run(
            forward,
            len(micro_batches),
            lambda number: stream_shape(spread, micro_batches[number]),
            before_last_backward=lambda stage: spread.before_backward(stage, last=True),
            after_weights=spread.after_weights,
        )
    return results


@torch.no_grad()
def score_micro_batches(
    spread: SpreadModel,
    score: Callable[[nn.Module, Tensors], Any],
    micro_batches: Sequence[Tensors],
) -> list[Any]:
    """What `score`, an objective or the like, makes of each, without a backward pass.

    None on workers that have not the model's last stage.
    """
    results: list[Any] = [None] * len(micro_batches)
    nothing = torch.zeros((), device=spread.mesh.world.device)

    def forward(stage: int, number: int, hidden: Tensor | None) -> Tensor:
        runner = _Stage(spread.parts[spread.stages.index(stage)], hidden)
        with compute_context(spread):
            scored = score(runner, micro_batches[number])  # type: ignore[arg-type]
        if runner.stream is not None:
            return runner.stream
        results[number] = scored
        return nothing

    if spread.pipeline is None:
        for number in range(len(micro_batches)):
            forward(0, number, None)
    else:
        spread.pipeline.run_forward(
            forward, len(micro_batches), lambda number: stream_shape(spread, micro_batches[number])
        )
    return results


class _Stage:
    """One stage of the model, called by the objective as if it were all of it."""

    def __init__(self, part: Any, hidden: Tensor | None) -> None:
        self.part, self.hidden = part, hidden
        self.stream: Tensor | None = None  # what it made, where it is not the last stage

    def __call__(self, input_ids: Tensor, **options: Any) -> Any:
        if self.hidden is not None:
            options["hidden"] = self.hidden
        result = self.part(input_ids, **options)
        if not isinstance(self.part, Decoder) or self.part.span.heads:
            return result
        self.stream = result
        return result.new_zeros(())


def stream_shape(spread: SpreadModel, tensors: Tensors) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of what travels between the stages for a micro-batch."""
    input_ids, part = tensors["input_ids"], spread.parts[0]
    assert input_ids is not None and isinstance(part, Decoder)
    rows, columns = input_ids.shape
    shape = (rows, columns // spread.plan.tp, part.config.hidden_size)
    return shape, COMPUTE_DTYPES[spread.plan.precision]


def compute_context(spread: SpreadModel) -> AbstractContextManager:
    """Autocast for whole weights; sharded weights are narrowed by their own policy."""
    precision = "fp32" if spread.sharded else spread.plan.precision
    return autocast(precision, spread.mesh.world.device)


def counts_rows(spread: SpreadModel) -> bool:
    """Whether this worker speaks for its rows: the first of those that share them."""
    mesh = spread.mesh
    return mesh.index("pp") == mesh.index("cp") == mesh.index("tp") == 0


def counts_losses(spread: SpreadModel) -> bool:
    """Whether this worker's losses count: tp workers all have the same."""
    return spread.mesh.index("tp") == 0

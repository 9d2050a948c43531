"""How likely a model finds given continuations, packed into rows, with every parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
from torch import Tensor, nn

from trainwright.data.batches import IGNORED, Batch
from trainwright.data.packing import Layout, pack
from trainwright.models.decoder import Decoder
from trainwright.objectives.log_probs import SequenceScores
from trainwright.objectives.objective import Tensors
from trainwright.objectives.sequences import Columns, score_answers
from trainwright.parallel.spread import SpreadModel, force_eager
from trainwright.training.micro_batches import counts_losses, score_micro_batches, to_tensors

Continued = tuple[Sequence[int], int]  # token ids, and how many of them are the context's
Score = Callable[[nn.Module, Tensors], Tensor]  # [rows, segments, values]

_ROW_TOKENS = 512  # a row's least, where nothing else decides it
_MULTIPLE = 64


def score_continuations(
    spread: SpreadModel,
    sequences: Sequence[Continued],
    *,
    micro_batch: int,
    score: Score | None = None,
) -> list[list[float]]:
    """What `score` says of each sequence; by default Σ log p over its continuation. Collective.

    A sequence is a context of at least one token and what follows it. They are packed into rows of
    the plan's length, or of a multiple of it; each data rank scores its share of the rows.
    """
    mesh, plan = spread.mesh, spread.plan
    score = score or partial(log_prob_sums, columns=mesh.group("cp"))
    # A model of transformers' own need not keep packed sequences apart.
    packs = all(isinstance(part, Decoder) for part in spread.parts)
    unit, least = 1, 1
    if plan.sequence_length > 1:  # or else this process has the model to itself
        unit = least = plan.sequence_length
    elif packs:
        unit, least = _MULTIPLE, _ROW_TOKENS
    lengths = np.array([len(ids) for ids, _ in sequences])
    row_tokens = max(least, -(-(int(lengths.max()) - 1) // unit) * unit)
    order = np.arange(len(sequences))
    layout = pack("best-fit" if packs else "none", lengths, order, row_tokens)
    at_once = max(1, plan.stages)
    starts = range(0, layout.rows, micro_batch * mesh.size("data"))
    found: dict[int, list[float]] = {}
    training = spread.training
    spread.train(False)
    try:
        for group in range(0, len(starts), at_once):
            owned, tensors = [], []
            for start in starts[group : group + at_once]:
                first = start + mesh.index("data") * micro_batch
                rows = range(first, min(first + micro_batch, layout.rows))
                owned.append(rows)
                batch = _batch(sequences, layout, rows or range(1), row_tokens)
                tensors.append(to_tensors(batch, 0, micro_batch, spread, None))
            # As in `EvaluationHook`: on a GPU packed attention is fused only where it is compiled.
            on_cpu = mesh.world.device.type == "cpu"
            with force_eager() if on_cpu else nullcontext():
                scores = score_micro_batches(spread, score, tensors)
            for rows, values in zip(owned, scores, strict=True):
                if values is not None and counts_losses(spread):
                    found.update(_by_sequence(layout, rows, values))
    finally:
        spread.train(training)
    merged = {key: value for each in mesh.world.gather(found) for key, value in each.items()}
    return [merged[number] for number in range(len(sequences))]


def log_prob_sums(model: nn.Module, batch: Tensors, columns: Columns = None) -> Tensor:
    """Σ log p over each sequence's trained tokens, [rows, segments, 1]."""

    def sums(scores: SequenceScores) -> Tensor:
        return scores.sums.unsqueeze(-1)

    found: Tensor = score_answers(model, batch, columns, sums)
    return found


def _by_sequence(layout: Layout, rows: range, values: Tensor) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for row, of_row in zip(rows, values.tolist(), strict=False):
        runs = layout.document[layout.first_run[row] : layout.first_run[row + 1]]
        found.update(zip(runs.tolist(), of_row, strict=False))
    return found


def _batch(
    sequences: Sequence[Continued], layout: Layout, rows: Sequence[int], row_tokens: int
) -> Batch:
    """Rows of whole sequences, of which the continuations' tokens are the targets."""
    shape = (len(rows), row_tokens)
    input_ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels, segment_ids = np.full(shape, IGNORED, np.int64), np.full(shape, -1, np.int32)
    for place, row in enumerate(rows):
        begin = 0
        runs = range(layout.first_run[row], layout.first_run[row + 1])
        for segment, run in enumerate(runs):
            ids, context = sequences[layout.document[run]]
            length = int(layout.length[run])
            here = slice(begin, begin + length)
            input_ids[place, here] = ids[:length]
            position_ids[place, here] = np.arange(length)
            segment_ids[place, here] = segment
            labels[place, begin + context - 1 : begin + len(ids) - 1] = ids[context:]
            begin += length
    values = np.zeros((len(rows), 1), np.float32)
    return Batch(input_ids, labels, position_ids, segment_ids, ((),) * len(rows), values)

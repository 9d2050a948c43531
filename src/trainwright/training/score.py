"""Held-out loss of any model on any text, in this one process: what `evaluate` shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainwright.data.batches import Batches
from trainwright.data.prepare import open_data, prepare_data, prepare_held_out
from trainwright.errors import UserError
from trainwright.models.directory import resolve_model_directory
from trainwright.objectives.next_token import NextToken
from trainwright.parallel.spread import whole_model
from trainwright.recipe.schema import Source, TokenizerSection
from trainwright.training.artifacts import open_model
from trainwright.training.evaluate import HeldOutLoss, held_out_loss
from trainwright.training.run_directory import RunDirectory


def score(
    reference: str | Path,
    texts: Sequence[str] = (),
    *,
    step: int | None = None,
    sequence_length: int | None = None,
    most_rows: int | None = None,
    batch: int = 8,
) -> dict[str, HeldOutLoss]:
    """Held-out loss by data set of the model at `reference`, in fp32.

    `texts` are files, folders or globs to score; without them a run's own held-out documents are.
    Raises UserError where there is nothing to score.
    """
    sets = _data_sets(reference, texts, sequence_length)
    opened = open_model(reference, step=step)
    spread = whole_model(opened.model, next(opened.model.parameters()).device)
    return {
        name: held_out_loss(
            spread,
            NextToken(),
            batches,
            micro_batch=batch,
            most_rows=most_rows,
        )
        for name, batches in sets.items()
    }


def _data_sets(
    reference: str | Path, texts: Sequence[str], sequence_length: int | None
) -> dict[str, Batches]:
    run = RunDirectory(Path(reference))
    if texts:
        sources = [Source.model_validate(text) for text in texts]
        tokenizer = run.tokenizer if run.exists else resolve_model_directory(reference)
        if sequence_length is None:
            sequence_length = run.read_recipe().data.sequence_length if run.exists else 1024
        return prepare_held_out(sources, tokenizer, sequence_length=sequence_length)
    if not run.exists:
        raise UserError(
            f"{reference} is not a run, so it has no held-out documents of its own",
            fix="say what to score with --data",
        )
    if sequence_length is None:
        return open_data(run.path).validation
    recipe = run.read_recipe()
    data = recipe.data.model_copy(update={"sequence_length": sequence_length})
    # The tokenizer that the run has: one trained anew from today's sources may differ.
    section = TokenizerSection(path=str(run.tokenizer))
    changed = recipe.model_copy(update={"data": data, "tokenizer": section})
    return prepare_data(changed).validation

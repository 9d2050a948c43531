"""Any model opened for evaluation, in this one process, and its held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainwright.data.batches import Batches
from trainwright.data.prepare import open_data, prepare_data, prepare_held_out
from trainwright.data.tokenizers import load_tokenizer
from trainwright.errors import UserError
from trainwright.models.directory import read_hf_config, resolve_model_directory
from trainwright.models.scoring import gives_scores
from trainwright.objectives.build import build_objective
from trainwright.objectives.objective import Objective
from trainwright.parallel.spread import SpreadModel, whole_model
from trainwright.recipe import schema
from trainwright.training.artifacts import complete_step, load_model, load_run_model
from trainwright.training.assemble import what_is_optimised
from trainwright.training.evaluate import HeldOutLoss, held_out_loss
from trainwright.training.reference import Reference
from trainwright.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, in fp32: what it is scored by, and its tokenizer's directory."""

    name: str
    spread: SpreadModel
    directory: Path
    section: schema.Objective
    objective: Objective
    reference: Reference | None = None
    run: RunDirectory | None = None
    step: int | None = None

    @property
    def writes(self) -> bool:
        """Whether it is a language model, and no reward model."""
        return not self.section.gives_scores

    def load_tokenizer(self) -> Any:
        """The tokenizer, which imports transformers."""
        return load_tokenizer(self.directory)


def open_subject(reference: str | Path, *, step: int | None = None) -> Subject:
    """The model at `reference`: a run (its newest step, or `step`), a directory in Hugging Face's
    layout, or a hub id.

    A run is scored by what it optimises, with its reference model or teacher where it has one; any
    other model by its next tokens, or a reward model by the pairs that it ranks right.
    """
    run = RunDirectory(Path(reference))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not run.exists:
        directory = resolve_model_directory(reference)
        kind = "reward" if gives_scores(read_hf_config(directory)) else "next_token"
        section = schema.Objective.model_validate(kind)
        spread = whole_model(load_model(reference, step=step, device=device), device)
        return Subject(str(reference), spread, directory, section, build_objective(section))
    recipe, step = run.read_recipe(), complete_step(run, step)
    model = load_run_model(
        run,
        step,
        dtype=torch.float32,
        device=device,
        keep_originals=recipe.objective.needs_reference,
    )
    spread = whole_model(model, device)
    objective, compared = what_is_optimised(run, recipe, spread.plan, spread.mesh.world, spread)
    return Subject(
        f"{reference}, step {step}",
        spread,
        run.tokenizer,
        recipe.objective,
        objective,
        compared,
        run,
        step,
    )


def score(
    subject: Subject,
    texts: Sequence[str] = (),
    *,
    sequence_length: int | None = None,
    most_rows: int | None = None,
    batch: int = 8,
) -> dict[str, HeldOutLoss]:
    """Held-out loss by data set, several sources of one also apart (as `set/source`).

    `texts` are files, folders or globs to score, with examples where the model's run learnt from
    examples, pairs for a reward model; without them a run's own held-out documents are. Raises
    UserError where there is nothing to score.
    """
    results: dict[str, HeldOutLoss] = {}
    for name, batches in _data_sets(subject, texts, sequence_length).items():
        whole = held_out_loss(
            subject.spread,
            subject.objective,
            batches,
            micro_batch=batch,
            most_rows=most_rows,
            reference=subject.reference,
        )
        results.update(whole.named(name))
    return results


def _data_sets(
    subject: Subject, texts: Sequence[str], sequence_length: int | None
) -> dict[str, Batches]:
    run = subject.run
    if texts:
        sources = [schema.Source.model_validate(text) for text in texts]
        if sequence_length is None:
            sequence_length = 1024 if run is None else run.read_recipe().data.sequence_length
        examples = subject.section if subject.section.kind != "next_token" else None
        return prepare_held_out(
            sources, subject.directory, sequence_length=sequence_length, objective=examples
        )
    if run is None:
        raise UserError(
            f"{subject.name} is not a run, so it has no held-out documents of its own",
            fix="say what to score with --data, or ask it something with --task or --harness",
        )
    if sequence_length is None:
        return open_data(run.path).validation
    recipe = run.read_recipe()
    data = recipe.data.model_copy(update={"sequence_length": sequence_length})
    # The tokenizer that the run has: one trained anew from today's sources may differ.
    section = schema.TokenizerSection(path=str(run.tokenizer))
    changed = recipe.model_copy(update={"data": data, "tokenizer": section})
    return prepare_data(changed).validation

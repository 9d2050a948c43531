"""Small fine-tuning runs for tests: models in directories, files of rows, runs in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.training.runs import SHAPE, assemble_here
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.models.weights import initialise, new_model, save_model
from trainwright.recipe.schema import Recipe
from trainwright.training.loop import Trainer
from trainwright.training.run_directory import RunDirectory, default_run_directory

THIN = {**SHAPE, "max_position_embeddings": 256}
WIDE = {**THIN, "hidden_size": 48, "num_hidden_layers": 3}


def saved(folder: Path, shape: dict[str, Any], seed: int, vocabulary: int = 260) -> Path:
    """A model of that shape in a directory, with a tokenizer of one token a byte."""
    from trainwright.data.tokenizers import byte_tokenizer

    folder.mkdir()
    model = new_model(decoder_config(new_hf_config("llama", shape, vocabulary)))
    initialise(model, seed)
    save_model(model, folder)
    byte_tokenizer().save_pretrained(str(folder))
    return folder


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe_of(folder: Path, base: Path, *sources: Path, **sections: Any) -> Recipe:
    """A recipe that tunes the model in `base` in a moment; `sections` are merged over its own."""
    values: dict[str, Any] = {
        "name": "tuned",
        "run_directory": str(folder / "run"),
        "model": {"path": str(base)},
        "objective": "sft",
        "data": {
            "sources": [str(source) for source in sources],
            "validation": 0.1,
            "sequence_length": 128,
            "cache": str(folder / "cache"),
        },
        "training": {"steps": 6, "batch_sequences": 4, "precision": "fp32", "compile": False},
        "optimizer": {"learning_rate": 1e-2},
        "parallel": {"workers": 1, "threads": 1},  # tests share a few cores
        "checkpoint": {"every": 3},
        "export": {"at_end": False},
    }
    for key, value in sections.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return Recipe.model_validate(values)


class AskToStop:
    """Asks for the end after so many steps, as Ctrl-C does."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self.trainer, self.steps = trainer, steps

    def after_step(self, done: int, stats: Any, seconds: float, last: bool) -> None:
        self.trainer.stop_requested = done == self.steps - 1


def train(recipe: Recipe, steps: int | None = None) -> RunDirectory:
    """Train in this process; be asked to stop after `steps`."""
    made = assemble_here(recipe)
    if steps is not None:
        made.trainer.hooks = [*made.trainer.hooks, AskToStop(made.trainer, steps)]
    made.close(made.trainer.run())
    return RunDirectory(default_run_directory(recipe))


def records(run: RunDirectory, kind: str) -> list[dict[str, Any]]:
    """What a run has written of a kind: "step", "evaluation", …"""
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    return [each for each in map(json.loads, lines) if each["kind"] == kind]

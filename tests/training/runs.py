"""Small runs for the tests of the loop: texts, recipes, and training in a pool of workers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainwright.parallel.world import World
from trainwright.recipe.load import dump_recipe
from trainwright.recipe.schema import Recipe
from trainwright.training.assemble import Assembled, assemble
from trainwright.training.prepare import prepare_run
from trainwright.training.run_directory import RunDirectory, default_run_directory, open_run

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "one",
    "red",
    "ball",
    "near",
    "an",
    "old",
    "tree",
    "while",
    "it",
    "rained",
]


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def write_texts(folder: Path, documents: int = 60) -> Path:
    """A JSONL of documents of very different lengths, the same every time."""
    rng = random.Random(7)
    lines = []
    for _ in range(documents):
        words = " ".join(rng.choice(WORDS) for _ in range(rng.choice([2, 5, 11, 30, 80])))
        lines.append(f'{{"text": "{words}"}}')
    file = folder / "texts.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def small_recipe(folder: Path, **sections: Any) -> Recipe:
    """A recipe that trains in a second; `sections` are merged over its own."""
    values: dict[str, Any] = {
        "name": "small",
        "run_directory": str(folder / "run"),
        "model": {"family": "llama", "config": SHAPE},
        "tokenizer": {"path": "bytes"},
        "data": {
            "sources": [str(folder / "texts.jsonl")],
            "validation": 0.1,
            "sequence_length": 64,
            "packing": "none",
            "cache": str(folder / "cache"),
        },
        "training": {"steps": 20, "batch_sequences": 8, "precision": "fp32", "compile": False},
        "optimizer": {"learning_rate": 3e-3},
        "parallel": {"workers": 1, "micro_batch": 8},
        "evaluation": {"every": 1000},
        "checkpoint": {"every": 1000},
        "export": {"at_end": False},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    if not (folder / "texts.jsonl").exists():
        write_texts(folder)
    return Recipe.model_validate(values)


def write_recipe(folder: Path, **sections: Any) -> Path:
    """`small_recipe` as a file."""
    file = folder / "recipe.yaml"
    file.write_text(dump_recipe(small_recipe(folder, **sections)))
    return file


def this_world() -> World:
    """The world of this process: of its process group, or alone."""
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    return World(0, 1, torch.device("cpu"))


def assemble_here(recipe: Recipe) -> Assembled:
    """Prepare the recipe's run and assemble this worker's part of it."""
    world = this_world()
    if world.is_first:
        prepare_run(open_run(recipe), recipe, None, lambda message: None)
    world.gather(None)
    return assemble(RunDirectory(default_run_directory(recipe)), world)


class Recorder:
    """A hook that keeps what every step reported."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.hashes: list[str] = []

    def after_step(self, done: int, stats: Any, seconds: float, last: bool) -> None:
        self.losses.append(stats.loss)
        self.norms.append(stats.gradient_norm)
        self.hashes.append(stats.batch_hash)


def train_here(recipe: Recipe) -> Recorder:
    """Train the recipe on the workers of this process group; what its steps reported."""
    assembled = assemble_here(recipe)
    recorder = Recorder()
    assembled.trainer.hooks = [recorder, *assembled.trainer.hooks]
    assembled.close(assembled.trainer.run())
    return recorder

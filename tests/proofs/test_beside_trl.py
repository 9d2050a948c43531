"""Thirty steps of SFT and DPO beside TRL's trainers: the same model, the same rows, equal losses.

Both read one file and tokenise, mask, collate and train by themselves; TRL is only given the rows
in our order, since shuffles differ.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import assemble_here, train_here
from tests.workers import run_on
from trainwright.recipe.schema import Recipe

pytestmark = [pytest.mark.prove, pytest.mark.shared]

STEPS, ROWS, RATE = 30, 8, 3e-4
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n{input}\n### Response:\n"
)


def write_rows(shared: Path, folder: Path, kind: str) -> list[dict[str, str]]:
    """The instructions of a real file as prompts and answers, plain text; written to rows.jsonl."""
    name = {
        "sft": "instruct/rasbt_instruction_data.json",
        "dpo": "preference/rasbt_instruction_with_preference.json",
    }[kind]
    rows = []
    for row in json.loads((shared / name).read_text()):
        answers = {key: row[key] for key in ("chosen", "rejected") if key in row}
        rows.append({"prompt": ALPACA.format(**row), **(answers or {"completion": row["output"]})})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def recipe_of(shared: Path, folder: Path, kind: str, **sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "beside",
        "run_directory": str(folder / "run"),
        "model": {"path": str(shared / "weights" / "stories260K_hf")},
        "objective": kind,
        "data": {
            "sources": [str(folder / "rows.jsonl")],
            "sequence_length": 512,
            "packing": "none",
            "too_long": "drop",
            "cache": str(folder / "cache"),
        },
        "training": {
            "steps": STEPS, "batch_sequences": ROWS, "precision": "fp32", "compile": False,
        },
        "optimizer": {"learning_rate": RATE, "weight_decay": 0.0, "betas": (0.9, 0.999)},
        "schedule": {"name": "constant", "warmup": 0},
        "evaluation": {"every": 1000},
        "checkpoint": {"every": 1000},
        "export": {"at_end": False},
        "parallel": {"workers": 1},
    }  # fmt: skip
    for key, value in sections.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return Recipe.model_validate(values)


def their_losses(kind: str, shared: Path, rows: list[dict[str, str]], folder: Path) -> list[float]:
    """Losses of TRL's trainer on `rows` in this order."""
    pytest.importorskip("trl")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    base = shared / "weights" / "stories260K_hf"
    config, trainer = {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer)}[kind]
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    tokenizer.pad_token = tokenizer.unk_token
    settings = config(
        output_dir=str(folder / "trl"),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_length=512,
        bf16=False,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    data = Dataset.from_list(rows)
    running = trainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    running.train()
    return [each["loss"] for each in running.state.log_history if "loss" in each]


def rows_as_taken(recipe: Recipe, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows in the order in which the recipe's steps take them."""
    data = assemble_here(recipe).trainer.data
    taken = []
    for step in range(STEPS):
        for (name,) in data.batch(step, slice(0, ROWS)).documents:
            place = re.fullmatch(r"rows\.jsonl:(\d+)", name)
            assert place is not None, name
            taken.append(rows[int(place[1]) - 1])
    return taken


SPREAD: dict[str, tuple[int, dict[str, Any]]] = {
    "accumulated": (1, {"micro_batch": 2}),
    "data parallel": (2, {"workers": 2, "dp_shard": 1, "micro_batch": 2}),
    "sharded": (2, {"workers": 2, "dp_shard": 2}),
}


def losses_of(shared: str, folder: str, kind: str, parallel: dict[str, Any]) -> list[float]:
    name = "-".join(map(str, parallel.values()))
    sections = {"parallel": parallel, "run_directory": f"{folder}/{name}"}
    return train_here(recipe_of(Path(shared), Path(folder), kind, **sections)).losses


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_thirty_steps_are_trls_however_they_are_spread(
    kind: str, shared: Path, tmp_path: Path
) -> None:
    rows = write_rows(shared, tmp_path, kind)
    recipe = recipe_of(shared, tmp_path, kind)
    taken = rows_as_taken(recipe, rows)
    assert len({json.dumps(row) for row in taken}) > ROWS * STEPS * 0.9
    ours = train_here(recipe).losses
    theirs = their_losses(kind, shared, taken, tmp_path)
    assert len(ours) == len(theirs) == STEPS
    print(kind, "furthest from TRL:", max(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours[-1] < ours[0]
    for name, (workers, parallel) in SPREAD.items():
        spread, *_ = run_on(workers, losses_of, str(shared), str(tmp_path), kind, parallel)
        assert spread == pytest.approx(ours, rel=1e-5), name

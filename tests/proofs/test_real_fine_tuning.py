"""Fine-tuning on real files: each trains or is refused by name; QLoRA of a real model learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import assemble_here, train_here
from trainwright.errors import UserError
from trainwright.recipe.schema import Recipe
from trainwright.training.artifacts import open_model
from trainwright.training.exporting import export_run
from trainwright.training.run_directory import RunDirectory

pytestmark = [pytest.mark.prove, pytest.mark.shared]


def recipe_of(shared: Path, folder: Path, source: Any, **sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "real",
        "run_directory": str(folder / "run"),
        "model": {"path": str(shared / "weights" / "stories260K_hf")},
        "tokenizer": {
            "path": str(shared / "weights" / "stories260K_hf"),
            "chat_template": "qwen",  # it writes tools and reasoning
        },
        "objective": "sft",
        "data": {"sources": [source], "sequence_length": 512, "cache": str(folder / "cache")},
        "training": {
            "steps": 2,
            "batch_sequences": 4,
            "precision": "fp32",
            "compile": False,
        },
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.0},
        "parallel": {"workers": 1, "micro_batch": 4},
        "evaluation": {"every": 1000, "rows": 4},
        "checkpoint": {"every": 1000},
        "export": {"at_end": False},
    }
    for key, value in sections.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return Recipe.model_validate(values)


# The objective that fits the file, and how many of its rows are refused.
FILES: dict[str, tuple[str, int]] = {
    "instruct/axolotl_alpaca.json": ("sft", 0),
    "instruct/axolotl_conversation.json": ("sft", 0),
    "instruct/axolotl_conversation_missingturns.json": ("sft", 1),  # all that it has
    "instruct/fastchat_dummy_conversation.json": ("sft", 0),
    "instruct/lf_alpaca_en_demo.json": ("sft", 0),
    "instruct/lf_dataset_info.json": ("sft", 1),  # a list of datasets
    "instruct/lf_glaive_toolcall_en_demo.json": ("sft", 0),
    "instruct/lf_reason_tool_use_demo_50.jsonl": ("sft", 0),
    "instruct/lf_v1_sft_demo.jsonl": ("sft", 0),
    "instruct/oasst_en_100_tree.jsonl": ("sft", 0),
    "instruct/rasbt_instruction_data.json": ("sft", 0),
    "instruct/self_instruct_seed_tasks.jsonl": ("sft", 0),
    "preference/hh_rlhf_harmless_base_test.jsonl.gz": ("dpo", 13),  # of 2,312
    "preference/lf_dpo_en_demo.json": ("dpo", 0),
    "preference/lf_kto_en_demo.json": ("kto", 0),
    "preference/rasbt_instruction_with_preference.json": ("dpo", 0),
}
WHOLLY_REFUSED = {name for name in FILES if "missingturns" in name or "dataset_info" in name}


def test_every_file_is_known_here(shared: Path) -> None:
    found = {
        f"{folder}/{file.name}"
        for folder in ("instruct", "preference")
        for file in (shared / folder).iterdir()
    }
    assert found == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_file_trains_or_is_refused_by_name(name: str, shared: Path, tmp_path: Path) -> None:
    kind, refused = FILES[name]
    few = name in ("instruct/axolotl_alpaca.json", "instruct/axolotl_conversation.json")
    data: dict[str, Any] = {"validation": 0} if few else {}
    if refused:
        with pytest.raises(UserError) as error:
            train_here(recipe_of(shared, tmp_path, str(shared / name), objective=kind))
        places = [mistake.where for mistake in error.value.mistakes if mistake.where]
        assert len(places) == refused
        assert all(Path(name).name in place for place in places)
        assert all(mistake.fix for mistake in error.value.mistakes)
        if name in WHOLLY_REFUSED:
            return
        data["bad_rows"] = "drop"
    losses = train_here(
        recipe_of(shared, tmp_path, str(shared / name), objective=kind, data=data)
    ).losses
    assert len(losses) == 2 and all(0 < loss < 12 for loss in losses)


def held_out_loss(model: Any, run: RunDirectory) -> float:
    """Mean cross entropy of the run's held-out answers, by transformers' kind of model."""
    from trainwright.data.opening import open_data

    [data] = open_data(run.path).validation.values()
    total, targets = 0.0, 0
    with torch.no_grad():
        for row in range(data.rows):
            batch = data.read(range(row, row + 1))
            ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
            logits = model(input_ids=ids).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
            total, targets = total + loss.item(), targets + batch.weight
    return total / targets


def test_qlora_of_a_real_model_falls_below_its_start(shared: Path, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = shared / "weights" / "stories260K_hf"
    recipe = recipe_of(
        shared, tmp_path, str(shared / "instruct" / "rasbt_instruction_data.json"),
        adapter={"rank": 16, "quantise": "nf4"},
        training={"steps": 60, "batch_sequences": 16},
        data={"packing": "none"},
        parallel={"workers": 1, "micro_batch": 16},
    )  # fmt: skip
    made = assemble_here(recipe)
    made.close(made.trainer.run())
    run = RunDirectory(tmp_path / "run")
    export_run(run, tmp_path / "adapter")

    whole = transformers.AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    start = held_out_loss(whole, run)
    tuned = peft.PeftModel.from_pretrained(whole, str(tmp_path / "adapter"))
    end = held_out_loss(tuned, run)
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    [*_, measured] = [record for record in map(json.loads, lines) if record["kind"] == "evaluation"]
    print("full precision before:", start, "quantised after:", measured["loss"], "in PEFT:", end)
    assert measured["loss"] < start - 0.5
    assert end < start - 0.5
    # On a base of bitsandbytes' 4 bits the adapter in PEFT is what was trained, to rounding.
    with torch.no_grad():
        for layer in tuned.modules():
            if isinstance(layer, peft.tuners.lora.Linear):
                weight = layer.base_layer.weight
                weight.copy_(four_bits(weight))
        ids = torch.arange(3, 60)[None]
        ours = open_model(run.path).model(ids)
        torch.testing.assert_close(ours, tuned(ids).logits, rtol=1e-4, atol=1e-4)


def four_bits(weight: torch.Tensor) -> torch.Tensor:
    """What is left of a weight in NF4 with double quantisation, by bitsandbytes."""
    functional = pytest.importorskip("bitsandbytes").functional
    rows = weight.reshape(-1, 64)  # its blocks go through the flat weight
    packed, state = functional.quantize_4bit(rows, quant_type="nf4", compress_statistics=True)
    return functional.dequantize_4bit(packed, state).reshape(weight.shape)

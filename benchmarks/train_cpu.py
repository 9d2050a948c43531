"""Training speed and memory on a CPU, beside Hugging Face's Trainer: same model, same batches.

A 42.5 M Llama (hidden 512, 8 layers, ffn 1408, vocabulary 16,384), sequence 512, batch 8, bf16
autocast, fused AdamW, one process with all cores. Each side runs in a process of its own, in
turns; the first steps (warm-up, compiling) are not counted.

    python benchmarks/train_cpu.py [--steps 12] [--rounds 2]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from itertools import pairwise
from pathlib import Path

SHAPE = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
SEQUENCE, BATCH, UNCOUNTED = 512, 8, 4


def recipe(folder: Path, steps: int, compile_blocks: bool) -> dict:
    """The recipe that both sides take their data from."""
    return {
        "name": "bench",
        "run_directory": str(folder / "run"),
        "model": {"family": "llama", "config": SHAPE},
        "tokenizer": {"train": {"vocab_size": 16384}},
        "data": {"sources": ["python-stdlib"], "sequence_length": SEQUENCE},
        "training": {"steps": steps, "batch_sequences": BATCH, "compile": compile_blocks},
        "optimizer": {"learning_rate": 3e-4},
        "checkpoint": {"every": 10**6},
        "evaluation": {"every": 10**6, "rows": 8},
        "parallel": {"workers": 1, "micro_batch": BATCH},
        "export": {"at_end": False},
    }


def run_trainwright(folder: Path, steps: int, compile_blocks: bool) -> dict:
    """Train through the launcher and read the run's own records."""
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe(folder, steps, compile_blocks)))
    import trainwright
    from trainwright.training.metrics import read_metrics

    trainwright.train(file)
    records = [r for r in read_metrics(folder / "run") if r["kind"] == "step"]
    times = [b["time"] - a["time"] for a, b in pairwise(records)]
    return {
        "tokens_per_second": BATCH * SEQUENCE / statistics.median(times[UNCOUNTED:]),
        "memory": max(r["memory_bytes"] for r in records),
        "losses": [r["loss"] for r in records],
    }


def run_hugging_face(folder: Path, steps: int) -> dict:
    """The same rows through transformers' Trainer, with its own defaults otherwise."""
    import resource
    import time

    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from trainwright.data.prepare import prepare_data
    from trainwright.recipe.schema import Recipe

    data = prepare_data(Recipe(**recipe(folder, steps, False)), directory=folder)
    rows = []
    for step in range(steps):
        batch = data.train.batch(step)
        rows += [{"input_ids": row, "labels": row} for row in torch.from_numpy(batch.input_ids)]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            times.append(time.time())

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2, use_cache=False)
    arguments = TrainingArguments(
        output_dir=str(folder / "hf"),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        bf16=True,
        use_cpu=True,
        optim="adamw_torch_fused",
        learning_rate=3e-4,
        weight_decay=0.1,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=rows, callbacks=[Clock()])
    trainer.train()
    gaps = [b - a for a, b in pairwise(times)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "tokens_per_second": BATCH * SEQUENCE / statistics.median(gaps[UNCOUNTED:]),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": losses,
    }


SIDES = ("transformers Trainer", "trainwright", "trainwright, compiled")


def run_side(side: str, steps: int) -> dict:
    """One side in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--side", side, "--steps", str(steps)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run(
            [*command, "--folder", folder], check=True, env=environment, stdout=subprocess.DEVNULL
        )
        return json.loads((Path(folder) / "result.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.side:
        if options.side == SIDES[0]:
            result = run_hugging_face(options.folder, options.steps)
        else:
            result = run_trainwright(options.folder, options.steps, options.side == SIDES[2])
        (options.folder / "result.json").write_text(json.dumps(result))
        return
    results: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            results[side].append(run_side(side, options.steps))
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print(f"{'':24}{'tokens/s':>10}{'ratio':>8}{'peak MB':>10}{'loss':>18}")
    base = statistics.median(r["tokens_per_second"] for r in results[SIDES[0]])
    for side, runs in results.items():
        rate = statistics.median(r["tokens_per_second"] for r in runs)
        memory = max(r["memory"] for r in runs) / 1e6
        losses = runs[0]["losses"]
        span = f"{losses[0]:.3f} → {losses[-1]:.3f}"
        print(f"{side:24}{rate:10,.0f}{rate / base:8.2f}{memory:10,.0f}{span:>18}")


if __name__ == "__main__":
    main()

"""A model that lacks 40 % of the memory it needs, trained within what there is: peak and speed.

A narrow, deep Llama of 11 M parameters on long micro-batches, so that activations are most of what
is held, in bf16 on the CPU. First it trains as it likes, and the most resident memory that its
worker has is measured. Then a machine is supposed that has 60 % of that, and `recompute: auto` is
planned for it. That plan trains, and so does the model with all and with a part of every layer
recomputed, each in a process of its own, in turns. A first step is not counted.

    python benchmarks/recompute.py [--steps 3] [--rounds 2] [--share 0.6] [--rows 32]
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
from collections import Counter
from dataclasses import replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 24,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
}
SEQUENCE, UNCOUNTED = 512, 1
MOST_SLOWDOWN = 1.25


def recipe(folder: Path, rows: int, steps: int, by_layer: list[str] | str) -> dict[str, Any]:
    """The recipe of a side: a policy for each layer, or one for all of them."""
    parallel = {"workers": 1, "micro_batch": rows}
    if not isinstance(by_layer, str):
        parallel["recompute_by_layer"] = by_layer
    return {
        "name": "recompute",
        "run_directory": str(folder / "run"),
        "model": {"family": "llama", "config": SHAPE},
        "tokenizer": "bytes",
        "data": {"sources": ["python-stdlib"], "sequence_length": SEQUENCE},
        "training": {
            "steps": steps,
            "batch_sequences": rows,
            "compile": False,
            "recompute": by_layer if isinstance(by_layer, str) else "none",
        },
        "checkpoint": {"every": 10**6},
        "evaluation": {"every": 10**6, "rows": 1},
        "parallel": parallel,
        "export": {"at_end": False},
    }


def train(folder: Path, rows: int, steps: int, by_layer: list[str] | str) -> dict[str, Any]:
    """Seconds of each counted step and the worker's peak, by the run's own records."""
    import trainwright
    from trainwright.training.metrics import read_metrics

    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe(folder, rows, steps, by_layer)))
    trainwright.train(file)
    records = [record for record in read_metrics(folder / "run") if record["kind"] == "step"]
    seconds = [after["time"] - before["time"] for before, after in pairwise(records)]
    return {
        "seconds": seconds[UNCOUNTED - 1 :],
        "memory": max(record["memory_bytes"] for record in records),
        "loss": records[-1]["loss"],
    }


def in_a_process(rows: int, steps: int, by_layer: list[str] | str) -> dict[str, Any]:
    """`train`, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        question = json.dumps([folder, rows, steps, by_layer])
        subprocess.run(
            [sys.executable, __file__, "--side", question], check=True, stdout=subprocess.DEVNULL
        )
        return json.loads((Path(folder) / "result.json").read_text())


def planned(rows: int, memory: float) -> list[str]:
    """What `recompute: auto` has each layer do on this machine, if it had `memory` bytes."""
    from trainwright.planner.make import make_plan
    from trainwright.recipe.schema import Recipe
    from trainwright.training.machine import detect_machine

    machine = replace(detect_machine(), memory_bytes=int(memory), free_bytes=int(memory))
    plan = make_plan(Recipe.model_validate(recipe(Path(), rows, 1, "auto")), machine)
    layers = range(SHAPE["num_hidden_layers"])
    return [str(plan.layer_recompute(layer)) for layer in layers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--side")
    options = parser.parse_args()
    if options.side:
        folder, *question = json.loads(options.side)
        (Path(folder) / "result.json").write_text(json.dumps(train(Path(folder), *question)))
        return
    rows, steps = options.rows, options.steps + UNCOUNTED
    free = in_a_process(rows, steps, "none")
    limit = options.share * free["memory"]
    program = planned(rows, limit)
    sides = {"none": "none", "selective": "selective", "full": "full", "auto": program}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    results["none"].append(free)
    for number in range(options.rounds):
        for name, by_layer in sides.items():
            if name != "none" or number:
                results[name].append(in_a_process(rows, steps, by_layer))
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    counts = ", ".join(f"{n} {policy}" for policy, n in Counter(program).items())
    print(f"memory: {limit / 1e6:,.0f} MB, so `auto` is {counts}")
    print(f"{'recompute':12}{'seconds a step':>16}{'ratio':>8}{'peak MB':>10}{'loss':>10}")
    seconds, peaks = {}, {}
    for name, runs in results.items():
        seconds[name] = statistics.median(each for run in runs for each in run["seconds"])
        peaks[name] = max(run["memory"] for run in runs)
        ratio = seconds[name] / seconds["none"]
        loss = runs[0]["loss"]
        print(f"{name:12}{seconds[name]:16.2f}{ratio:8.2f}{peaks[name] / 1e6:10,.0f}{loss:10.4f}")
    kept = {
        "peak within the memory": peaks["auto"] <= limit,
        f"at most {MOST_SLOWDOWN} × as long": seconds["auto"] <= MOST_SLOWDOWN * seconds["none"],
        "no slower than `full`": seconds["auto"] <= seconds["full"],
    }
    for claim, holds in kept.items():
        print(f"{claim}: {'yes' if holds else 'NO'}")
    sys.exit(0 if all(kept.values()) else 1)


if __name__ == "__main__":
    main()

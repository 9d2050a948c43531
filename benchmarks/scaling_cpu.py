"""Scaling on a CPU: the same step on more workers with fewer threads each, beside one worker.

A 42.5 M Llama (hidden 512, 8 layers, ffn 1408, vocabulary 16,384), sequence 512, bf16, fused
AdamW, a global batch of 32 rows. Two cores: so one worker with two threads has as much of the
machine as two with one, and the table says what spreading costs. 4 and 8 workers share the two
cores; they show that the layouts run, not that they gain.

    python benchmarks/scaling_cpu.py [--steps 3] [--rounds 2] [--most 8] [--only FSDP tensor]

Rounds are taken in turns, the best step of each layout counts: other work on the machine only ever
makes a step slower. Every layout's first loss must be one worker's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
VOCABULARY, SEQUENCE, ROWS = 16384, 512, 32

# Layouts by name: workers, and what their plans have beyond one process.
LAYOUTS: dict[str, tuple[int, dict]] = {
    "1 worker, 2 threads": (1, {}),
    "2 FSDP (zero 3)": (2, {"dp_shard": 2, "zero": 3}),
    "2 tensor parallel": (2, {"tp": 2}),
    "2 ZeRO-1": (2, {"dp_shard": 2, "zero": 1}),
    "2 DDP": (2, {"dp_replicate": 2}),
    "2 context (ring)": (2, {"cp": 2}),
    "2 pipeline (1f1b)": (2, {"pp": 2, "stage_layers": (4, 4)}),
    "4 FSDP": (4, {"dp_shard": 4, "zero": 3}),
    "4 tensor parallel": (4, {"tp": 4}),
    "4 FSDP 2 × tensor 2": (4, {"dp_shard": 2, "tp": 2, "zero": 3}),
    "4 pipeline 2 × FSDP 2": (4, {"pp": 2, "stage_layers": (4, 4), "dp_shard": 2, "zero": 1}),
    "8 FSDP": (8, {"dp_shard": 8, "zero": 3}),
    "8 tensor parallel": (8, {"tp": 8}),
    "8 FSDP 2 × tensor 2 × pipeline 2": (
        8,
        {"dp_shard": 2, "tp": 2, "pp": 2, "stage_layers": (4, 4), "zero": 1},
    ),
}


def train(name: str, steps: int) -> None:
    """In a worker: train a few steps of a layout; rank 0 prints seconds, loss and memory."""
    import resource
    import time
    from dataclasses import replace

    import torch

    from trainwright.models.families import new_hf_config
    from trainwright.parallel.world import join_world, leave_world
    from trainwright.planner.plan import Plan
    from trainwright.recipe.schema import Recipe
    from trainwright.training.sameness import Trial

    workers, fields = LAYOUTS[name]
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    plan = replace(
        Plan.alone("cpu"),
        world_size=workers,
        precision="bf16",
        sequence_length=SEQUENCE,
        threads=threads,
        **fields,
    )
    own = ROWS // plan.data_ranks
    micro = min(8, own) if plan.pp == 1 else max(1, own // (4 * plan.pp))
    plan = replace(plan, micro_batch=micro, accumulation=own // micro)
    recipe = Recipe.model_validate(
        {
            "name": "scaling",
            "model": {"family": "llama", "config": SHAPE},
            "tokenizer": {"path": "bytes"},
            "data": {"sources": ["python-stdlib"], "sequence_length": SEQUENCE},
            "training": {"steps": steps, "batch_sequences": ROWS},
        }
    )
    world = join_world()
    trial = Trial(recipe, new_hf_config("llama", SHAPE, VOCABULARY), plan, world, rows=ROWS)
    seconds, losses = [], []
    for index in range(steps + 1):
        started = time.perf_counter()
        losses.append(trial.train(index).loss)
        seconds.append(time.perf_counter() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if world.is_first:
        print(json.dumps({"seconds": min(seconds[1:]), "loss": losses[0], "memory": memory}))
    leave_world(world)


def measure(name: str, steps: int) -> dict:
    """A layout in processes of its own."""
    from trainwright.training.launch import MALLOC

    workers, _ = LAYOUTS[name]
    with tempfile.TemporaryDirectory() as folder:
        port = 20_000 + os.getpid() % 20_000
        processes = []
        for rank in range(workers):
            environment = {
                **os.environ,
                **MALLOC,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(workers),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
            }
            command = [sys.executable, __file__, "--train", name, "--steps", str(steps)]
            out = (Path(folder) / f"{rank}.out").open("w+")
            processes.append((subprocess.Popen(command, stdout=out, env=environment), out))
        for process, _ in processes:
            if process.wait() != 0:
                raise SystemExit(f"{name}: a worker failed with exit code {process.returncode}")
        _, out = processes[0]
        out.seek(0)
        return json.loads(out.read().splitlines()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each round")
    parser.add_argument("--rounds", type=int, default=2, help="turns of every layout")
    parser.add_argument("--most", type=int, default=8, help="most workers")
    parser.add_argument("--only", nargs="*", default=[], help="words that a layout's name has")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train, options.steps)
        return
    names = [
        name
        for name, (workers, _) in LAYOUTS.items()
        if workers <= options.most
        and (workers == 1 or not options.only or any(word in name for word in options.only))
    ]
    best: dict[str, dict] = {}
    for _ in range(options.rounds):
        for name in names:
            found = measure(name, options.steps)
            if name not in best or found["seconds"] < best[name]["seconds"]:
                best[name] = found
    base = best[names[0]]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {date.today()}\n")
    print("| workers and layout | tokens/s | against one worker | memory of a worker |")
    print("|---|---|---|---|")
    for name in names:
        row = best[name]
        speed, share = ROWS * SEQUENCE / row["seconds"], base["seconds"] / row["seconds"]
        print(f"| {name} | {speed:,.0f} | {share:.2f} | {row['memory']:,.0f} MB |")
        assert abs(row["loss"] - base["loss"]) < 2e-2, (name, row["loss"], base["loss"])


if __name__ == "__main__":
    main()

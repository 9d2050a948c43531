"""Two workers of unequal speed on a CPU: an even split beside the rows that the planner chooses.

Each worker is pinned to a core of its own, with one thread. The second one's core is shared with
processes that do nothing but count, each of which the kernel's fair scheduler gives as much of it:
with two of them the worker has a third. That needs no privilege.

First both train alone, at the same time, which tells their speeds; the rows are shared out by
these. Then they train together, with the rows shared out evenly and as planned, in turns. The best
step of each counts: other work on the machine only ever makes a step slower.

    python benchmarks/unequal.py [--slower 3] [--steps 3] [--rounds 2] [--json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
VOCABULARY, SEQUENCE, ROWS = 4096, 256, 16


def worker(slower: int, steps: int, rounds: int) -> None:
    """One of the two: all measurements, of which the first prints the figures."""
    import torch

    from trainwright.parallel.world import World, join_world, leave_world
    from trainwright.planner.layout import split_rows
    from trainwright.planner.plan import Plan

    torch.set_num_threads(1)
    world = join_world()
    core = sorted(os.sched_getaffinity(0))[world.rank]
    os.sched_setaffinity(0, {core})
    alone = replace(Plan.alone("cpu"), sequence_length=SEQUENCE, accumulation=ROWS)
    even = replace(alone, world_size=2, dp_replicate=2, accumulation=ROWS // 2)
    is_slow = world.rank == 1
    with shared(core, slower - 1) if is_slow else nullcontext():
        world.gather(None)  # all that counts is counting
        own = ROWS / best_step(alone, World(0, 1, world.device), steps)
        speeds = world.gather(own)
        rows = split_rows(ROWS, speeds)
        planned = replace(even, rows_by_replica=rows, accumulation=max(rows))
        seconds: dict[str, list[float]] = {"even": [], "planned": []}
        for _ in range(rounds):
            seconds["even"].append(best_step(even, world, steps))
            seconds["planned"].append(best_step(planned, world, steps))
    if world.is_first:
        best = {name: min(each) for name, each in seconds.items()}
        bound = ROWS / sum(speeds)
        print(json.dumps({"speeds": speeds, "rows": rows, **best, "bound": bound}))
    leave_world(world)


def best_step(plan: Any, world: Any, steps: int) -> float:
    """Seconds of the best of `steps` steps as the plan says, after one that is not counted."""
    from trainwright.models.families import new_hf_config
    from trainwright.recipe.schema import Recipe
    from trainwright.training.sameness import Trial

    recipe = Recipe.model_validate(
        {
            "name": "unequal",
            "model": {"family": "llama", "config": SHAPE},
            "tokenizer": {"path": "bytes"},
            "data": {"sources": ["python-stdlib"], "sequence_length": SEQUENCE},
            "training": {"steps": steps, "batch_sequences": ROWS},
        }
    )
    trial = Trial(recipe, new_hf_config("llama", SHAPE, VOCABULARY), plan, world, rows=ROWS)
    seconds = []
    for index in range(steps + 1):
        started = time.perf_counter()
        trial.train(index)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


@contextmanager
def shared(core: int, others: int) -> Iterator[None]:
    """That many processes that count on the core, while the context lasts."""
    counting = [
        multiprocessing.get_context("spawn").Process(target=count, args=(core,), daemon=True)
        for _ in range(others)
    ]
    for each in counting:
        each.start()
    try:
        yield
    finally:
        for each in counting:
            each.kill()
            each.join()


def count(core: int) -> None:
    """Keep a core busy for ever."""
    os.sched_setaffinity(0, {core})
    while True:
        pass


def measure(slower: int, steps: int, rounds: int) -> dict[str, Any]:
    """Both workers in processes of their own; what the first one prints."""
    from trainwright.training.launch import MALLOC

    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed")
    options = ["--slower", str(slower), "--steps", str(steps), "--rounds", str(rounds)]
    port, workers = 20_000 + os.getpid() % 20_000, []
    for rank in range(2):
        environment = {
            **os.environ,
            **MALLOC,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command = [sys.executable, __file__, "--worker", *options]
        workers.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        )
    said = [each.communicate()[0] for each in workers]
    if any(each.returncode for each in workers):
        raise SystemExit("a worker failed")
    return json.loads(said[0].splitlines()[-1])


def main() -> None:
    """Print the table, or its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slower", type=int, default=3, help="times that the second is slower")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each turn")
    parser.add_argument("--rounds", type=int, default=2, help="turns of both plans")
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.slower, options.steps, options.rounds)
        return
    found = measure(options.slower, options.steps, options.rounds)
    if options.json:
        print(json.dumps(found))
        return
    first, second = found["speeds"]
    print(f"alone: {first:.2f} and {second:.2f} rows a second\n")
    print("| rows | seconds a step | against the even split |")
    print("|---|---|---|")
    half, rows = ROWS // 2, found["rows"]
    for label, name in ((f"{half} + {half}", "even"), (f"{rows[0]} + {rows[1]}", "planned")):
        print(f"| {label} | {found[name]:.3f} | {found['even'] / found[name]:.2f} × |")
    print(f"| as if rows could be cut | {found['bound']:.3f} | |")


if __name__ == "__main__":
    main()

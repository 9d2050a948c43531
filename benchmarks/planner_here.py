"""The planner's predictions for this machine beside what its plans really take.

A 42.5 M Llama (hidden 512, 8 layers, ffn 1408, vocabulary 16,384), sequence 512, bf16, fused
AdamW, a global batch of 16 rows; legal plans of 2 and 4 workers, each
trained for a few steps in processes of its own.

    python benchmarks/planner_here.py --calibrate   # on a quiet machine: measures it, then 20 plans
    python benchmarks/planner_here.py --all         # every plan of the sweep, for the best of them

Each plan's measurement is written to the results file at once, and not made again: a benchmark that
was interrupted goes on. `--report` measures nothing more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace
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
VOCABULARY, SEQUENCE, ROWS = 16384, 512, 16
MICRO_BATCHES = (1, 2, 4, 8, 16)
UNCOUNTED, STEPS = 2, 3
MOST_SECONDS = 900.0  # a plan that takes longer than this hangs
TARGETS = {"step time": 0.15, "memory": 0.10, "regret": 0.05}


def model():
    """The model's shape, as the planner reads it."""
    from trainwright.models.families import decoder_config, new_hf_config

    return decoder_config(new_hf_config("llama", SHAPE, VOCABULARY))


def sweep(workers: int, rows: int) -> Iterator:
    """Legal plans on so many workers that recompute nothing, with every micro-batch."""
    from trainwright.planner.combinations import enumerate_plans
    from trainwright.planner.schedules import schedule_mistakes

    cores = len(os.sched_getaffinity(0))
    seen = set()
    for plan in enumerate_plans(model(), workers, sequence_length=SEQUENCE, batch_sequences=rows):
        if plan.recompute != "none" or plan.recompute_by_layer or plan.rows_by_replica:
            continue
        own = rows // plan.data_ranks
        for micro in MICRO_BATCHES:
            if micro > own or own % micro:
                continue
            changed = replace(
                plan,
                precision="bf16",
                threads=max(1, cores // workers),
                micro_batch=micro,
                accumulation=own // micro,
            )
            if plan.pp > 1 and schedule_mistakes(
                plan.schedule, plan.pp, plan.virtual_stages, changed.accumulation
            ):
                continue
            if changed.hash not in seen:
                seen.add(changed.hash)
                yield changed


def chosen(plans: list, count: int) -> list:
    """So many of them, of as many different layouts as there are: always the same ones."""
    order = random.Random(1).sample(plans, len(plans))
    layouts: dict[tuple, list] = {}
    for plan in order:
        layouts.setdefault(layout(plan), []).append(plan)
    found, turn = [], 0
    while len(found) < min(count, len(plans)):
        found += [own[turn] for own in layouts.values() if len(own) > turn]
        turn += 1
    return found[:count]


def layout(plan) -> tuple:
    """All but the micro-batch."""
    return (
        *(plan.pp, plan.dp_replicate, plan.dp_shard, plan.cp, plan.tp, plan.zero),
        *(plan.schedule, plan.virtual_stages, plan.cp_method, plan.whole),
    )


def train(plan, rows: int, steps: int) -> dict:
    """In a worker: seconds of each step, the peak of memory in bytes, the first loss."""
    import time

    import torch

    from trainwright.models.families import new_hf_config
    from trainwright.parallel.world import World
    from trainwright.recipe.schema import Recipe
    from trainwright.resilience.out_of_memory import peak_bytes
    from trainwright.training.sameness import Trial

    torch.set_num_threads(plan.threads)
    recipe = Recipe.model_validate(
        {
            "name": "here",
            "model": {"family": "llama", "config": SHAPE},
            "tokenizer": {"path": "bytes"},
            "data": {"sources": ["python-stdlib"], "sequence_length": SEQUENCE},
            "training": {"steps": steps, "batch_sequences": rows},
        }
    )
    world = World(torch.distributed.get_rank(), plan.world_size, torch.device("cpu"))
    trial = Trial(recipe, new_hf_config("llama", SHAPE, VOCABULARY), plan, world, rows=rows)
    seconds, busy, losses = [], [], []
    for index in range(steps):
        started, computed = time.perf_counter(), time.process_time()
        losses.append(trial.train(index).loss)
        seconds.append(time.perf_counter() - started)
        busy.append(time.process_time() - computed)
    return {"seconds": seconds, "busy": busy, "memory": peak_bytes("cpu"), "loss": losses[0]}


def measure(plan, rows: int) -> dict:
    """A plan in fresh processes; the fullest worker's memory."""
    from trainwright.training.pool import WorkerPool

    with WorkerPool(plan.world_size) as pool:
        workers = pool.run(train, plan, rows, UNCOUNTED + STEPS, timeout=MOST_SECONDS)
    first = workers[0]
    return {
        "seconds": statistics.median(first["seconds"][UNCOUNTED:]),
        "steps": first["seconds"],
        "busy": max(statistics.median(each["busy"][UNCOUNTED:]) for each in workers),
        "memory": max(each["memory"] for each in workers),
        "loss": first["loss"],
    }


def predictions(plans: list, rows: int) -> list:
    """What the planner says of each, with what has been measured of this machine."""
    from trainwright.planner.cluster.calibration import read_calibration
    from trainwright.planner.cluster.this_machine import this_machine
    from trainwright.planner.cost.step import predict
    from trainwright.training.machine import detect_machine

    machine = detect_machine()
    calibration = read_calibration(machine)
    if calibration is None:
        raise SystemExit("measure the machine first: trainwright doctor --calibrate")
    calibration = replace(calibration, observed=())  # runs of other models prove nothing here
    found = []
    for plan in plans:
        cluster = this_machine(machine, calibration, workers=plan.world_size)
        found.append(predict(job(rows), plan, cluster))
    return found


def job(rows: int):
    """What is trained: `visible_share` is that of the made-up documents in its rows."""
    from trainwright.planner.job import Job
    from trainwright.training.probes import made_share

    return Job(model(), SEQUENCE, rows, visible_share=made_share(rows, SEQUENCE, VOCABULARY))


def name(plan) -> str:
    """A plan in a few words."""
    words = [
        f"{axis} {degree}"
        for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")
        if (degree := getattr(plan, axis)) > 1
    ]
    words += [f"zero {plan.zero}"] if plan.dp_shard > 1 else []
    words += [plan.cp_method] if plan.cp > 1 else []
    words += [f"{plan.schedule} {plan.virtual_stages}"] if plan.pp > 1 else []
    words += [f"whole {'+'.join(plan.whole)}"] if plan.whole else []
    return f"{', '.join(words)}; {plan.accumulation} × {plan.micro_batch} rows"


def report(measured: dict[str, dict], plans: list, rows: int) -> None:
    """The table, the mean errors, and what choosing by prediction would have cost."""
    here = [plan for plan in plans if plan.hash in measured]
    if not here:
        return
    told = dict(zip((plan.hash for plan in here), predictions(here, rows), strict=True))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {date.today()}\n")
    print(
        "| workers | plan | step measured | predicted | off | memory measured | predicted | off |"
    )
    print("|---|---|---|---|---|---|---|---|")
    off, memory_off = [], []
    for plan in here:
        found, guess = measured[plan.hash], told[plan.hash]
        seconds, memory = guess.step_seconds.value, guess.memory.total.value
        off.append(abs(seconds / found["seconds"] - 1))
        memory_off.append(abs(memory / found["memory"] - 1))
        print(
            f"| {plan.world_size} | {name(plan)} | {found['seconds']:.2f} s | {seconds:.2f} s "
            f"| {seconds / found['seconds'] - 1:+.1%} | {found['memory'] / 1e6:,.0f} MB "
            f"| {memory / 1e6:,.0f} MB | {memory / found['memory'] - 1:+.1%} |"
        )
    errors = {"step time": statistics.mean(off), "memory": statistics.mean(memory_off)}
    for what, error in errors.items():
        print(f"\nMAPE of {what}: {error:.1%} (target {TARGETS[what]:.0%})", end="")
    print()
    for workers in sorted({plan.world_size for plan in here}):
        own = [plan for plan in here if plan.world_size == workers]
        pick = min(own, key=lambda plan: told[plan.hash].step_seconds.value)
        best = min(own, key=lambda plan: measured[plan.hash]["seconds"])
        regret = measured[pick.hash]["seconds"] / measured[best.hash]["seconds"] - 1
        print(
            f"{workers} workers, {len(own)} plans: chosen {name(pick)}; best {name(best)}: ", end=""
        )
        print(f"{regret:+.1%} (target {TARGETS['regret']:.0%})")


def main() -> None:
    """Measure what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--plans", type=int, default=20, help="how many, of all workers together")
    parser.add_argument("--all", action="store_true", help="every plan of the sweep")
    parser.add_argument("--only", default="", help="words that a plan's name has")
    parser.add_argument("--rows", type=int, default=ROWS, help="of the global batch")
    parser.add_argument(
        "--calibrate", action="store_true", help="first, as `doctor --calibrate` with this model"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing more")
    parser.add_argument("--results", type=Path, default=Path("planner_here.jsonl"))
    options = parser.parse_args()

    from trainwright.training.launch import MALLOC

    if options.calibrate:
        from trainwright.training.calibration import calibrate
        from trainwright.training.machine import detect_machine

        calibrate(detect_machine(), job(options.rows), say=lambda text: print(text, flush=True))
    os.environ |= {**MALLOC, "OMP_NUM_THREADS": "1"}  # of the workers, as a run's have it
    measured: dict[str, dict] = {}
    if options.results.exists():
        lines = map(json.loads, options.results.read_text().splitlines())
        measured = {line["hash"]: line for line in lines if line["rows"] == options.rows}
    plans = []
    for workers in options.workers:
        every = [plan for plan in sweep(workers, options.rows) if options.only in name(plan)]
        own = every if options.all else chosen(every, options.plans // len(options.workers))
        # What has been measured besides counts for the choice.
        plans += own + [plan for plan in every if plan.hash in measured and plan not in own]
    missing = [plan for plan in plans if plan.hash not in measured and not options.report]
    for number, plan in enumerate(missing, start=1):
        found = measure(plan, options.rows)
        line = {"hash": plan.hash, "rows": options.rows, **found, "plan": asdict(plan)}
        with options.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        measured[plan.hash] = line
        print(f"{number} of {len(missing)}: {name(plan)}: {found['seconds']:.2f} s", flush=True)
    report(measured, plans, options.rows)


if __name__ == "__main__":
    main()

"""Real processes measure this machine; what they found is kept, whatever becomes of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from trainwright.errors import UserError
from trainwright.planner.cluster.calibration import KERNELS, Calibration, read_calibration
from trainwright.planner.cluster.this_machine import this_machine
from trainwright.planner.cost.measured import kernels_for, layer_config
from trainwright.planner.cost.operators import layer_operators
from trainwright.planner.cost.step import predict
from trainwright.planner.job import Job
from trainwright.planner.plan import Machine, Plan
from trainwright.training import calibration, stopwatch
from trainwright.training.calibration_points import (
    COLLECTIVES,
    basics,
    grid,
    groups,
    of_job,
)
from trainwright.training.probes import probe_job
from trainwright.training.stopwatch import Place, Point, measure, prepare

MACHINE = Machine(1, "cpu", 2, 16 * 10**9, device_name="A processor")
HERE = Place(torch.device("cpu"), {})
LAYER = (1, 64, 64, 128, 4, 2)
SMALL = {
    "product": (32, 48, 64),
    "attention": (4, 64, 16),
    "attention_backward": (4, 64, 16),
    "packed_attention": (4, 64, 16),
    "packed_attention_backward": (4, 64, 16),
    "slotted_attention": (4, 64, 16),
    "slotted_attention_backward": (4, 64, 16),
    "layer": LAYER,
    "layer_backward": LAYER,
    "elements": (6000,),
}


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    monkeypatch.setattr(stopwatch, "WINDOW_SECONDS", 0.001)


def point(kernel: str) -> Point:
    return Point(kernel, "" if kernel == "elements" else "bf16", SMALL[kernel])


@pytest.mark.parametrize("kernel", SMALL)
def test_every_kernel_of_one_process_is_measured(kernel):
    assert 0 < measure(point(kernel), HERE) < 10


def test_all_kernels_are_in_the_grid():
    assert {each.kernel for each in (*basics(2, "bf16"), *grid())} == set(KERNELS)
    assert {*SMALL, *COLLECTIVES} == set(KERNELS)
    for each in (*basics(4, "bf16"), *grid()):
        assert len(each.shape) == len(KERNELS[each.kernel])


def test_what_is_timed_does_the_work_that_its_shape_says():
    """By the operations that torch counts."""
    from torch.utils.flop_counter import FlopCounterMode

    for shape in ((64, 64, 64), (64, 128, 256)):
        action = prepare(Point("product", "fp32", shape), HERE)
        with FlopCounterMode(display=False) as counter:
            action()
        rows, columns, inner = shape
        assert counter.get_total_flops() == 2 * rows * columns * inner
    action = prepare(point("layer"), HERE)
    with FlopCounterMode(display=False) as counter:
        action()
    config = layer_config(LAYER)
    plan = replace(Plan.alone(), micro_batch=1, sequence_length=64, precision="bf16")
    operators = layer_operators(Job(config, 64, 1), plan, 0)
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert counted == sum(each.flops for each in operators.products)


def test_a_cpus_time_is_told_as_its_share_of_the_cores(monkeypatch):
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(stopwatch.time, "process_time", lambda: float(next(clock)))
    monkeypatch.setattr(stopwatch, "prepare", lambda point, place: lambda: None)
    monkeypatch.setattr(stopwatch, "WINDOW_SECONDS", 1e-9)
    assert measure(point("product"), HERE) == 2.0
    assert measure(point("product"), replace(HERE, turn=2.0)) == 4.0


def test_groups_divide_the_workers():
    assert {n: groups(n) for n in (1, 2, 3, 4, 6, 8)} == {
        1: [], 2: [2], 3: [3], 4: [2, 4], 6: [2, 6], 8: [2, 4, 8],
    }  # fmt: skip


def test_a_recipes_shapes_are_those_of_its_plans():
    """What every plan multiplies, forward and backward, cut as it cuts."""
    config = replace(layer_config((1, 64, 64, 128, 4, 4)), vocab_size=64)
    job = Job(config, 64, 4)
    found = {each.shape for each in of_job(job, "bf16", 4) if each.kernel == "product"}
    for micro_batch, tp in product((1, 2, 4), (1, 2, 4)):
        tokens = 64 * micro_batch
        for rows, columns, inner in [(tokens, 3 * 64 // tp, 64), (tokens, 64, 128 // tp)]:
            passes = {(rows, columns, inner), (rows, inner, columns), (inner, columns, rows)}
            assert passes <= found


def few(workers: int) -> list[Point]:
    points = [*map(point, SMALL), Point("elements", "", (10**6,))]
    sizes = (1 << 10, 1 << 16) if workers > 1 else ()
    return points + [Point(kind, "", (workers, n)) for kind in COLLECTIVES for n in sizes]


@pytest.mark.prove
def test_two_real_processes_measure_and_a_plan_is_predicted(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "_CPU_WORKERS", (2,))
    said: list[str] = []
    found = calibration.calibrate(MACHINE, folder=tmp_path, points=few, say=said.append)
    (crowd,) = found.crowds
    assert (crowd.workers, crowd.threads) == (2, 1)
    assert {(s.kernel, s.precision, s.shape) for s in crowd.samples} == {
        (p.kernel, p.precision, p.shape) for p in few(2)
    }
    assert 0 <= crowd.hidden_share <= 1
    plans = [Plan.from_json(probe.plan) for probe in crowd.probes]
    assert [(p.dp_shard, p.tp, p.dp_replicate, p.pp) for p in plans] == [
        (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2),
    ]  # fmt: skip
    assert [probe.holes is None for probe in crowd.probes] == [False, True, True, True]
    # A Python with torch in it, in bytes.
    assert 5e7 < found.memory.process_bytes < 5e9
    assert said and read_calibration(MACHINE, tmp_path).crowds[0].samples == crowd.samples

    config = layer_config(LAYER)
    plan = replace(
        Plan.alone(),
        world_size=2,
        dp_replicate=2,
        precision="bf16",
        micro_batch=1,
        accumulation=2,
        sequence_length=64,
    )
    cluster = this_machine(MACHINE, found, workers=2)
    told = predict(Job(config, 64, 4), plan, cluster)
    assert told.step_seconds.value > 0 and "measured here" in told.source
    # The probes themselves are foretold nearer to what they took than by their parts alone.
    plain = replace(found, crowds=(replace(crowd, probes=()),))
    apart = this_machine(MACHINE, plain, workers=2)
    for probe, own in zip(crowd.probes, plans, strict=True):
        near, far = (
            abs(math.log(predict(probe_job(), own, each).step_seconds.value / probe.seconds))
            for each in (cluster, apart)
        )
        assert near <= far + 0.1
    call = {s.shape: s.seconds for s in crowd.samples if s.kernel == "all_reduce"}
    assert told.exposed["replicas"] > 0 and max(call.values()) < 10
    assert kernels_for(cluster.pools[0], plan).small_kernels >= 1


@pytest.mark.prove
def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "_CPU_WORKERS", (1,))
    points = [Point("elements", "", (6000,)), Point("product", "no such precision", (8, 8, 8))]
    with pytest.raises(RuntimeError, match="no such precision"):
        calibration.calibrate(MACHINE, folder=tmp_path, points=lambda workers: points)
    (crowd,) = read_calibration(MACHINE, tmp_path).crowds
    assert [sample.kernel for sample in crowd.samples] == ["elements"]


def test_an_interrupted_measurement_is_kept_and_goes_on(tmp_path, monkeypatch):
    """The worker is a stand-in that writes a line; the user presses Ctrl-C while it goes on."""
    asked: list[list[dict]] = []

    class Busy:
        returncode = 0

        def poll(self) -> None:
            return None

        def wait(self, seconds: float = 0) -> None:
            if seconds:
                raise KeyboardInterrupt

        def kill(self) -> None:
            return None

    def start(place, machine, workers, threads, seconds):
        wanted = json.loads((place / "points.json").read_text())
        asked.append(wanted)
        with (place / "found.jsonl").open("w") as file:
            file.write(json.dumps({**wanted[0], "seconds": 0.5}) + "\n")
            file.write('{"kernel": "cut off in the mid')
        return [Busy()]

    monkeypatch.setattr(calibration, "_CPU_WORKERS", (1,))
    monkeypatch.setattr(calibration, "_start", start)
    for turn in range(3):
        with pytest.raises(KeyboardInterrupt):
            calibration.calibrate(MACHINE, folder=tmp_path, points=few)
        (crowd,) = read_calibration(MACHINE, tmp_path).crowds
        assert len(crowd.samples) == turn + 1
    assert [len(wanted) for wanted in asked] == [len(few(1)) - n for n in range(3)]


def test_where_all_is_known_all_is_measured_anew(tmp_path, monkeypatch):
    asked: list[int] = []

    def crowd(known, machine, workers, points, *rest):
        asked.append(len(points))
        samples = tuple(calibration.Sample(p.kernel, p.precision, p.shape, 1.0) for p in points)
        known = known.added(calibration.Crowd(workers, 1, samples))
        calibration.write_calibration(known, tmp_path)
        return known

    monkeypatch.setattr(calibration, "_CPU_WORKERS", (1,))
    monkeypatch.setattr(calibration, "_measure_crowd", crowd)
    for _ in range(2):
        calibration.calibrate(MACHINE, folder=tmp_path, points=few)
    assert asked == [len(few(1))] * 2


def test_gpus_are_measured_with_a_worker_each():
    machine = replace(MACHINE, device_kind="cuda", devices=6)
    assert calibration.worker_counts(machine) == (1, 2, 4, 6)
    assert calibration.worker_counts(MACHINE) == (1, 2, 4)


def test_the_recipes_model_must_be_known(tmp_path):
    file = tmp_path / "recipe.yaml"
    text = "model: {path: somebody/something}\ndata: {sources: [python-stdlib]}\n"
    text += "training: {steps: 10}\n"
    file.write_text(text)
    with pytest.raises(UserError, match="not known here"):
        calibration.job_of(file)
    assert calibration.job_of(None) == (None, "bf16")


def test_busy_machines_are_told_of(monkeypatch):
    monkeypatch.setattr(calibration.psutil, "getloadavg", lambda: (9.0, 9.0, 9.0))
    assert "busy" in calibration.obstacles()[0]
    monkeypatch.setattr(calibration.psutil, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert calibration.obstacles() == []


def test_a_calibration_of_nothing_says_nothing():
    empty = Calibration({"device": "cpu", "cores": 2})
    assert empty.crowd(2) is None
    plan = replace(Plan.alone(), world_size=2, dp_replicate=2, sequence_length=64)
    cluster = this_machine(MACHINE, empty, workers=2)
    assert type(kernels_for(cluster.pools[0], plan)).__name__ == "Kernels"

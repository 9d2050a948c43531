"""Between measured points: closed forms are met again, and more is never told to take less."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from trainwright.planner.cluster.calibration import (
    PACKED_VISIBLE,
    Calibration,
    Crowd,
    Sample,
    machine_facts,
)
from trainwright.planner.cluster.catalogue import device
from trainwright.planner.cluster.describe import Rates
from trainwright.planner.cluster.this_machine import this_machine
from trainwright.planner.cost.calls import Call
from trainwright.planner.cost.kernels import Kernels
from trainwright.planner.cost.measured import (
    MeasuredKernels,
    Table,
    interpolate,
    kernels_for,
    layer_config,
    measured_links,
    monotone,
)
from trainwright.planner.cost.operators import Attention, Product, layer_operators
from trainwright.planner.cost.stage import passes
from trainwright.planner.cost.step import predict
from trainwright.planner.job import Job
from trainwright.planner.plan import Machine, Plan

MACHINE = Machine(1, "cpu", 2, 16 * 10**9, device_name="A processor")
SIDES = (64, 256, 1024, 4096)
LAYER = (2, 128, 256, 512, 4, 2)


def seconds_of(shape: tuple[int, ...]) -> float:
    """Products at 100 GFLOP/s."""
    rows, columns, inner = shape
    return 2 * rows * columns * inner / 1e11


def crowd(workers: int = 2, *samples: Sample) -> Crowd:
    grid = [
        Sample("product", "bf16", shape, seconds_of(shape))
        for shape in itertools.product(SIDES, repeat=3)
    ]
    moved = [Sample("elements", "", (size,), 1e-6 + size / 1e10) for size in (100, 10**5, 10**8)]
    return Crowd(workers, max(1, 2 // workers), (*grid, *moved, *samples), hidden_share=0.25)


def kernels(*samples: Sample) -> MeasuredKernels:
    return MeasuredKernels(device("CPU"), Rates(), crowd=crowd(2, *samples))


def plan_of(workers: int, **fields: object) -> Plan:
    degrees = {"world_size": workers, "dp_replicate": workers, "precision": "bf16"}
    degrees |= {"micro_batch": 2, "accumulation": 4, "sequence_length": 128}
    return replace(Plan.alone(), **{**degrees, **fields})


def test_a_constant_rate_is_met_at_every_shape():
    found = kernels()
    for shape in [(64, 64, 64), (100, 700, 3000), (5000, 333, 80), (8192, 16384, 512)]:
        assert found.product(Product(*shape), "bf16") == pytest.approx(seconds_of(shape))
    assert found.product(Product(64, 64, 64, times=3), "bf16") == pytest.approx(
        3 * seconds_of((64, 64, 64))
    )


def test_a_measured_shape_is_told_as_it_was_measured():
    slow = Sample("product", "bf16", (512, 16384, 512), 1.0)
    assert kernels(slow).product(Product(512, 16384, 512), "bf16") == 1.0
    # Its neighbours lean towards it, and what is far away does not.
    near, far = Product(512, 16000, 512), Product(64, 64, 4096)
    assert kernels(slow).product(near, "bf16") > 5 * kernels().product(near, "bf16")
    assert kernels(slow).product(far, "bf16") < 1.1 * kernels().product(far, "bf16")


def test_rates_stay_between_the_slowest_and_the_fastest():
    draw = random.Random(0)
    points = {
        shape: seconds_of(shape) * draw.uniform(1, 3)
        for shape in itertools.product(SIDES, repeat=3)
    }
    rates = [seconds_of(shape) / seconds for shape, seconds in points.items()]
    table = Table(points)
    for _ in range(100):
        shape = tuple(draw.randint(1, 20_000) for _ in range(3))
        rate = seconds_of(shape) / table.seconds(shape, (1, 1, 1))
        assert min(rates) * 0.999 <= rate <= max(rates) * 1.001


def test_powers_are_met_between_points_and_beyond():
    points = tuple((10.0**n, 1e-6 * 10 ** (0.7 * n)) for n in range(2, 6))
    for size in (150.0, 3_000.0, 99_000.0):
        assert interpolate(points, size) == pytest.approx(1e-6 * size**0.7)
    assert interpolate(points, 1.0) == points[0][1]
    assert interpolate(points, 1e7) == pytest.approx(100 * points[-1][1])


def test_more_bytes_never_take_less_time_nor_less_bandwidth():
    draw = random.Random(0)
    sizes = [2**n for n in range(10, 26)]
    for _ in range(20):
        noisy = {size: (1e-4 + size / 1e9) * draw.uniform(0.5, 2) for size in sizes}
        mended = monotone(noisy)
        for (less, sooner), (more, later) in itertools.pairwise(mended):
            assert sooner <= later and sooner / less >= later / more * (1 - 1e-9)
    exact = {size: 1e-4 + size / 1e9 for size in sizes}
    assert [seconds for _, seconds in monotone(exact)] == pytest.approx(list(exact.values()))


def test_collectives_by_group_and_by_who_calls_them():
    found = kernels(
        Sample("all_gather", "", (2, 1000), 1e-3),
        Sample("all_gather", "", (2, 10**6), 2e-3),
        Sample("gather", "", (2, 10**6), 1e-3),
    )
    assert found.collective(Call("fsdp", "all_gather", 10**6), 2) == pytest.approx(2e-3)
    assert found.collective(Call("fsdp", "all_gather", 10**6, 3), 2) == pytest.approx(6e-3)
    assert found.collective(Call("tp", "all_gather", 10**6), 2) == pytest.approx(1e-3)
    # Of four, three quarters of the bytes go past each worker, instead of a half.
    assert found.collective(Call("fsdp", "all_gather", 10**6), 4) == pytest.approx(3e-3)
    assert found.collective(Call("fsdp", "reduce_scatter", 10**6), 2) is None


def test_attention_between_whole_rows_and_packed_ones():
    found = kernels(
        Sample("attention", "bf16", (8, 128, 64), 1.0),
        Sample("packed_attention", "bf16", (8, 128, 64), 0.6),
        Sample("attention_backward", "bf16", (8, 128, 64), 2.0),
    )

    def seconds(share: float, queries: int = 128) -> float:
        asked = Attention(8, queries, 64 * share, 128, 64, 64)
        return found.attention(asked, "bf16", flash=True, causal=True)

    assert seconds(1.0) == pytest.approx(1.0)
    assert seconds(PACKED_VISIBLE) == pytest.approx(0.6)
    assert seconds(1.0, queries=32) == pytest.approx(0.25)
    assert seconds(0.9) < seconds(1.0)
    back = found.attention_backward(
        Attention(8, 128, 64, 128, 64, 64), "bf16", flash=True, causal=True
    )
    assert back == pytest.approx(2.0)


def test_rows_that_lie_on_several_workers_have_an_attention_of_their_own():
    samples = (
        Sample("attention", "bf16", (8, 128, 64), 1.0),
        Sample("slotted_attention", "bf16", (8, 128, 64), 0.75),
    )
    calibration = Calibration(machine_facts(MACHINE), "", (crowd(2, *samples),))
    pool = this_machine(MACHINE, calibration, workers=2).pools[0]
    own = Attention(8, 64, 64, 128, 64, 64)  # half of the queries
    degrees = {"dp_replicate": 1, "cp": 2}
    for method, seconds in (("ring", 0.75), ("all_gather", 0.75), ("ulysses", 0.5)):
        found = kernels_for(pool, plan_of(2, **degrees, cp_method=method))
        assert found.attention(own, "bf16", flash=True, causal=True) == pytest.approx(seconds)


def test_small_kernels_take_what_of_a_measured_layer_nothing_else_explains():
    """A layer made up of its products, its attention, its copies, and 5 × its bytes' time."""
    config = layer_config(LAYER)
    rows, tokens, *_ = LAYER
    heads = (rows * 4, tokens, 64)
    attention = (
        Sample("attention", "bf16", heads, 1e-3),
        Sample("attention_backward", "bf16", heads, 2e-3),
    )
    plain = kernels(*attention)
    plan = plan_of(2, dp_replicate=1, world_size=1)
    forward, inputs, weights = passes(
        Job(config, tokens, rows), plan, layer_operators(Job(config, tokens, rows), plan, 0), plain
    )
    known = sum(each.products + each.attention for each in (forward, inputs, weights))
    known += plain.elements(12 * (256 * 256 * 3 + 3 * 256 * 512 + 512), 24)
    whole = known + 5 * (forward.elements + inputs.elements)
    layers = (
        Sample("layer", "bf16", LAYER, whole / 3),
        Sample("layer_backward", "bf16", LAYER, whole * 2 / 3),
    )
    calibration = Calibration(machine_facts(MACHINE), "", (crowd(2, *attention, *layers),))
    pool = this_machine(MACHINE, calibration, workers=2).pools[0]
    assert kernels_for(pool, plan_of(2)).small_kernels == pytest.approx(5)
    assert kernels_for(pool, plan_of(2, compile=True)).small_kernels == 1.0


def test_what_nobody_has_measured_is_told_by_the_data_sheet():
    found, told = kernels(), Kernels(device("CPU"), Rates())
    product = Product(512, 512, 512)
    assert found.product(product, "fp32") == told.product(product, "fp32")
    attention = Attention(8, 128, 64, 128, 64, 64)
    for name in ("attention", "attention_backward"):
        asked = [getattr(each, name)(attention, "bf16", True, True) for each in (found, told)]
        assert asked[0] == asked[1]
    pool = this_machine(MACHINE).pools[0]
    assert type(kernels_for(pool, plan_of(2))) is Kernels
    assert measured_links(this_machine(MACHINE), plan_of(2)) is None


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_workers_that_nobody_measured_share_the_cores(workers):
    """Two cores: four workers of one thread take twice as long each, one of two threads half."""
    calibration = Calibration(machine_facts(MACHINE), "", (crowd(2),))
    pool = this_machine(MACHINE, calibration, workers=workers).pools[0]
    threads = max(1, 2 // workers)
    found = kernels_for(pool, plan_of(workers, threads=threads))
    one = found.product(Product(256, 256, 256), "bf16")
    assert one == pytest.approx(seconds_of((256, 256, 256)) * workers / 2)
    assert found.share == min(1.0, 2 / workers)
    assert found.rates.overlap_slowdown == 1.75


def test_all_cores_work_while_some_workers_of_a_crowded_pipeline_idle():
    """Four stages on two cores: all of their work on both, or their way on four, if longer."""
    job = Job(replace(layer_config(LAYER), num_layers=4, **kinds(4)), 128, 8)
    sent = (Sample("send", "", (2, size), 1e-5 + size / 1e9) for size in (100, 10**6))
    attention = (Sample(f"attention{way}", "bf16", (8, 128, 64), 1e-4) for way in ("", "_backward"))
    calibration = Calibration(machine_facts(MACHINE), "", (crowd(2, *sent, *attention),))
    stages = {"pp": 4, "stage_layers": (1, 1, 1, 1), "dp_replicate": 1}
    plan = plan_of(4, **stages)
    crowded = predict(job, plan, this_machine(MACHINE, calibration, workers=4))
    roomy = replace(MACHINE, cores=4)
    free = replace(calibration, facts=machine_facts(roomy))
    alone = predict(job, plan, this_machine(roomy, free, workers=4))
    pipeline = crowded.compute + sum(crowded.exposed.values()) + crowded.idle
    timeline = alone.timeline
    assert timeline is not None and crowded.idle >= 0
    work = sum(1 - idle for idle in timeline.idle) * timeline.makespan
    assert work / 2 > timeline.makespan
    # But for what a pass costs whatever the device.
    assert pipeline == pytest.approx(work / 2, rel=0.06)


def kinds(layers: int) -> dict[str, tuple]:
    one = layer_config(LAYER)
    return {
        "layer_windows": one.layer_windows * layers,
        "layer_ropes": one.layer_ropes * layers,
    }

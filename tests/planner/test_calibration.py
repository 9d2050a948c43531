"""What is measured of a machine is kept by its fingerprint, and damaged files are refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from trainwright.errors import UserError
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.planner.cluster import calibration as kept
from trainwright.planner.cluster.calibration import (
    Calibration,
    Crowd,
    MemoryConstants,
    Sample,
    calibration_folder,
    machine_facts,
    read_calibration,
    write_calibration,
)
from trainwright.planner.cluster.describe import Observation
from trainwright.planner.cluster.this_machine import this_machine
from trainwright.planner.cost.refine import refine
from trainwright.planner.cost.step import predict
from trainwright.planner.job import Job
from trainwright.planner.plan import Machine, Plan

MACHINE = Machine(1, "cpu", 2, 16 * 10**9, device_name="A processor")
GPUS = Machine(4, "cuda", 64, 80 * 10**9, device_name="NVIDIA H100 80GB HBM3")


def measured(workers: int = 2, threads: int = 1, rate: float = 1e11) -> Crowd:
    """A crowd of round numbers: products at `rate`, memory at 10 GB/s, messages at 1 GB/s."""
    product = Sample("product", "bf16", (512, 512, 512), 2 * 512**3 / rate)
    moved = [Sample("elements", "", (size,), size / 1e10) for size in (1000, 10**8)]
    sent = [
        Sample(kind, "", (2, size), 1e-4 + size / 1e9)
        for kind in ("send", "all_reduce")
        for size in (1000, 10**8)
    ]
    return Crowd(workers, threads, (product, *moved, *sent), hidden_share=0.25)


def calibrated(machine: Machine = MACHINE, **fields: float) -> Calibration:
    return Calibration(machine_facts(machine), "2026-01-01T00:00:00+00:00", (measured(**fields),))


def test_what_is_written_is_read_again(tmp_path):
    first = replace(
        calibrated(),
        memory=MemoryConstants(3e8, 2e6),
        observed=(Observation((1.0, 2.0), 0.1),),
    )
    path = write_calibration(first, tmp_path)
    assert path == tmp_path / f"{first.fingerprint}.json"
    assert asdict(read_calibration(MACHINE, tmp_path)) == asdict(first)


def test_the_users_cache_is_where_xdg_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration_folder() == tmp_path / "trainwright" / "calibration"
    assert read_calibration(MACHINE) is None
    write_calibration(calibrated())
    assert read_calibration(MACHINE) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"cores": 4},
        {"device_name": "Another processor"},
        {"memory_bytes": 32 * 10**9},
        {"device_kind": "cuda"},
        {"devices": 2},
    ],
)
def test_another_machine_has_another_fingerprint(tmp_path, change):
    write_calibration(calibrated(), tmp_path)
    assert read_calibration(replace(MACHINE, **change), tmp_path) is None


def test_other_software_has_another_fingerprint(tmp_path, monkeypatch):
    write_calibration(calibrated(), tmp_path)
    monkeypatch.setattr(kept.importlib.metadata, "version", lambda package: "1.0")
    assert read_calibration(MACHINE, tmp_path) is None


def test_what_is_free_now_is_no_part_of_the_machine(tmp_path):
    write_calibration(calibrated(), tmp_path)
    assert read_calibration(replace(MACHINE, free_bytes=123, launched=4), tmp_path) is not None


def cut_off(document: dict) -> str:
    return json.dumps(document)[:-20]


def without_crowds(document: dict) -> str:
    return json.dumps({key: value for key, value in document.items() if key != "crowds"})


def unknown_kernel(document: dict) -> str:
    document["crowds"][0]["samples"][0]["kernel"] = "wishes"
    return json.dumps(document)


def no_time_at_all(document: dict) -> str:
    document["crowds"][0]["samples"][0]["seconds"] = -1.0
    return json.dumps(document)


def wrong_shape(document: dict) -> str:
    document["crowds"][0]["samples"][0]["shape"] = [1]
    return json.dumps(document)


def another_machines(document: dict) -> str:
    document["facts"]["cores"] = 99
    return json.dumps(document)


def of_the_future(document: dict) -> str:
    return json.dumps({**document, "format": 99})


@pytest.mark.parametrize(
    "damage",
    [
        cut_off,
        without_crowds,
        unknown_kernel,
        no_time_at_all,
        wrong_shape,
        another_machines,
        of_the_future,
        lambda document: "[]",
    ],
)
def test_damaged_files_are_refused_with_a_way_out(tmp_path, damage):
    path = write_calibration(calibrated(), tmp_path)
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(UserError) as error:
        read_calibration(MACHINE, tmp_path)
    assert str(path) in str(error.value) and "doctor --calibrate" in str(error.value)


def test_measuring_again_replaces_what_was_measured_before():
    old, new = measured(rate=1e11), measured(rate=2e11)
    both = Calibration(machine_facts(MACHINE), crowds=(old,)).added(
        replace(new, samples=new.samples[:1], hidden_share=0.0)
    )
    (crowd,) = both.crowds
    assert crowd.samples[0].seconds == new.samples[0].seconds
    assert len(crowd.samples) == len(old.samples) and crowd.hidden_share == 0.25
    assert both.added(measured(4)).crowd(8).workers == 4


def test_workers_share_what_a_cpu_has():
    pools = {n: this_machine(MACHINE, calibrated(), workers=n).pools[0] for n in (2, 4)}
    assert {n: pool.devices for n, pool in pools.items()} == {2: 2, 4: 4}
    assert pools[2].device.peak_flops["bf16"] == pytest.approx(1e11)
    assert pools[4].device.peak_flops["bf16"] == pytest.approx(0.5e11)
    assert pools[2].device.memory_bandwidth == pytest.approx(1e10)
    assert pools[4].device.memory_bytes == MACHINE.memory_bytes / 4
    assert pools[2].inside.bandwidth == pytest.approx(1e9, rel=0.01)
    assert "measured here" in pools[2].rates.source
    unknown = this_machine(MACHINE)
    assert unknown.devices == 2 and unknown.pools[0].rates.source == "assumed"
    assert unknown.pools[0].rates.spread > pools[2].rates.spread


def test_gpus_are_known_by_their_drivers_names():
    pool = this_machine(GPUS).pools[0]
    assert (pool.device.name, pool.devices, pool.inside.name) == ("H100-SXM", 4, "NVLink-4")
    several = this_machine(replace(GPUS, launched=8)).pools[0]
    assert (several.nodes, several.devices_per_node) == (2, 4)
    strange = this_machine(replace(GPUS, device_name="Unheard-of")).pools[0]
    assert strange.device.name == "Unheard-of"
    assert strange.rates.spread > pool.rates.spread


def shapes() -> tuple[Job, Plan]:
    values = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = decoder_config(new_hf_config("llama", values, 1024))
    plan = replace(
        Plan.alone(),
        world_size=2,
        dp_replicate=2,
        precision="bf16",
        micro_batch=2,
        accumulation=2,
        sequence_length=128,
    )
    return Job(config, 128, 8), plan


def test_runs_teach_the_next_prediction():
    job, plan = shapes()
    found = calibrated()

    def predicted(known: Calibration) -> float:
        return predict(job, plan, this_machine(MACHINE, known, workers=2)).step_seconds.value

    first = predicted(found)
    for _ in range(20):
        found = refine(found, job, plan, predicted(found), 1.2 * first)
    # Every run is told against what the calibration alone says: nothing is counted twice.
    assert [seen.log_ratio for seen in found.observed] == pytest.approx([0.1823] * 20, abs=1e-3)
    assert 1.15 * first < predicted(found) < 1.2 * first


def test_a_run_on_a_busy_machine_teaches_little():
    job, plan = shapes()
    found = refine(calibrated(), job, plan, 1.0, 1000.0)
    assert found.observed[0].log_ratio == pytest.approx(1.0986, abs=1e-3)
    for _ in range(100):
        found = refine(found, job, plan, 1.0, 1.0)
    assert len(found.observed) == 64
    with pytest.raises(ValueError, match="positive"):
        refine(found, job, plan, 1.0, 0.0)

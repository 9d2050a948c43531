"""`parallel: auto`: when the search decides, when it does not, and what it may not touch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.planner.test_plan import LAPTOP, recipe_of
from trainwright.errors import UserError
from trainwright.planner import choose
from trainwright.planner.choose import Choice, choose_plan
from trainwright.planner.cluster.calibration import (
    Calibration,
    Crowd,
    Sample,
    machine_facts,
    write_calibration,
)
from trainwright.planner.cluster.load import load_cluster
from trainwright.planner.make import machine_of, make_plan
from trainwright.planner.plan import Machine
from trainwright.planner.search.asked import asked_of

H100S = Machine(
    devices=8, device_kind="cuda", cores=64, memory_bytes=80 * 10**9, can_compile=True,
    has_float8=True, device_name="NVIDIA H100 80GB HBM3",
)  # fmt: skip
SMALL = {"model": {"family": "llama", "preset": "1b"}, "data": {"sequence_length": 2048},
         "training": {"steps": 10, "batch_sequences": 64}}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def chosen(machine: Machine = H100S, *, top: int = 0, **sections: Any) -> Choice:
    return choose_plan(recipe_of(**{**SMALL, **sections}), machine, top=top)


def seconds(choice: Choice) -> float:
    assert choice.prediction is not None
    return choice.prediction.step_seconds.value


def simplest(machine: Machine = H100S, **sections: Any) -> Choice:
    """The plan without a search, predicted on the same machine."""
    choice = chosen(machine, **sections)
    assert choice.question is not None
    plan = make_plan(choice.question.recipe, machine)
    return choice.question.choice(choice.question.predict(plan), "derived", "")


@pytest.mark.parametrize("parallel", [{"tp": 2}, {"dp_replicate": 8}, {"zero": 3}, {"tp": 1}])
def test_a_layout_that_is_given_is_kept(parallel: dict[str, Any]) -> None:
    choice = chosen(parallel=parallel)
    assert choice.plan == make_plan(recipe_of(**{**SMALL, "parallel": parallel}), H100S)
    assert (choice.origin, choice.reason) == ("derived", "the recipe gives the layout")
    assert choice.ranked == ()
    assert seconds(choice) > 0
    with pytest.raises(UserError, match="no plans to choose from"):
        chosen(parallel=parallel, top=2)


def test_the_search_takes_the_simplest_plans_place_where_it_is_worth_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choice, before = chosen(), simplest()
    assert choice.origin == "searched"
    # Independently: whatever was chosen is predicted by the same model that ranks.
    best = min(each.step_seconds.value for each in choice.ranked)
    if choice.plan == before.plan:
        assert seconds(before) < choose.WORTHWHILE * best
    else:
        assert seconds(choice) <= seconds(before) / choose.WORTHWHILE
    monkeypatch.setattr(choose, "WORTHWHILE", 100.0)
    assert chosen().plan == before.plan
    assert "nothing is predicted to be" in chosen().reason
    monkeypatch.setattr(choose, "WORTHWHILE", 0.0)
    assert chosen().plan == choice.ranked[0].plan


def test_what_does_not_fit_as_simply_as_can_be_is_made_to_fit() -> None:
    small = replace(H100S, memory_bytes=24 * 10**9, device_name="NVIDIA GeForce RTX 4090")
    sections = {"model": {"family": "llama", "preset": "8b"}, "data": {"sequence_length": 4096}}
    sections["training"] = {"steps": 10, "batch_sequences": 32}
    before = simplest(small, **sections)
    assert before.prediction is not None
    assert not before.prediction.memory.fits
    choice = chosen(small, **sections)
    assert choice.prediction is not None
    assert choice.prediction.memory.fits
    assert "fit into the memory" in choice.reason
    assert choice.plan.batch_sequences == 32


def test_workers_micro_batch_and_threads_are_kept() -> None:
    plan = chosen(parallel={"workers": 4, "micro_batch": 2, "threads": 3}).plan
    assert (plan.world_size, plan.micro_batch, plan.threads) == (4, 2, 3)
    plans = chosen(replace(H100S, launched=16), top=4).ranked
    assert len(plans) == 4
    assert {each.plan.world_size for each in plans} == {16}
    assert len({each.plan for each in plans}) == 4
    assert {each.plan.compile for each in plans if each.plan.schedule == "1f1b"} == {True}


def test_a_cpu_that_nobody_has_measured_is_left_as_it_is() -> None:
    choice = choose_plan(recipe_of(), LAPTOP)
    assert choice.plan == make_plan(recipe_of(), LAPTOP)
    assert choice.plan.world_size == 1
    assert "has not measured this machine" in choice.reason
    assert choice.ranked == ()
    two = choose_plan(recipe_of(parallel={"workers": 2}), LAPTOP)
    assert (two.plan.dp_replicate, two.plan.threads) == (2, 4)
    # To be tried plans are searched for all the same; the chosen one stays.
    tried = choose_plan(recipe_of(), LAPTOP, top=3)
    assert tried.plan == choice.plan
    assert len(tried.ranked) == 3


def test_a_cpu_that_was_measured_is_searched() -> None:
    """Here two processes get far more done than one with as many threads as there are cores."""
    machine = replace(LAPTOP, cores=2)

    def crowd(workers: int, rate: float) -> Crowd:
        samples = [
            Sample("product", "bf16", (size, size, size), 2 * size**3 / rate)
            for size in (64, 256, 1024)
        ]
        samples += [Sample("all_reduce", "", (workers, 1 << n), 1e-5) for n in (10, 20)]
        return Crowd(workers, 2 // workers, tuple(samples), 0.0)

    facts = machine_facts(machine)
    write_calibration(Calibration(facts, "2026-01-01", (crowd(1, 1e10), crowd(2, 1e11))))
    assert choose_plan(recipe_of(), machine).plan.world_size == 2
    write_calibration(Calibration(facts, "2026-01-01", (crowd(1, 1e11), crowd(2, 1e10))))
    assert choose_plan(recipe_of(), machine).plan.world_size == 1


@pytest.mark.parametrize(
    ("native", "reason"), [(None, "shape is not known"), (False, "transformers' own class")]
)
def test_models_that_are_not_known_are_planned_as_ever(native: bool | None, reason: str) -> None:
    recipe = recipe_of(model={"path": "somebody/model"})
    choice = choose_plan(recipe, H100S, native=native)
    assert choice.plan == make_plan(recipe, H100S, native=native)
    assert choice.prediction is None
    assert reason in choice.reason
    record = choice.record(H100S)
    assert record.prediction is None
    assert record.memory == ()


CLUSTER = """\
pools:
  gpus:
    device: H100-SXM
    nodes: 2
    devices_per_node: 8
    inside: NVLink-4
    between: {link}
"""


def test_a_described_cluster_is_planned_for(tmp_path: Path) -> None:
    launched = replace(H100S, launched=16)

    def on(link: str, **sections: Any) -> Choice:
        file = tmp_path / "cluster.yaml"
        file.write_text(CLUSTER.format(link=link))
        return chosen(launched, cluster=str(file), **sections)

    quick, slow = on("InfiniBand-NDR"), on("Ethernet-10")
    assert quick.plan.world_size == slow.plan.world_size == 16
    assert seconds(slow) > seconds(quick)
    # A given layout is predicted on those machines too.
    given = {"parallel": {"dp_shard": 16}}
    assert seconds(on("Ethernet-10", **given)) > 1.5 * seconds(on("InfiniBand-NDR", **given))
    # Without a launcher the recipe runs on this machine, whatever it says of others.
    alone = chosen(H100S, cluster=str(tmp_path / "cluster.yaml"))
    assert alone.plan.world_size <= 8
    with pytest.raises(UserError, match="describes 16 devices, and 24 workers") as caught:
        chosen(replace(H100S, launched=24), cluster=str(tmp_path / "cluster.yaml"))
    assert caught.value.mistakes[0].key == "cluster"
    there = machine_of(load_cluster(tmp_path / "cluster.yaml"))
    assert (there.launched, there.devices, there.device_kind) == (16, 8, "cuda")
    assert there.has_float8


def test_the_job_is_what_the_recipe_says() -> None:
    choice = chosen()
    assert choice.question is not None
    job = choice.question.job
    assert job.batch_tokens == 64 * 2048
    assert job.config.num_layers == choice.question.config.num_layers
    assert job == asked_of(choice.question.recipe, job.config, choice.question.here()).job

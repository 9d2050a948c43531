"""Plans for a launcher's workers of unequal speed, as `cluster.yaml` describes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.planner.pools import described
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.planner.choose import Choice, choose_plan
from trainwright.planner.cluster.load import load_cluster
from trainwright.planner.cost.step import predict
from trainwright.planner.explain import explain_plan
from trainwright.planner.job import Job
from trainwright.planner.layout import split_rows
from trainwright.planner.plan import Machine
from trainwright.planner.search.devices import launched_ranks
from trainwright.recipe.presets import model_config
from trainwright.recipe.schema import ModelSection, Recipe

MODEL = ModelSection(family="llama", preset="15m")


def chosen(cluster: Path, workers: int, rows: int = 64) -> Choice:
    recipe = Recipe.model_validate(
        {
            "model": MODEL.model_dump(),
            "tokenizer": {"train": {"vocab_size": 4096}},
            "data": {"sequence_length": 512},
            "training": {"steps": 10, "batch_sequences": rows, "precision": "fp32"},
            "cluster": str(cluster),
        }
    )
    machine = Machine(1, "cpu", 4, 64 << 30, launched=workers)
    return choose_plan(recipe, machine)


def test_rows_go_by_speed(tmp_path: Path) -> None:
    file = described(tmp_path, quick=(300, 1), slow=(100, 1))
    choice = chosen(file, workers=2)
    plan, cluster = choice.plan, load_cluster(file)
    assert choice.origin == "searched" and plan.dp_replicate == 2
    quick, slow = plan.rows_by_replica
    assert quick + slow == 64 and 2.5 < quick / slow < 3.5
    even = replace(plan, rows_by_replica=(), micro_batch=1, accumulation=32, ranks=())
    assert choice.prediction is not None
    config = decoder_config(new_hf_config("llama", model_config(MODEL), 4096))
    there = predict(Job(config, 512, 64), even, cluster).step_seconds.value
    assert there > 1.5 * choice.prediction.step_seconds.value
    counts = f"{plan.accumulation_of(0)}, {plan.accumulation_of(1)} (by replica) × "
    assert any(counts in value for _, value in explain_plan(plan, None))


def test_the_launchers_ranks_are_found_where_pools_stand_in_another_order(tmp_path: Path) -> None:
    cluster = load_cluster(described(tmp_path, first=(300, 4), second=(100, 2)))
    first, second = cluster.pools
    halves = replace(first, nodes=2), replace(second, nodes=1)
    for pools, ranks in (
        ((first, second), ()),
        ((second, first), (4, 5, 0, 1, 2, 3)),
        (halves * 2, (0, 1, 4, 2, 3, 5)),
    ):
        assert launched_ranks(cluster, replace(cluster, pools=pools)) == ranks


@pytest.mark.parametrize(
    ("speeds", "unit"), [((3.0, 1.0), 1), ((1.0, 1.0, 5.0), 2), ((7.0, 2.0, 1.5, 1.0), 1)]
)
def test_rows_are_split_as_well_as_can_be(speeds: tuple[float, ...], unit: int) -> None:
    """Against every way to share them out."""

    def splits(units: int, workers: int) -> list[tuple[int, ...]]:
        if workers == 1:
            return [(units,)]
        return [
            (n, *rest)
            for n in range(1, units - workers + 2)
            for rest in splits(units - n, workers - 1)
        ]

    def slowest(rows: tuple[int, ...]) -> float:
        return max(own / speed for own, speed in zip(rows, speeds, strict=True))

    for units in range(len(speeds), 20):
        found = split_rows(unit * units, speeds, unit)
        best = min(unit * slowest(each) for each in splits(units, len(speeds)))
        assert sum(found) == unit * units and not any(own % unit for own in found)
        assert slowest(found) == pytest.approx(best)
    with pytest.raises(ValueError, match="rows"):
        split_rows(len(speeds) - 1, speeds)

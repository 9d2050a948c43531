"""Reference scores taken once: the same losses as with a reference in every step, and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.tuning import THIN, recipe_of, records, saved, train, written
from tests.workers import run_on
from trainwright.recipe.schema import Adapter, Recipe
from trainwright.training import assemble, reference_cache
from trainwright.training.run_directory import RunDirectory

CASES: dict[str, dict[str, Any]] = {
    "dpo": {"objective": {"kind": "dpo"}},
    "dpo, adapter": {"objective": {"kind": "dpo"}, "adapter": {"rank": 4}},
    "kto": {"objective": {"kind": "kto"}},
    "kto, unpacked": {"objective": {"kind": "kto"}, "data": {"packing": "none"}},
}
PLANS: dict[str, dict[str, Any]] = {
    "cp 2": {"cp": 2},
    "tp 2": {"tp": 2},
    "pp 2": {"pp": 2, "micro_batch": 1},
    "zero 3": {"zero": 3},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / "base", THIN, 1)


def source(folder: Path, kind: str, name: str = "rows", count: int = 34) -> Path:
    """Pairs, or judged answers, of uneven lengths."""
    rows: list[dict[str, Any]] = []
    for n in range(count):
        prompt, answer = f"{n} and one is ", f"{n + 1}" + "!" * (n % 7)
        if kind == "kto":
            rows.append({"prompt": prompt, "completion": answer, "label": n % 3 > 0})
        else:
            rows.append({"prompt": prompt, "chosen": answer, "rejected": f"{n}" + "?" * (n % 5)})
    return written(folder / f"{name}.jsonl", rows)


def runs_of(tmp_path: Path, base: Path, case: str, **sections: Any) -> dict[bool, Recipe]:
    """The case's recipe without and with its reference's scores taken beforehand.

    Two weighted sources, more than two epochs, held-out rows.
    """
    kind = CASES[case]["objective"]["kind"]
    files = [source(tmp_path, kind, "one"), source(tmp_path, kind, "other", 21)]
    sources = [{"path": str(file), "weight": n + 1} for n, file in enumerate(files)]
    made = {}
    for cached in (False, True):
        values = {
            **CASES[case],
            "objective": {**CASES[case]["objective"], "cache_reference": cached},
            "data": {"sources": sources, "validation": 0.2, **CASES[case].get("data", {})},
            "training": {"steps": 14, "batch_sequences": 4},
            "optimizer": {"learning_rate": 2e-3},
            "evaluation": {"every": 7},
            "run_directory": str(tmp_path / f"{case} {cached}"),
            **sections,
        }
        made[cached] = recipe_of(tmp_path, base, **values)
    return made


def losses(run: RunDirectory, kinds: tuple[str, ...] = ("step", "evaluation")) -> list[float]:
    return [each["loss"] for kind in kinds for each in records(run, kind)]


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_a_reference_in_every_step(case, base, tmp_path) -> None:
    recipes = runs_of(tmp_path, base, case)
    live, cached = (losses(train(recipe)) for recipe in recipes.values())
    assert len(cached) > 14
    assert abs(cached[13] - cached[0]) > 1e-3  # something was learnt
    np.testing.assert_allclose(cached, live, rtol=1e-6, atol=1e-6)


def train_there(recipe: dict[str, Any], kinds: tuple[str, ...]) -> list[float]:
    return losses(train(Recipe.model_validate(recipe)), kinds)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "plan"), [("dpo", "cp 2"), *(("kto", plan) for plan in PLANS)])
def test_every_parallelism_takes_the_same_scores(case, plan, base, tmp_path, monkeypatch) -> None:
    recipes = runs_of(tmp_path, base, case)
    # KTO's held-out loss depends on how many rows are scored at once, by its point of comparison.
    kinds = ("step",) if case == "kto" else ("step", "evaluation")
    live = losses(train(recipes[False]), kinds)
    changed = recipes[True].model_dump(exclude_unset=True)
    changed["parallel"] = {"workers": 2, "threads": 1, **PLANS[plan]}
    spread = run_on(2, train_there, changed, kinds)[0]
    np.testing.assert_allclose(spread, live, rtol=2e-6, atol=2e-6)
    # And on one worker from the scores that two have written.
    monkeypatch.setattr(assemble, "build_reference", never)
    alone = recipes[True].model_copy(update={"run_directory": tmp_path / "alone"})
    np.testing.assert_allclose(losses(train(alone), kinds), live, rtol=2e-6, atol=2e-6)


def never(*arguments: Any) -> None:
    raise AssertionError("the reference was made")


def test_a_second_run_finds_the_scores_and_makes_no_reference(
    base, tmp_path, monkeypatch, capsys
) -> None:
    recipe = runs_of(tmp_path, base, "dpo")[True]
    train(recipe)
    assert "asking the reference about 55 examples" in capsys.readouterr().out
    monkeypatch.setattr(assemble, "build_reference", never)
    others = {"seed": 5}, {"adapter": Adapter(rank=4, init="pissa")}
    for number, other in enumerate(others):
        directory = tmp_path / f"again {number}"
        run = train(recipe.model_copy(update={"run_directory": directory, **other}))
        assert "is in the cache" in capsys.readouterr().out
        assert losses(run)[0] == pytest.approx(np.log(2), abs=1e-6)


def test_a_run_goes_on_to_the_same_losses(base, tmp_path) -> None:
    recipe = runs_of(tmp_path, base, "dpo")[True]
    whole = train(recipe.model_copy(update={"run_directory": tmp_path / "whole"}))
    train(recipe, steps=7)
    again = train(recipe)
    assert losses(again, ("step",)) == losses(whole, ("step",))


def folders(tmp_path: Path) -> set[str]:
    return {file.parent.name for file in (tmp_path / "cache" / "references").glob("*/scores.bin")}


@pytest.mark.parametrize("what", ["weights", "precision", "data", "quantise"])
def test_what_has_changed_is_asked_anew(what, base, tmp_path) -> None:
    recipe = runs_of(tmp_path, base, "dpo")[True].model_dump(exclude_unset=True)
    recipe["training"]["steps"] = 1
    train(Recipe.model_validate(recipe))
    before = folders(tmp_path)
    recipe["run_directory"] = str(tmp_path / "changed")
    if what == "weights":
        recipe["objective"]["reference"] = str(saved(tmp_path / "another", THIN, 7))
    elif what == "precision":
        recipe["training"]["precision"] = "bf16"
    elif what == "data":
        source(tmp_path, "dpo", "one", 35)
    else:
        recipe["adapter"] = {"rank": 4, "quantise": "int8"}
    train(Recipe.model_validate(recipe))
    new = folders(tmp_path) - before
    assert len(before) == 2
    assert len(new) == (1 if what == "data" else 2)


def test_a_changed_file_of_the_reference_is_seen(base, tmp_path) -> None:
    recipe = runs_of(tmp_path, base, "dpo")[True]
    train(recipe.model_copy(update={"run_directory": tmp_path / "first"}))
    before = folders(tmp_path)
    for file in saved(tmp_path / "another", THIN, 7).iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    second = recipe.model_copy(update={"run_directory": tmp_path / "second"})
    train(second)
    assert len(folders(tmp_path) - before) == 2


def test_what_is_broken_off_leaves_nothing_behind(base, tmp_path, monkeypatch) -> None:
    recipe = runs_of(tmp_path, base, "dpo")[True]
    asked, write = reference_cache._asked, reference_cache._write

    def broken_off(reference: Any, cache: Any, *others: Any) -> Any:
        if cache.documents == 21:
            raise KeyboardInterrupt
        return asked(reference, cache, *others)

    def half_written(scores: Any, folder: Path) -> dict[str, Any]:
        write(scores[: len(scores) // 2], folder)
        raise KeyboardInterrupt

    for name, broken in (("_asked", broken_off), ("_write", half_written)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(reference_cache, name, broken)
            train(recipe)
        assert folders(tmp_path) == set()
    live = losses(train(runs_of(tmp_path, base, "dpo")[False]))
    np.testing.assert_allclose(losses(train(recipe)), live, rtol=1e-6, atol=1e-6)


def test_a_damaged_file_is_not_believed(base, tmp_path, monkeypatch) -> None:
    recipe = runs_of(tmp_path, base, "dpo")[True]
    train(recipe)
    references = tmp_path / "cache" / "references"
    for file in references.glob("*/scores.bin"):
        file.write_bytes(bytes(file.stat().st_size))
    train(recipe.model_copy(update={"run_directory": tmp_path / "again"}))
    for file in references.glob("*/scores.bin"):
        assert np.fromfile(file, "<f4").max() < 0
    assert json.loads((next(references.glob("*/manifest.json"))).read_text())

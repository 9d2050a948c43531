"""Evaluation: losses by source on every layout, and pairs by their own objective."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import assemble_here, small_recipe
from tests.training.test_exactness import EVEN, LAYOUTS
from tests.training.tuning import THIN, recipe_of, saved, train
from tests.workers import run_on
from trainwright.data.prepare import open_data
from trainwright.report.history import read_history
from trainwright.report.html import render
from trainwright.training.hooks import Every
from trainwright.training.metrics import read_metrics
from trainwright.training.score import open_subject, score

WORDS = ["red", "green", "blue", "old", "new", "round", "square", "small"]


def sources(folder: Path) -> list[str]:
    """Three files of documents unlike each other in kind and length."""
    kinds = {"a": (40, "{w} "), "b": (25, "{w}, {n} and {n}. "), "c": (9, "{n}+{n};")}
    for name, (documents, phrase) in kinds.items():
        lines = []
        for n in range(documents):
            text = "".join(phrase.format(w=WORDS[(n + k) % 8], n=n) for k in range(1 + n % 3))
            lines.append(json.dumps({"text": f"{name}{n} {text}"}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return [str(folder / f"{name}.jsonl") for name in kinds]


def several(folder: Path, **sections: Any) -> Any:
    data = {"sources": sources(folder), "validation": 0.4, "packing": "best-fit"}
    model = {"config": {**EVEN, "num_hidden_layers": 4}}
    return small_recipe(folder, model=model, data=data, **sections)


def evaluations(folder: str, parallel: dict, rows: int | None = None) -> list[dict]:
    """What is on record of an evaluation of untrained weights, on this layout."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    recipe = several(
        path, parallel={"micro_batch": 2, **parallel}, evaluation={"every": 1000, "rows": rows}
    )
    assembled = assemble_here(recipe)
    hook = assembled.trainer.hooks[-2]
    hook.every, at = (Every(1), 1) if rows else (Every(1000), 20)
    hook.after_step(at, StepOf(), 0.0, True)
    assembled.store.close()
    if assembled.writer is None:
        return []
    assembled.writer.close()
    return [r for r in read_metrics(path / "run") if r["kind"] == "evaluation"]


class StepOf:
    stop_requested = False


def held_out_texts(folder: Path) -> list[bytes]:
    """The documents that the run in `folder` holds out."""
    batches = open_data(folder / "run").validation["validation"]
    names = [name for row in batches.read(range(batches.rows)).documents for name in row]
    texts = []
    for file, _, line in (name.partition(":") for name in dict.fromkeys(names)):
        row = (folder / file).read_text().splitlines()[int(line) - 1]
        texts.append(json.loads(row)["text"].encode())
    return texts


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory) -> tuple[dict[str, tuple[float, int]], int]:
    """Loss sums and targets by source, a document at a time, by transformers' own model; bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainwright.models.weights import save_model

    folder = tmp_path_factory.mktemp("plain")
    assembled = assemble_here(several(folder))
    save_model(assembled.trainer.step.spread.model, folder / "saved")
    model = LlamaForCausalLM.from_pretrained(
        folder / "saved", config=LlamaConfig.from_pretrained(folder / "saved")
    )
    assembled.store.close()
    found: dict[str, tuple[float, int]] = {}
    for text in held_out_texts(folder):
        ids = torch.tensor([[256, *text, 257]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        total, targets = found.get(source := chr(text[0]), (0.0, 0))
        found[source] = (total + loss, targets + ids.shape[1] - 1)
    return found, sum(map(len, held_out_texts(folder)))


@pytest.mark.parametrize(
    "layout", [{"workers": 1}, *LAYOUTS], ids=lambda layout: " ".join(list(layout)[-2:])
)
def test_held_out_loss_is_told_of_each_source(layout, plain_losses, tmp_path) -> None:
    expected, size = plain_losses
    assert len(expected) == 3
    got = run_on(layout["workers"], evaluations, str(tmp_path), layout)[0]
    found = {record["name"]: record for record in got}
    assert list(found) == ["validation", *(f"validation/{name}" for name in expected)]
    for name, (total, targets) in expected.items():
        assert found[f"validation/{name}"]["targets"] == targets
        assert found[f"validation/{name}"]["loss"] == pytest.approx(total / targets, rel=1e-5)
    whole = [sum(each) for each in zip(*expected.values(), strict=True)]
    assert found["validation"]["loss"] == pytest.approx(whole[0] / whole[1], rel=1e-5)
    assert found["validation"]["bits_per_byte"] == pytest.approx(whole[0] / math.log(2) / size)


def test_a_few_rows_are_shared_among_the_sources(tmp_path) -> None:
    whole, *parts = evaluations(str(tmp_path), {"workers": 1}, rows=4)
    assert [part["name"] for part in parts] == [f"validation/{name}" for name in "abc"]
    targets = sum(part["targets"] for part in parts)
    mean = sum(part["loss"] * part["targets"] for part in parts) / targets
    assert (whole["targets"], whole["loss"]) == (targets, pytest.approx(mean, rel=1e-9))
    assert all(part["targets"] < len("word") * 64 * 4 for part in parts)
    page = render(read_history(tmp_path / "run"))
    assert "validation/b loss" in page


PAIR_RUNS: dict[str, dict[str, Any]] = {
    "dpo": {"objective": "dpo"},
    "adapter": {
        "objective": "dpo",
        "adapter": {"rank": 4, "init": "pissa", "train_also": ["lm_head"]},
    },
    "simpo": {"objective": "simpo"},
    "kto": {"objective": "kto"},
    "reward": {"objective": "reward"},
    "distill": {"objective": {"kind": "distill", "teacher": "BASE", "mix": 0.5}},
}


@pytest.mark.parametrize("name", PAIR_RUNS)
def test_evaluate_scores_a_run_by_what_it_optimises(name, base, tmp_path) -> None:

    file = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"{n}+{n}=", "chosen": f"{2 * n}", "rejected": f"{2 * n + 1}."}
        if name not in ("kto", "distill")
        else {"prompt": f"{n}+{n}=", "completion": f"{2 * n + n % 2}", "label": n % 2 == 0}
        for n in range(30)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = json.loads(json.dumps(PAIR_RUNS[name]).replace("BASE", str(base)))
    run = train(recipe_of(tmp_path, base, file, data={"validation": 0.3}, **sections))
    told = [r for r in read_metrics(run.path) if r["kind"] == "evaluation"][-1]
    # KTO's point of comparison is taken over the rows that go through the model together.
    plan = run.read_plan()
    [result] = score(open_subject(run.path), batch=plan.micro_batch).values()
    found = result.record()
    assert ({"rewards/chosen", "rewards/rejected"} <= found.keys()) == (name != "distill")
    assert ("rewards/margins" in found) == (name not in ("kto", "distill"))
    for key, value in found.items():
        assert told[key] == (None if value is None else pytest.approx(value, rel=1e-4)), key
    # The same pairs as files of their own; all of them, so other numbers.
    [other] = score(open_subject(run.path), [str(file)]).values()
    assert other.targets > result.targets and math.isfinite(other.loss)
    if "rewards/margins" in found:
        assert "preferred" in render(read_history(run.path))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / "base", THIN, seed=1)

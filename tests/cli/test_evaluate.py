"""`trainwright evaluate`: sources apart, tasks by file and by name, lm-eval, refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

import trainwright
from tests.training.runs import small_recipe, train_here, write_texts
from trainwright.cli.main import main

ROWS = [
    {"question": f"the {n} cat", "choices": ["sat on", "and one"], "answer": n % 2}
    for n in range(5)
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two sources and one task."""
    folder = tmp_path_factory.mktemp("evaluate")
    texts = write_texts(folder)
    (folder / "others.jsonl").write_text(texts.read_text().replace("cat", "dog"))
    task = folder / "cats.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    train_here(
        small_recipe(
            folder,
            training={"steps": 2},
            data={"sources": [str(texts), str(folder / "others.jsonl")], "validation": 0.3},
            evaluation={"tasks": [{"path": str(task), "rows": 4}]},
        )
    )
    return folder / "run"


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments: object, expect: int = 0) -> str:
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr("sys.argv", ["trainwright", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        said = capsys.readouterr()
        assert int(exit_.value.code or 0) == expect, said
        assert "Traceback" not in said.err
        return said.out if expect == 0 else said.err

    return call


def records(run: Path, kind: str) -> dict[str, dict]:
    lines = map(json.loads, (run / "metrics.jsonl").open())
    return {line["name"]: line for line in lines if line["kind"] == kind}


def test_a_run_is_scored_as_its_training_scored_it(run, command):
    told = json.loads(command(run, "--json"))
    trained, tasks = records(run, "evaluation"), records(run, "task")
    assert list(trained) == ["validation", "validation/texts", "validation/others"]
    for name, record in trained.items():
        assert told[name]["targets"] == record["targets"]
        assert told[name]["loss"] == pytest.approx(record["loss"], rel=1e-5)
    assert told["tasks"].keys() == tasks.keys() == {"cats"}
    assert told["tasks"]["cats"].items() <= tasks["cats"].items()
    assert told["tasks"]["cats"]["rows"] == 4
    answers = (run / "tasks" / "cats-step-00000002.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in answers] == [
        f"cats.jsonl:{n}" for n in (1, 2, 3, 4)
    ]


def test_tasks_are_named_or_files_and_results_are_a_table_and_a_file(run, command, tmp_path):
    named = command(run, "--task", "cats", "--output", tmp_path / "named.json")
    assert "acc_norm" in named and "standard error" in named
    file = run.parent / "cats.jsonl"
    exported = trainwright.export(run)
    command(
        exported, "--task", file, "--rows", 4, "--output", tmp_path / "file.json",
        "--answers", tmp_path / "answers",
    )  # fmt: skip
    results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("named", "file")]
    assert results[0] == results[1] and results[0]["tasks"]["cats"]["rows"] == 4
    assert len((tmp_path / "answers" / "cats.jsonl").read_text().splitlines()) == 4


def test_what_cannot_be_asked_is_refused(run, command, tmp_path, monkeypatch):
    file = run.parent / "cats.jsonl"
    assert "missing.jsonl" in command(run, "--task", "missing.jsonl", expect=2)
    assert "no regular expression" in command(run, "--task", file, "--extract", "(", expect=2)
    assert "chat template" in command(run, "--task", file, "--chat", expect=2)
    assert "--task" in command(trainwright.export(run), expect=2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "trainwright[harness]" in command(run, "--harness", "arc_easy", expect=2)


def test_lm_eval_runs_tasks_of_ones_own(run, command, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "cats.yaml").write_text(
        f"""
task: our_cats
dataset_path: json
dataset_kwargs: {{data_files: {{test: {run.parent / "cats.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
    )
    told = json.loads(command(run, "--harness", tmp_path / "tasks", "--rows", 4, "--json"))
    ours = json.loads(command(run, "--task", "cats", "--json"))["tasks"]["cats"]
    found = told["harness"]["our_cats"]
    # The same questions in our own words: plain ASCII, so a letter is a byte.
    assert found["rows"] == 4
    for name in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert found[name] == pytest.approx(ours[name])
    assert "our_cats" in command(run, "--harness", tmp_path / "tasks", "--rows", 2)

"""`trainwright report`: the path on standard output, and help for who names no run."""

from __future__ import annotations

import json
import os
import webbrowser
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from trainwright.cli.report import report
from trainwright.errors import UserError

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(report)


def make_run(directory: Path, age: int = 0) -> Path:
    directory.mkdir(parents=True)
    metrics = directory / "metrics.jsonl"
    metrics.write_text(json.dumps({"kind": "step", "step": 1, "loss": 2.0}) + "\n")
    os.utime(metrics, (1_000_000 - age, 1_000_000 - age))
    return directory


def run_report(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def mistake_of(*arguments: str) -> str:
    result = run_report(*arguments)
    assert isinstance(result.exception, UserError)
    return str(result.exception)


def test_it_prints_the_path_of_the_page(tmp_path):
    run = make_run(tmp_path / "runs" / "one")
    result = run_report(str(run))
    assert result.exit_code == 0 and result.output.strip() == str(run / "report.html")
    assert "<!doctype html>" in (run / "report.html").read_text()


def test_open_hands_the_page_to_the_browser(tmp_path, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    run = make_run(tmp_path / "a run")
    assert run_report(str(run), "--open").exit_code == 0
    assert opened == [(run / "report.html").as_uri()]
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    result = run_report(str(run), "--open")
    assert result.exit_code == 0 and "no browser" in result.output


def test_a_missing_run_is_answered_with_those_nearby_newest_first(tmp_path, monkeypatch):
    make_run(tmp_path / "runs" / "old", age=50)
    make_run(tmp_path / "runs" / "new")
    make_run(tmp_path / "elsewhere" / "other", age=10)
    monkeypatch.chdir(tmp_path)
    said = mistake_of("runs/typo")
    assert "there is no run at runs/typo" in said
    assert "choose one of: runs/new, runs/old" in said and "other" not in said
    assert "runs/new, runs/old" in mistake_of("typo"), "`runs/` here is always looked into"
    said = mistake_of(str(tmp_path / "elsewhere" / "typo"))
    assert str(tmp_path / "elsewhere" / "other") in said


def test_a_folder_of_runs_lists_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(10):
        make_run(tmp_path / "runs" / f"run{number}", age=number)
    said = mistake_of("runs")
    assert "runs holds no run: it has no metrics.jsonl" in said
    assert "runs/run0, runs/run1" in said and "and 2 more" in said


def test_where_nothing_is_near_the_next_step_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert "trainwright train RECIPE" in mistake_of("nothing")
    assert "file is a file; a run is a folder" in mistake_of("file")


@pytest.mark.parametrize("word", ["runs/quickstart", "--open"])
def test_help_has_an_example(word):
    assert word in run_report("--help").output

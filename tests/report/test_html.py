"""The report page: self-contained, true to the records, and honest about what is missing."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from trainwright.errors import UserError
from trainwright.report.history import read_history
from trainwright.report.html import figures, flatten, warnings, write_report

VOID = {"meta", "br", "line", "path", "circle", "rect", "link", "img"}


class Page(HTMLParser):
    """Collects tags, addresses and text, and checks that what opens also closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action")]
        assert not any(name.startswith("on") for name, _ in attributes), "no inline scripts"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(directory) -> Page:
    path = write_report(directory)
    assert path == directory / "report.html"
    return Page(path.read_text())


def test_the_page_stands_alone(make_run):
    directory = make_run()
    page = report(directory)
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert set(page.addresses) == {"metrics.jsonl", "export"}
    text = (directory / "report.html").read_text()
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert page.text.count("quickstart") >= 2
    for heading in ("Loss", "Learning rate", "Gradient norm", "Throughput", "Memory", "Samples"):
        assert heading in page.text


def test_figures_are_the_records(make_run, run_records):
    records = run_records(60)
    steps = [record for record in records if record["kind"] == "step"]
    last = next(record for record in reversed(records) if record["kind"] == "evaluation")
    history = read_history(make_run(records=records))
    found = {figure.label: figure.value for figure in figures(history)}
    mean = sum(record["loss"] for record in steps[-20:]) / 20
    assert found["train loss"] == f"{mean:.3f}"
    assert found["validation loss"] == f"{last['loss']:.3f}"
    assert found["bits per byte"] == f"{last['bits_per_byte']:.3f}"
    assert found["tokens"] == "246k"  # 60 × 4,096
    assert found["parameters"] == "4.12M"
    speeds = sorted(record["tokens_per_second"] for record in steps)
    assert found["tokens per second"] == f"{(speeds[29] + speeds[30]) / 2:,.0f}"
    assert found["peak memory"] == "1.18 GB"
    assert found["time"] == "29 s"
    assert "MFU" not in found, "unknown is left out, never 0"
    assert warnings(history) == []


def test_several_held_out_sets_are_told_apart(make_run):
    evaluations = [
        {"kind": "evaluation", "step": step, "name": name, "loss": loss, "bits_per_byte": None}
        for step, name, loss in [(1, "code", 3.0), (1, "prose", 4.0), (2, "code", 2.5)]
    ]
    again = {"kind": "evaluation", "step": 2, "name": "code", "loss": 2.25}
    history = read_history(make_run(records=[*evaluations, again]))
    found = {figure.label: (figure.value, figure.note) for figure in figures(history)}
    assert found == {"code loss": ("2.250", ""), "prose loss": ("4.000", "")}


def test_a_crashed_and_restarted_run_with_broken_losses_says_so(make_run, run_records):
    records = run_records(60)[:-1]
    cut = next(index for index, record in enumerate(records) if record.get("step") == 31)
    records.insert(cut, {"kind": "start", "step": 30, "time": records[cut]["time"]})
    for record in records:
        if record["kind"] == "step" and record["step"] in (40, 41):
            record["loss"] = math.nan
        record["time"] += 1000 if record.get("step", 0) > 30 or record is records[cut] else 0
    directory = make_run(records=records)
    page = report(directory)
    assert "unfinished" in page.text and "no end on record" in page.text
    assert "restarted once, from step 30" in page.text
    assert "not a number at 2 steps, first at step 40" in page.text
    assert read_history(directory).seconds == pytest.approx(28, abs=1), "the pause is not work"


def test_starting_a_finished_run_again_is_no_restart(make_run, run_records):
    again = [{"kind": "start", "step": 60, "total_steps": 60}, {"kind": "end", "step": 60}]
    assert warnings(read_history(make_run(records=[*run_records(60), *again]))) == []


def test_a_stopped_run_is_not_called_finished(make_run, run_records):
    records = run_records(60)[:40]
    history = read_history(make_run(records=[*records, {"kind": "end", "step": 39}]))
    assert history.status == "stopped"
    assert warnings(history)[0].startswith("The run stopped at step ")


def test_samples_and_recipes_are_text_never_markup(make_run):
    evil = "</pre><script>alert(1)</script><b onclick=x>"
    sample = {"kind": "sample", "step": 1, "prompt": evil, "completion": evil + "\ud800"}
    directory = make_run(records=[sample, {"kind": "start", "step": 0, "name": evil}])
    (directory / "recipe.yaml").write_text(f"# {evil}\n")
    page = report(directory)
    assert "script" not in page.tags and page.text.count("alert(1)") >= 4


def test_a_long_run_with_huge_samples_stays_under_a_megabyte(make_run, run_records):
    records = run_records(20_000)
    records += [
        {"kind": "sample", "step": step, "prompt": "p", "completion": "word " * 20_000}
        for step in range(1, 200)
    ]
    directory = make_run(records=records)
    (directory / "resolved.yaml").write_text("key: value\n" * 50_000)
    page = report(directory)
    assert (directory / "report.html").stat().st_size < 1_000_000
    assert "more letters" in page.text and "earlier steps are in metrics.jsonl" in page.text


def test_missing_and_broken_files_are_named_not_fatal(make_run):
    directory = make_run()
    for name in ("recipe.yaml", "environment.json"):
        (directory / name).unlink()
    (directory / "plan.json").write_text("{torn")
    shutil.rmtree(directory / "export")
    page = report(directory)
    assert "recipe.yaml (the recipe as given)" in page.text
    assert "environment.json (the machine and the versions)" in page.text
    assert "Missing from this folder" in page.text and page.addresses == ["metrics.jsonl"]


def test_a_run_that_has_not_made_a_step_has_a_page(make_run):
    page = report(make_run(records=[{"kind": "start", "step": 0}]))
    assert "nothing to draw" in page.text


def test_without_metrics_there_is_no_report(tmp_path):
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_environment_becomes_rows():
    nested = {"memory_bytes": 2e9, "versions": {"torch": "2.13"}, "gpus": [], "a_b": None, "x": 2}
    assert flatten(nested) == [("memory", "2.00 GB"), ("versions torch", "2.13"), ("x", "2")]


def test_the_report_needs_no_torch():
    code = "import sys, trainwright.report.html; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

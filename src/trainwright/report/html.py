"""One HTML page about a run: figures, charts, samples, recipe, machine. Nothing is fetched by it.

`write_report` reads the run directory; the page works from file:// and follows the reader's light
or dark setting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trainwright.errors import UserError
from trainwright.files import write_atomically
from trainwright.report.charts import Chart, draw_charts
from trainwright.report.foretold import foretold_charts, plan_record, step_rows, trial_rows
from trainwright.report.history import (
    LAST_STEPS,
    History,
    final_loss,
    finite,
    median,
    read_history,
)
from trainwright.report.records import METRICS_FILE, SCORES
from trainwright.report.tables import (
    bytes_text,
    count_text,
    date_text,
    duration_text,
    percent_text,
    significant,
)
from trainwright.report.traffic import traffic_rows

REPORT_FILE = "report.html"
MOST_SAMPLED_STEPS = 12  # the page stays under 1 MB; all samples are in metrics.jsonl
MOST_SAMPLE_LETTERS = 3_000
MOST_TEXT_LETTERS = 60_000


class Figure(NamedTuple):
    """A result in a tile: what it is, its value, and a small note."""

    label: str
    value: str
    note: str = ""


class SampledStep(NamedTuple):
    """All samples of one step."""

    step: int
    samples: list[Mapping[str, Any]]


def write_report(run_directory: Path) -> Path:
    """Write `report.html` into a run's directory and return its path.

    Files that are missing are named on the page. Raises UserError where there are no metrics at
    all, or a line of them is broken.
    """
    if not (run_directory / METRICS_FILE).is_file():
        raise UserError(
            f"{run_directory} has no {METRICS_FILE}, so there is nothing to report",
            fix="give the folder of a run that was started with `trainwright train`",
        )
    path = run_directory / REPORT_FILE
    # Samples may hold halves of characters, which have no UTF-8 form.
    write_atomically(path, render(read_history(run_directory)).encode(errors="replace"))
    return path


def render(history: History) -> str:
    """The page as text."""
    loader = Environment(
        loader=PackageLoader("trainwright", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, _, _ = loader.loader.get_source(loader, "page.css")  # type: ignore[union-attr]
    shown = latest_samples(history)
    charts: list[Chart] = draw_charts(history)
    record = plan_record(history)
    return loader.get_template("page.html").render(
        style=Markup(style),
        name=run_name(history),
        status=history.status,
        subtitle=subtitle(history),
        figures=figures(history),
        warnings=warnings(history),
        charts=charts,
        tasks=task_rows(history),
        foretold=step_rows(history, record),
        reason="" if record is None else record.reason,
        rates="" if record is None or record.prediction is None else record.prediction.source,
        foretold_charts=foretold_charts(record),
        trials=trial_rows(record),
        traffic=traffic_rows(history),
        sampled=shown,
        hidden_samples=len({record["step"] for record in history.samples}) - len(shown),
        texts=folded_texts(history),
        environment=flatten(history.document("environment.json")),
        files=links(history.directory),
        missing=history.missing,
    )


def run_name(history: History) -> str:
    """The recipe's name, or the folder's."""
    return history.fact("name") or history.directory.absolute().name


def subtitle(history: History) -> list[str]:
    """When, how far, and on which machine."""
    environment = history.document("environment.json")
    total = history.fact("total_steps")
    steps = f"{history.steps:,} of {total:,} steps" if total else f"{history.steps:,} steps"
    facts = [date_text(history.first_time), steps]
    devices = environment.get("cuda_devices") or []
    cores = environment.get("cores")
    if devices:
        facts.append(f"{len(devices)} × {devices[0]}")
    elif environment.get("cpu"):
        facts.append(f"{environment['cpu']}, {cores} cores" if cores else environment["cpu"])
    workers = worker_count(history)
    if workers:
        facts.append("1 worker" if workers == 1 else f"{workers} workers")
    return facts


def worker_count(history: History) -> int | None:
    """Workers that the plan names, or the run's start."""
    return history.document("plan.json").get("world_size") or history.fact("world_size")


def figures(history: History) -> list[Figure]:
    """The results in the order a reader asks for them; what is not known is left out."""
    columns = history.columns
    found: list[Figure] = []
    for name in history.validation_names:
        records = history.evaluations_of(name)
        label = "validation loss" if len(history.validation_names) == 1 else f"{name} loss"
        best = min(records, key=lambda record: record["loss"])
        note = f"best {significant(best['loss'], 4)} at step {best['step']:,}"
        last = records[-1]
        found.append(Figure(label, significant(last["loss"], 4), "" if best is last else note))
        scored = [record for record in records if record.get("bits_per_byte") is not None]
        if scored:
            found.append(
                Figure(
                    "bits per byte",
                    significant(scored[-1]["bits_per_byte"], 4),
                    f"{name}, step {scored[-1]['step']:,}",
                )
            )
        if last.get("rewards/accuracies") is not None:
            share = percent_text(last["rewards/accuracies"])
            margin = f"{name}, margin {significant(last['rewards/margins'])}"
            found.append(Figure("preferred", share, margin))
    loss = final_loss(history)
    if loss is not None:
        steps = min(LAST_STEPS, len(columns["loss"]))
        found.append(Figure("train loss", significant(loss, 4), f"mean of last {steps} steps"))
    tokens = finite(columns["tokens_total"])
    if tokens:
        found.append(Figure("tokens", count_text(tokens[-1])))
    speed = median(columns["tokens_per_second"])
    if speed is not None:
        found.append(Figure("tokens per second", f"{speed:,.0f}", "median"))
    utilisation = median(columns["mfu"])
    if utilisation is not None:
        found.append(Figure("MFU", percent_text(utilisation), "median"))
    if history.seconds:
        found.append(Figure("time", duration_text(history.seconds)))
    parameters = history.fact("parameters")
    if parameters:
        found.append(Figure("parameters", count_text(parameters)))
    memory = finite(columns["memory_bytes"])
    if memory:
        note = "of one worker" if (worker_count(history) or 1) > 1 else ""
        found.append(Figure("peak memory", bytes_text(max(memory)), note))
    return found


def task_rows(history: History) -> list[tuple[str, str, str, int, int]]:
    """Of every task each score: name, score, its value with the standard error, rows, step."""
    rows = []
    for name, record in history.tasks.items():
        for score in SCORES:
            if score in record:
                error = record.get(f"{score}_stderr")
                value = percent_text(record[score])
                value += "" if error is None else f" ± {percent_text(error)}"
                rows.append((name, score, value, record["rows"], record["step"]))
    return rows


def warnings(history: History) -> list[str]:
    """What a reader should know before trusting the figures."""
    found = []
    if history.end is None:
        found.append("There is no end on record: the run is still going on, or it crashed.")
    elif history.status != "finished":
        reason = history.end.get("reason")
        found.append(
            f"The run {history.status} at step {history.steps:,}"
            + (f": {reason}" if reason else ".")
        )
    if history.broken_steps:
        count, first = len(history.broken_steps), history.broken_steps[0]
        steps = f"step {first:,}" if count == 1 else f"{count:,} steps, first at step {first:,}"
        found.append(f"The loss was not a number at {steps}.")
    if history.restarts:
        steps = ", ".join(f"{record.get('step', 0):,}" for record in history.restarts[:8])
        more = " and more" if len(history.restarts) > 8 else ""
        times = "once" if len(history.restarts) == 1 else f"{len(history.restarts)} times"
        found.append(f"The run was restarted {times}, from step {steps}{more}.")
    if history.skipped_steps:
        steps = (
            "1 step was" if history.skipped_steps == 1 else f"{history.skipped_steps:,} steps were"
        )
        found.append(f"{steps} skipped because the gradients overflowed in fp16.")
    return found


def latest_samples(history: History) -> list[SampledStep]:
    """The samples of the last steps that have any, newest first, long ones cut."""
    by_step = [
        SampledStep(step, [_cut_sample(record) for record in records])
        for step, records in groupby(
            sorted(history.samples, key=lambda record: record["step"]),
            key=lambda record: record["step"],
        )
    ]
    return by_step[::-1][:MOST_SAMPLED_STEPS]


def folded_texts(history: History) -> list[tuple[str, str]]:
    """Heading and content of what the reader may unfold: recipe and plan."""
    texts = []
    for name, heading in (
        ("recipe.yaml", "Recipe"),
        ("resolved.yaml", "Recipe with everything filled in"),
        ("plan.json", "Plan"),
    ):
        if name in history.texts:
            texts.append((heading, _cut(history.texts[name].rstrip(), MOST_TEXT_LETTERS)))
    return texts


def flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested document as rows: `versions torch`, `2.13.0`. Empty values are left out."""
    rows: list[tuple[str, str]] = []
    for key, inner in value.items():
        name = f"{prefix} {key}".strip().replace("_", " ")
        if isinstance(inner, Mapping):
            rows += flatten(inner, name)
        elif key.endswith("bytes") and isinstance(inner, int | float):
            rows.append((name.removesuffix(" bytes"), bytes_text(inner)))
        elif isinstance(inner, list):
            rows.append((name, ", ".join(str(entry) for entry in inner)))
        elif inner is not None:
            rows.append((name, str(inner) if isinstance(inner, str) else json.dumps(inner)))
    return [(name, text) for name, text in rows if text]


def links(run_directory: Path) -> list[tuple[str, str]]:
    """What else lies in the run's folder, as relative addresses with a word on each."""
    known = {
        METRICS_FILE: "all records, one JSON object a line",
        "export": "the model in Hugging Face's layout",
        "checkpoints": "saved states",
        "tasks": "what the model answered",
        "logs": "output of each worker",
        "tensorboard": "TensorBoard's event files",
    }
    return [(name, note) for name, note in known.items() if (run_directory / name).exists()]


def _cut_sample(record: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: _cut(str(record.get(key, "")), MOST_SAMPLE_LETTERS) for key in ("prompt", "completion")
    }


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}\n… {len(text) - most:,} more letters"

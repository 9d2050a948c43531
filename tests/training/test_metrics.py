"""The run's history: standard JSON, one consistent story after crashes, and the trackers."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from trainwright.errors import UserError
from trainwright.recipe.schema import Tracking
from trainwright.report.records import METRICS_FILE, encode_record
from trainwright.training import metrics
from trainwright.training.metrics import MetricsWriter, read_metrics, truncate_after
from trainwright.training.trackers import scalars


def step(number: int, loss: float = 2.0) -> dict:
    return {"kind": "step", "step": number, "loss": loss, "learning_rate": 1e-3, "mfu": None}


def write_run(
    directory: Path,
    records: list[dict],
    tracking: Tracking | None = None,
    resumed_step: int | None = None,
    **how,
) -> None:
    with MetricsWriter(directory, tracking or Tracking(), "demo", {"seed": 1}, **how) as writer:
        if resumed_step is not None:
            writer.truncate_after(resumed_step)
        writer.open()
        for record in records:
            writer.write(record)


class StandIn:
    """Takes the place of wandb and trackio and keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.module = types.ModuleType("stand_in")
        self.module.init = self.init
        self.module.Html = self.module.Markdown = lambda text: ("marked", text)

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    def log(self, values: dict, step: int) -> None:
        self.calls.append(("log", step, values))

    def finish(self) -> None:
        self.calls.append(("finish",))


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_lines_are_standard_json_and_come_back_as_they_were(tmp_path):
    records = [
        {**step(1, math.nan), "gradient_norm": math.inf, "time": 5.0},
        {**step(2, -math.inf), "tokens": np.int64(7), "seconds": np.float32(0.5), "time": 6.0},
        {"kind": "sample", "step": 2, "prompt": "NaN", "completion": "é\n漢 \ud800", "time": 7.0},
        {"kind": "end", "step": 2, "reason": "Infinity", "nested": {"x": [math.nan]}, "time": 8.0},
    ]
    write_run(tmp_path, records)
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    strict = [json.loads(line, parse_constant=refuse_constant) for line in lines]
    assert len(strict) == 4
    back = read_metrics(tmp_path)
    assert math.isnan(back[0]["loss"]) and back[0]["gradient_norm"] == math.inf
    assert back[0]["mfu"] is None
    assert back[1]["loss"] == -math.inf and back[1]["tokens"] == 7 and back[1]["seconds"] == 0.5
    assert back[2] == records[2], "words in samples are words, whatever they spell"
    assert back[3]["reason"] == "Infinity" and strict[3]["nested"] == {"x": ["NaN"]}


def test_every_record_is_on_disk_when_write_returns_and_has_a_time(tmp_path):
    writer = MetricsWriter(tmp_path, Tracking(), "demo", {})
    for number in range(1, 4):
        writer.write(step(number))
        assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, number + 1))
    assert all(record["time"] > 1.6e9 for record in read_metrics(tmp_path))
    writer.close()
    writer.close()


def test_cutting_after_the_first_record_is_refused(tmp_path):
    with MetricsWriter(tmp_path, Tracking(), "demo", {}) as writer:
        writer.write(step(1))
        with pytest.raises(RuntimeError, match="before the first record"):
            writer.truncate_after(0)
    assert len(read_metrics(tmp_path)) == 1


def test_a_tracker_asked_for_later_starts_where_the_run_is(tmp_path, monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "trackio", stand_in.module)
    write_run(tmp_path, [step(1), step(2), step(3)])
    write_run(tmp_path, [step(3)], Tracking(to=["trackio"]), resumed_step=2)
    assert [call[1] for call in stand_in.calls if call[0] == "log"] == [3]


def test_the_step_path_does_not_change_the_callers_record(tmp_path):
    record = step(1)
    write_run(tmp_path, [record])
    assert "time" not in record


def test_resuming_cuts_a_crashed_continuation(tmp_path):
    history = [
        {"kind": "start", "step": 0},
        *(step(number) for number in range(1, 6)),
        {"kind": "checkpoint", "step": 5, "bytes": 1},
        *(step(number) for number in range(6, 9)),
        {"kind": "evaluation", "step": 8, "name": "held-out", "loss": 1.0},
        {"kind": "note", "text": "belongs to step 8, which goes"},
    ]
    write_run(tmp_path, history)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"kind": "step", "step": 9, "lo')
    write_run(tmp_path, [{"kind": "start", "step": 5}, step(6), step(7)], resumed_step=5)
    told = [(record["kind"], record["step"]) for record in read_metrics(tmp_path)]
    assert told == [
        ("start", 0),
        *(("step", number) for number in range(1, 6)),
        ("checkpoint", 5),
        ("start", 5),
        ("step", 6),
        ("step", 7),
    ]


def test_a_torn_last_line_is_dropped_whether_read_or_written_after(tmp_path):
    write_run(tmp_path, [step(1), step(2)])
    whole = (tmp_path / METRICS_FILE).read_bytes()
    for cut in (1, 5, 20):
        (tmp_path / METRICS_FILE).write_bytes(whole[:-cut])
        expected = [1, 2] if cut == 1 else [1]  # without its newline alone, the record is whole
        assert [record["step"] for record in read_metrics(tmp_path)] == expected
        write_run(tmp_path, [step(3)])
        assert [record["step"] for record in read_metrics(tmp_path)] == [*expected, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_bytes(encode_record(step(1)) + b"[1, 2]\n" + encode_record(step(2)))
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: this line is not a record"):
        read_metrics(tmp_path)


def test_cutting_is_atomic_and_leaves_a_good_file_alone(tmp_path, monkeypatch):
    write_run(tmp_path, [step(number) for number in range(1, 9)])
    before = (tmp_path / METRICS_FILE).read_bytes()

    monkeypatch.setattr(metrics, "write_atomically", None)  # would raise if it were called
    assert truncate_after(tmp_path, 8) == 0 and truncate_after(tmp_path, None) == 0
    monkeypatch.undo()

    def power_cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", power_cut)
    with pytest.raises(KeyboardInterrupt):
        truncate_after(tmp_path, 3)
    assert (tmp_path / METRICS_FILE).read_bytes() == before
    monkeypatch.undo()
    assert truncate_after(tmp_path, 3) == 5
    assert before.startswith((tmp_path / METRICS_FILE).read_bytes())
    assert truncate_after(tmp_path / "nowhere", 3) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_a_users_error_that_names_the_file(tmp_path):
    with (
        pytest.raises(UserError, match=r"No space left.*\n.*fix: make room"),
        MetricsWriter(tmp_path, Tracking(), "demo", {}) as writer,
        Path("/dev/full").open("ab", buffering=0) as full,
    ):
        writer.open()
        writer.file.close()
        writer.file = full
        writer.write(step(1))


def test_numbers_that_trackers_show():
    record = {"kind": "evaluation", "step": 4, "name": "held-out", "loss": 2, "bits_per_byte": None}
    assert scalars(record) == {"evaluation/held-out/loss": 2.0}
    assert scalars(step(1)) == {"train/loss": 2.0, "train/learning_rate": 1e-3}
    assert scalars({"kind": "start", "step": 0}) == {}


def read_events(directory: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(directory), size_guidance={"scalars": 0})
    return events.Reload()


def test_tensorboard_has_the_scalars_and_forgets_what_a_crash_left(tmp_path):
    pytest.importorskip("tensorboard")
    tracking = Tracking(to=["tensorboard"])
    evaluation = {"kind": "evaluation", "step": 2, "name": "held-out", "loss": 1.5}
    sample = {"kind": "sample", "step": 2, "prompt": "def f(<", "completion": "x>):"}
    write_run(tmp_path, [step(1, 3.0), step(2, 2.0), evaluation, sample, step(3, 9.0)], tracking)
    write_run(tmp_path, [step(3, 1.0), step(4, 0.5)], tracking, resumed_step=2)
    events = read_events(tmp_path / "tensorboard")
    points = {event.step: event.value for event in events.Scalars("train/loss")}
    assert points == {1: 3.0, 2: 2.0, 3: 1.0, 4: 0.5}
    assert len(events.Scalars("train/loss")) == 4
    assert [event.value for event in events.Scalars("evaluation/held-out/loss")] == [1.5]
    text = events.Tensors("sample/def_f_/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "def f(&lt;" in text and "x&gt;" in text
    assert "seed" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_one_run_and_no_step_twice(name, tmp_path, monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, name, stand_in.module)
    tracking = Tracking(to=[name], project="p")
    sample = {"kind": "sample", "step": 2, "prompt": "a/b", "completion": "c"}
    start = {"kind": "start", "step": 0}
    write_run(tmp_path, [start, step(1), step(2), sample, step(3), step(4)], tracking)
    write_run(tmp_path, [step(3)], tracking, resumed_step=2)  # crashes before it gets as far
    write_run(tmp_path, [step(3), step(4), step(5)], tracking, resumed_step=2)
    opened = [call[1] for call in stand_in.calls if call[0] == "init"]
    identity = "id" if name == "wandb" else "name"
    assert opened[0]["project"] == "p" and opened[0]["config"] == {"seed": 1}
    assert len({options[identity] for options in opened}) == 1, "a resumed run is the same run"
    expected = ["allow"] * 3 if name == "wandb" else ["never", "allow", "allow"]
    assert [options["resume"] for options in opened] == expected
    logged = [(call[1], list(call[2])) for call in stand_in.calls if call[0] == "log"]
    numbers = ["train/loss", "train/learning_rate"]
    assert logged == [
        (1, numbers),
        (2, numbers),
        (2, ["sample/a_b"]),
        (3, numbers),
        (4, numbers),
        (5, numbers),
    ]
    assert [call[0] for call in stand_in.calls].count("finish") == 3
    if name == "wandb":
        assert "mode" not in opened[0], "WANDB_MODE must decide"
        assert opened[0]["dir"] == str(tmp_path)


def test_two_runs_are_two_runs_to_trackers(tmp_path, monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in.module)
    for name in ("one", "two"):
        write_run(tmp_path / name, [step(1)], Tracking(to=["wandb"]))
    first, second = (call[1]["id"] for call in stand_in.calls if call[0] == "init")
    assert first != second


def test_missing_trackers_are_all_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError) as caught:
        write_run(tmp_path, [], Tracking(to=["wandb", "trackio"]))
    assert [mistake.key for mistake in caught.value.mistakes] == ["tracking.to"] * 2
    assert "pip install wandb" in str(caught.value) and "pip install trackio" in str(caught.value)


def test_a_tracker_that_will_not_start_says_how_to_start_it(tmp_path, monkeypatch):
    module = types.ModuleType("wandb")
    module.Html = str

    def no_key(**_):
        raise RuntimeError("api_key not configured (no-tty)")

    module.init = no_key
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match=r"(?s)api_key not configured.*WANDB_MODE=offline"):
        write_run(tmp_path, [], Tracking(to=["wandb"]))


def test_a_tracker_that_fails_later_warns_once_and_training_goes_on(tmp_path, monkeypatch):
    stand_in = StandIn()

    def broken(values, step):
        raise ConnectionError("network is gone")

    monkeypatch.setattr(stand_in, "log", broken)
    monkeypatch.setitem(sys.modules, "trackio", stand_in.module)
    said: list[str] = []
    records = [step(number) for number in range(1, 6)]
    write_run(tmp_path, records, Tracking(to=["trackio"]), warn=said.append)
    assert len(said) == 1 and "trackio" in said[0] and "network is gone" in said[0]
    assert len(read_metrics(tmp_path)) == 5


def test_nothing_is_imported_for_a_run_without_trackers(tmp_path):
    assert not {"wandb", "trackio"} & set(sys.modules)
    write_run(tmp_path, [step(1)])
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]

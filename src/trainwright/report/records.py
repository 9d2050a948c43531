"""The history of a run: `metrics.jsonl`, one JSON object a line, written while training.

`training.metrics` writes it, reports and resumed runs read it. What is in each record:

    start       step, and what the run began with (parameters, total_steps, world_size, ...)
    step        step, loss, learning_rate, gradient_norm, tokens, tokens_total, seconds,
                tokens_per_second, mfu, memory_bytes, batch_hash; with several workers traffic:
                of the first, by dimension, its bytes, seconds and calls
    evaluation  step, name, loss, bits_per_byte, targets, and the objective's own figures; of a set
                of several sources, another record for each, named set/source
    task        step, name, task (its kind), rows, and each score with its standard error:
                exact_match, exact_match_stderr, or acc and acc_norm
    sample      step, prompt, completion
    checkpoint  step, seconds_stalled, bytes
    end         step, seconds

Every record has `kind` and `time` (seconds since 1970); what is not known is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainwright.errors import Mistake, UserError

Record = dict[str, Any]

METRICS_FILE = "metrics.jsonl"

SCORES = ("exact_match", "acc", "acc_norm")  # that a task may have, shares of its rows

# JSON has no spelling for these three: a loss that is not a number would make its line unreadable
# to every strict parser. As strings they stay apart from null, which means "not known".
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
TEXT_KEYS = frozenset({"kind", "name", "task", "prompt", "completion", "reason", "status"})


def encode_record(record: Record) -> bytes:
    """One line of standard JSON with its newline. NaN and infinities become strings."""
    try:
        text = json.dumps(record, allow_nan=False, ensure_ascii=False, default=_plain)
    except ValueError:
        text = json.dumps(_spell(record), allow_nan=False, ensure_ascii=False, default=_plain)
    # A lone surrogate (half of a broken character in a sample) has no UTF-8 form; its backslash
    # spelling is the JSON escape for it.
    return f"{text}\n".encode(errors="backslashreplace")


def decode_record(line: str | bytes) -> Record:
    """The record in a line; spelt NaN and infinities are numbers again.

    Raises ValueError for anything but one JSON object.
    """
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    for key, value in record.items():
        if isinstance(value, str) and value in NOT_FINITE and key not in TEXT_KEYS:
            record[key] = NOT_FINITE[value]
    return record


def iterate_metrics(run_directory: Path) -> Iterator[Record]:
    """The records of a run in the order written; none if it has no metrics file.

    A last line torn by a crash is dropped. Any other broken line raises UserError with its number.
    """
    for record, _ in iterate_lines(run_directory):
        yield record


def iterate_lines(run_directory: Path) -> Iterator[tuple[Record, bytes]]:
    """`iterate_metrics`, each record with its line as it stands in the file (newline included)."""
    path = run_directory / METRICS_FILE
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = decode_record(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise UserError(
                    Mistake(
                        f"this line is not a record of a run ({error})",
                        "delete the line, or restore the file",
                        where=f"{path}:{number}",
                    )
                ) from None
            yield record, line if line.endswith(b"\n") else line + b"\n"


def read_metrics(run_directory: Path) -> list[Record]:
    """All records of a run in the order written; see `iterate_metrics`."""
    return list(iterate_metrics(run_directory))


def _plain(value: Any) -> Any:
    """NumPy and torch scalars as Python numbers, anything else (paths, dtypes) as text."""
    if not hasattr(value, "item"):
        return str(value)
    number = value.item()
    return _spell(number)


def _spell(value: Any) -> Any:
    """`value` with every NaN and infinity in it replaced by its name."""
    if isinstance(value, dict):
        return {key: _spell(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_spell(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value

"""Writes a run's history while it trains: `metrics.jsonl`, and the trackers that were asked for.

One process of a run holds a `MetricsWriter`. `report.records` says what the records hold.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from trainwright.errors import Mistake, UserError
from trainwright.files import write_atomically
from trainwright.recipe import schema
from trainwright.report.records import (
    METRICS_FILE,
    Record,
    encode_record,
    iterate_lines,
    iterate_metrics,
    read_metrics,
)
from trainwright.training.trackers import Trackers, open_trackers, print_warning

__all__ = ["MetricsWriter", "read_metrics", "truncate_after"]


class MetricsWriter:
    """Appends records to the run's history and hands them to the trackers.

    A run that goes on from a checkpoint calls `truncate_after` before its first record. `config` is
    what the trackers show as the run's settings; `warn` is called with one message if a tracker
    fails later on.
    """

    def __init__(
        self,
        run_directory: Path,
        tracking: schema.Tracking,
        recipe_name: str,
        config: Mapping[str, Any],
        *,
        warn: Callable[[str], None] = print_warning,
    ) -> None:
        run_directory.mkdir(parents=True, exist_ok=True)
        self.run_directory = run_directory
        self.path = run_directory / METRICS_FILE
        self.tracking, self.recipe_name, self.config, self.warn = (
            tracking,
            recipe_name,
            config,
            warn,
        )
        steps = (record.get("step", 0) for record in iterate_metrics(run_directory))
        self.seen_step = max(steps, default=0)
        self.resumed_step = self.seen_step
        self.file: FileIO | None = None
        self.trackers: Trackers | None = None

    def truncate_after(self, step: int) -> int:
        """Go on from `step`: cut off what a crashed continuation wrote beyond it.

        Returns how many records went. Trackers learn of it too, so it must come before `write`.
        """
        if self.file is not None:
            raise RuntimeError("truncate_after comes before the first record of this process")
        self.resumed_step = step
        return truncate_after(self.run_directory, step)

    def open(self) -> None:
        """Start the trackers and open the file; the first `write` does it too.

        Raises UserError if a tracker of `tracking.to` is missing or will not start: an hour into a
        run would be too late to say so.
        """
        self.trackers = open_trackers(
            self.run_directory,
            self.tracking,
            self.recipe_name,
            self.config,
            resumed_step=self.resumed_step,
            seen_step=self.seen_step,
            warn=self.warn,
        )
        truncate_after(self.run_directory, None)
        # Unbuffered: a record is with the system when `write` returns, and nothing is left over to
        # fail a second time after a full disk.
        self.file = self.path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        """Append one record, with `time` added if it has none.

        Raises UserError if the file cannot be written, as on a full disk.
        """
        if self.file is None:
            self.open()
        assert self.file is not None and self.trackers is not None
        record = {**record, "time": record.get("time", time.time())}
        line = encode_record(record)
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            raise UserError(
                Mistake(
                    f"cannot write the run's metrics: {error.strerror}",
                    "make room or repair the disk, then start the same command again: the run "
                    "goes on from its last checkpoint",
                    where=str(self.path),
                )
            ) from error
        self.trackers.log(record)

    def close(self) -> None:
        """Flush the history to disk and finish the trackers; a second call does nothing."""
        if self.file is None or self.trackers is None or self.file.closed:
            return
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            self.warn(f"the last metrics may not be on disk: {error.strerror}: {self.path}")
        self.file.close()
        self.trackers.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def truncate_after(run_directory: Path, step: int | None) -> int:
    """Cut the records of steps beyond `step` off the history, atomically; returns how many.

    A record without a step belongs to the step named last before it. A torn last line goes too;
    with `step` None it is all that goes.
    """
    path = run_directory / METRICS_FILE
    if not path.is_file():
        return 0
    kept: list[bytes] = []
    cut = 0
    belongs_to = 0
    for record, line in iterate_lines(run_directory):
        belongs_to = record.get("step", belongs_to)
        if step is None or belongs_to <= step:
            kept.append(line)
        else:
            cut += 1
    content = b"".join(kept)
    if len(content) != path.stat().st_size:
        write_atomically(path, content)
    return cut

"""What failing workers leave among the logs, and which of it is the cause.

    error-rank3.json   what rank 3 raised, and whether in a collective
    calls-rank3.bin    its last collectives (`resilience.recorder`)
    waiting-rank3.json what it waits in, while it waits for long
    verdict.json       what a watchdog has found: a rank stopped, silent or gone, or a hang

When one rank fails, others fail of that: they lose their connection in the middle of a collective.
Only what comes from elsewhere is news.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainwright.errors import Mistake, UserError
from trainwright.files import write_json

VERDICT = "verdict.json"


class WorkerFailed(Exception):  # noqa: N818
    """A worker died of a fault; the message carries its rank and its own traceback."""


class OutOfMemory(WorkerFailed):
    """A worker ran out of memory: in bytes, what it held at most, wanted more, and could have got.

    `held` is what of it were weights, gradients and so on; {} where nobody could say.
    """

    def __init__(
        self,
        text: str,
        peak: int,
        wanted: int = 0,
        spare: int = 0,
        held: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(text)
        self.peak, self.wanted, self.spare, self.held = peak, wanted, spare, dict(held or {})

    def facts(self) -> dict[str, Any]:
        """Itself as JSON, to be raised anew elsewhere."""
        return {"text": str(self), **vars(self)}


def clear_reports(logs: Path) -> None:
    """Remove what an earlier start of the run has left."""
    for pattern in ("error-rank*.json", "waiting-rank*.json", "calls-rank*.bin", VERDICT):
        for file in logs.glob(pattern):
            file.unlink(missing_ok=True)


def report_failure(
    logs: Path,
    rank: int,
    error: BaseException,
    traceback_text: str,
    *,
    in_collective: bool = False,
    comparison: str = "",
) -> None:
    """Leave a worker's failure where the launching process finds it.

    `in_collective`: a collective raised it. `comparison` says how ranks' calls differ.
    """
    if not logs.is_dir():  # it failed before there was a run
        return
    mistakes = [vars(mistake) for mistake in error.mistakes] if isinstance(error, UserError) else []
    write_json(
        logs / f"error-rank{rank}.json",
        {
            "rank": rank,
            "mistakes": mistakes,
            "traceback": traceback_text,
            "in_collective": in_collective,
            "comparison": comparison,
            "memory": error.facts() if isinstance(error, OutOfMemory) else None,
        },
    )


def write_verdict(logs: Path, kind: str, text: str, lost: int | None) -> None:
    """Leave what a watchdog has found; `lost` is the rank that it found lost."""
    if logs.is_dir():
        write_json(logs / VERDICT, {"kind": kind, "text": text, "lost": lost})


def has_own_failure(logs: Path) -> bool:
    """Whether some worker failed of itself, not of another's end."""
    return any(not report["in_collective"] for report in _reports(logs))


def first_cause(logs: Path, exit_codes: Mapping[int, int], starved: int | None = None) -> Exception:
    """Why the run ended, as an exception whose message names the rank.

    `exit_codes` are those of the ranks that ended first. `starved` is how much a rank held at most,
    in bytes, where the kernel has killed for lack of memory. In this order: an error that a rank
    raised outside of collectives; a watchdog's finding on a rank stopped or a hang; collectives
    that did not fit together; a rank killed by a signal; what else a watchdog found; an error in
    a collective.
    """
    from trainwright.resilience.recorder import find_mismatch  # torch: not before it is needed

    reports = _reports(logs)
    verdict = _read(logs / VERDICT)
    own = [report for report in reports if not report["in_collective"]]
    if own:
        return _as_error(own[0])
    if verdict is not None and verdict["kind"] in ("stopped", "hang"):
        return WorkerFailed(_with_log(verdict, logs))
    mismatch = find_mismatch(logs)
    if mismatch is not None:
        return WorkerFailed(f"{mismatch}\nThe logs are in {logs}")
    killed = [
        rank
        for rank, code in sorted(exit_codes.items())
        if code < 0 and -code != signal.SIGTERM and rank not in {r["rank"] for r in reports}
    ]
    if killed:
        number = -exit_codes[killed[0]]
        was_starved = starved is not None and number == signal.SIGKILL
        text = _killed_text(killed[0], number, verdict, logs, starved=was_starved)
        return OutOfMemory(text, starved or 0) if was_starved else WorkerFailed(text)
    compared = [report for report in reports if report["comparison"]]
    if compared:
        return _as_error(compared[0])
    if verdict is not None:
        return WorkerFailed(_with_log(verdict, logs))
    if reports:
        return _as_error(reports[0])
    codes = ", ".join(f"rank {rank}: {code}" for rank, code in sorted(exit_codes.items()))
    return WorkerFailed(f"a worker died without a word; see the logs in {logs}\nexit codes {codes}")


def _as_error(report: Mapping[str, Any]) -> Exception:
    if report["mistakes"]:
        return UserError([Mistake(**mistake) for mistake in report["mistakes"]])
    memory = report.get("memory")
    if memory is not None:
        said = f"rank {report['rank']} {memory['text']}"
        return OutOfMemory(**{**memory, "text": said})
    comparison = f"{report['comparison']}\n" if report["comparison"] else ""
    return WorkerFailed(f"rank {report['rank']} failed: {comparison}\n{report['traceback']}")


def _killed_text(
    rank: int, number: int, verdict: Mapping[str, Any] | None, logs: Path, *, starved: bool
) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    why = ""
    if number == signal.SIGKILL:
        why = (
            ", most likely for lack of memory: try a smaller `parallel.micro_batch`, "
            "`training.recompute: full` or fewer workers"
        )
    if starved:
        why = " by the kernel, for lack of memory"
    seen = ""
    if verdict is not None and verdict["lost"] == rank and "it was last" in verdict["text"]:
        seen = "\nIt was last" + verdict["text"].split("it was last", 1)[1]
    return f"rank {rank} was killed ({name}){why}.{seen}\nIts log is {logs / f'rank{rank}.log'}"


def _with_log(verdict: Mapping[str, Any], logs: Path) -> str:
    if verdict["lost"] is None:
        return f"{verdict['text']}\nThe logs are in {logs}"
    log = logs / f"rank{verdict['lost']}.log"
    return f"{verdict['text']}\nIts log is {log}"


def _reports(logs: Path) -> list[dict[str, Any]]:
    """The workers' reports, the earliest first."""
    files = sorted(logs.glob("error-rank*.json"), key=lambda file: file.stat().st_mtime_ns)
    return [report for file in files if (report := _read(file)) is not None]


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None

"""Which run a user means, and which ones lie nearby when there is none."""

from __future__ import annotations

from pathlib import Path

from trainwright.errors import UserError
from trainwright.report.records import METRICS_FILE

MOST_LISTED = 8


def require_run(path: Path) -> Path:
    """`path` if it is a folder with metrics, else UserError that lists the runs found nearby."""
    if (path / METRICS_FILE).is_file():
        return path
    if path.is_dir():
        what = f"{path} holds no run: it has no {METRICS_FILE}"
    elif path.exists():
        what = f"{path} is a file; a run is a folder"
    else:
        what = f"there is no run at {path}"
    near = runs_near(path)
    listed = ", ".join(str(run) for run in near[:MOST_LISTED])
    if len(near) > MOST_LISTED:
        listed += f" and {len(near) - MOST_LISTED} more"
    fix = f"choose one of: {listed}" if near else "start one with `trainwright train RECIPE`"
    raise UserError(what, fix=fix)


def runs_near(path: Path) -> list[Path]:
    """Runs in `path`, beside it, and in `runs/` of the current folder; the newest first."""
    places = [path, path / "runs", path.parent, Path("runs")]
    found: dict[Path, Path] = {}
    for place in places:
        for metrics in place.glob(f"*/{METRICS_FILE}"):
            found.setdefault(metrics.resolve(), metrics)
    newest = sorted(found.values(), key=lambda metrics: metrics.stat().st_mtime_ns, reverse=True)
    return [metrics.parent for metrics in newest]

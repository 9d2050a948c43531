"""TensorBoard, Weights & Biases and trackio as thin adapters over the run's records.

Each is imported only when a recipe asks for it. A tracker that fails while training says so once
and is left alone from then on: no run stops for the sake of a picture of it.
"""

from __future__ import annotations

import html
import json
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainwright.errors import Mistake, UserError
from trainwright.files import write_json
from trainwright.recipe import schema
from trainwright.report.records import SCORES, Record

MEMORY_FILE = "trackers.json"

TRACKED = {
    "step": (
        "train",
        (
            "loss",
            "learning_rate",
            "gradient_norm",
            "tokens_total",
            "seconds",
            "tokens_per_second",
            "mfu",
            "memory_bytes",
        ),
    ),
    "evaluation": (
        "evaluation",
        ("loss", "bits_per_byte", "rewards/accuracies", "rewards/margins"),
    ),
    "task": ("task", SCORES),
    "checkpoint": ("checkpoint", ("seconds_stalled", "bytes")),
}


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record under the names that trackers show: `train/loss`,
    `evaluation/NAME/loss`, `task/NAME/acc`, `checkpoint/bytes`. What is not known is left out."""
    if record["kind"] not in TRACKED:
        return {}
    group, keys = TRACKED[record["kind"]]
    if record["kind"] in ("evaluation", "task") and record.get("name"):
        group = f"{group}/{record['name']}"
    return {f"{group}/{key}": float(record[key]) for key in keys if record.get(key) is not None}


def sample_tag(prompt: str) -> str:
    """The name a prompt's samples stand under: its first letters and digits (tags become paths)."""
    return f"sample/{re.sub(r'[^A-Za-z0-9]+', '_', prompt)[:40]}"


class Tracker(Protocol):
    """What the writer asks of a tracker."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def sample(self, step: int, prompt: str, completion: str) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Life:
    """Which run this is, over all the processes that carry it on.

    `run_id` is the same for all of them, `is_new` says that this is the first. `resumed_step` is
    the step this process goes on from, `seen_step` the last one that earlier processes sent. Only
    TensorBoard can take points back; the others get no step twice (a resumed run repeats its steps
    exactly, so what they show stays right).
    """

    directory: Path
    run_id: str
    is_new: bool
    resumed_step: int
    seen_step: int


def recall_life(directory: Path, resumed_step: int, seen_step: int) -> Life:
    """The life of the run in `directory`, kept in a file there; its records reach `seen_step`."""
    path = directory / MEMORY_FILE
    memory = json.loads(path.read_text()) if path.is_file() else {}
    life = Life(
        directory,
        run_id=memory.get("run_id", secrets.token_hex(4)),
        is_new=not memory,
        resumed_step=resumed_step,
        seen_step=max(seen_step, memory.get("seen_step", 0)) if memory else 0,
    )
    write_json(path, {"run_id": life.run_id, "seen_step": life.seen_step})
    return life


class TensorBoard:
    """Event files in `RUN/tensorboard`; what a crashed continuation wrote is purged there."""

    def __init__(self, life: Life, project: str, name: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if life.is_new else life.resumed_step + 1
        self.writer = SummaryWriter(
            str(life.directory / "tensorboard"), purge_step=purge, flush_secs=30
        )
        if life.is_new:
            recipe = json.dumps(config, indent=2, ensure_ascii=False, default=str)
            self.writer.add_text("recipe", f"```json\n{recipe}\n```", 0)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def sample(self, step: int, prompt: str, completion: str) -> None:
        text = f"<b>{html.escape(prompt)}</b>{html.escape(completion)}"
        self.writer.add_text(sample_tag(prompt), f"<pre>{text}</pre>", step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One W&B run for the whole life of the run directory; `WANDB_MODE=offline` is honoured."""

    def __init__(self, life: Life, project: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        self.html = wandb.Html
        self.seen_step = life.seen_step
        self.run = wandb.init(
            project=project,
            name=name,
            id=life.run_id,
            resume="allow",
            dir=str(life.directory),
            config=dict(config),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        if step > self.seen_step:
            self.run.log(values, step=step)

    def sample(self, step: int, prompt: str, completion: str) -> None:
        if step > self.seen_step:
            text = f"<pre><b>{html.escape(prompt)}</b>{html.escape(completion)}</pre>"
            self.run.log({sample_tag(prompt): self.html(text)}, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run in trackio's local store; `trackio show` opens its dashboard."""

    def __init__(self, life: Life, project: str, name: str, config: Mapping[str, Any]) -> None:
        import trackio

        self.markdown = trackio.Markdown
        self.seen_step = life.seen_step
        self.run = trackio.init(
            project=project,
            name=f"{name}-{life.run_id}",
            config=dict(config),
            resume="never" if life.is_new else "allow",
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        if step > self.seen_step:
            self.run.log(values, step=step)

    def sample(self, step: int, prompt: str, completion: str) -> None:
        if step > self.seen_step:
            text = f"**{prompt}**{completion}"
            self.run.log({sample_tag(prompt): self.markdown(text)}, step=step)

    def close(self) -> None:
        self.run.finish()


ADAPTERS: dict[str, Callable[[Life, str, str, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}
WILL_NOT_START = {
    "wandb": "run `wandb login`, or set WANDB_MODE=offline and `wandb sync` the run later",
}


def print_warning(message: str) -> None:
    """The way a tracker's trouble is told where nobody gave a better one."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


class Trackers:
    """The trackers of a run as one; each is dropped, with one warning, when it fails."""

    def __init__(self, adapters: dict[str, Tracker], warn: Callable[[str], None]) -> None:
        self.adapters = adapters
        self.warn = warn

    def log(self, record: Record) -> None:
        """Show a record's numbers, or its sample; other records are none of theirs."""
        if not self.adapters:
            return
        if values := scalars(record):
            self._each(lambda tracker: tracker.log(record["step"], values))
        elif record["kind"] == "sample":
            self._each(
                lambda tracker: tracker.sample(
                    record["step"], record["prompt"], record["completion"]
                )
            )

    def close(self) -> None:
        """Finish them all."""
        self._each(lambda tracker: tracker.close())
        self.adapters.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name in list(self.adapters):
            try:
                act(self.adapters[name])
            except Exception as error:
                del self.adapters[name]
                self.warn(
                    f"{name} failed and is left alone from here on ({type(error).__name__}: "
                    f"{error}); training goes on and metrics.jsonl has everything"
                )


def open_trackers(
    directory: Path,
    tracking: schema.Tracking,
    recipe_name: str,
    config: Mapping[str, Any],
    *,
    resumed_step: int,
    seen_step: int,
    warn: Callable[[str], None],
) -> Trackers:
    """Start the trackers that `tracking.to` names; see `Life` for the two steps.

    Raises UserError, all at once, for those that are not installed or will not start.
    """
    if not tracking.to:
        return Trackers({}, warn)
    life = recall_life(directory, resumed_step, seen_step)
    adapters: dict[str, Tracker] = {}
    mistakes = []
    for name in dict.fromkeys(tracking.to):
        try:
            adapters[name] = ADAPTERS[name](life, tracking.project, recipe_name, config)
        except ImportError as error:
            mistakes.append(
                Mistake(
                    f"{name} is not installed ({error})",
                    f"pip install {name}, or take it out of the list",
                    key="tracking.to",
                )
            )
        except Exception as error:
            mistakes.append(
                Mistake(
                    f"{name} does not start: {error}",
                    WILL_NOT_START.get(name, "repair that, or take it out of the list"),
                    key="tracking.to",
                )
            )
    trackers = Trackers(adapters, warn)
    if mistakes:
        trackers.close()
        raise UserError(mistakes)
    return trackers

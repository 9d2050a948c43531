"""A run's folder: everything needed to understand it, continue it or repeat it.

recipe.yaml       as given           resolved.yaml     with defaults, presets and overrides
plan.json         how it is spread   environment.json  machine and versions
prediction.json   what is foretold of it, and how it was chosen
model/            config.json        tokenizer/        as exported
metrics.jsonl     one line a record  logs/             output by rank
checkpoints/      step-00000100/     export/           Hugging Face directory
tasks/            answers by step   gguf/             files for llama.cpp
"""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainwright.errors import Mistake, UserError
from trainwright.files import write_atomically
from trainwright.planner.plan import Plan, changed_plan
from trainwright.planner.plan_record import RECORD_FILE, PlanRecord, recorded_hash
from trainwright.recipe.load import different_keys, load_recipe
from trainwright.recipe.schema import Recipe
from trainwright.report.find import runs_near
from trainwright.report.records import METRICS_FILE

# What may change between the start of a run and its continuation: it decides how the work is
# spread, saved and shown, not what is computed.
FREE_TO_CHANGE = (
    "run_directory",
    "parallel",
    "cluster",
    "checkpoint",
    "evaluation",
    "tracking",
    "export",
    "training.recompute",
    "training.activation_offload",
    "training.compile",
    "data.cache",
    "objective.cache_reference",
)

LOCK = ".lock"
OWN = "swarm"  # what a peer of a swarm keeps to itself


@dataclass(frozen=True)
class RunDirectory:
    """Where things are in a run's folder."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).absolute())

    @property
    def recipe(self) -> Path:
        """The recipe as the user wrote it."""
        return self.path / "recipe.yaml"

    @property
    def resolved(self) -> Path:
        """The recipe with everything filled in: what the workers read."""
        return self.path / "resolved.yaml"

    @property
    def plan(self) -> Path:
        """How the work is spread."""
        return self.path / "plan.json"

    @property
    def prediction(self) -> Path:
        """How the plan was chosen, and what was foretold of it."""
        return self.path / RECORD_FILE

    @property
    def environment(self) -> Path:
        """Machine and versions."""
        return self.path / "environment.json"

    @property
    def model_config(self) -> Path:
        """The model's Hugging Face config."""
        return self.path / "model" / "config.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, saved as transformers saves it."""
        return self.path / "tokenizer"

    @property
    def data(self) -> Path:
        """What the workers open instead of reading the sources again."""
        return self.path / "data.json"

    @property
    def checkpoints(self) -> Path:
        """One folder a saved step."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """The Hugging Face directory made at the end."""
        return self.path / "export"

    @property
    def logs(self) -> Path:
        """Output and errors by rank."""
        return self.path / "logs"

    def answers(self, task: str, step: int) -> Path:
        """What came of each row of a task at a step."""
        return self.path / "tasks" / f"{task}-step-{step:08d}.jsonl"

    def read_recipe(self) -> Recipe:
        """The resolved recipe."""
        return load_recipe(self.resolved)

    def read_plan(self) -> Plan:
        """The plan that the workers follow.

        Raises UserError where it is not the one that the run's records name.
        """
        text = self.plan.read_text()
        plan = Plan.from_json(text)
        told = recorded_hash(self.prediction.read_text()) if self.prediction.is_file() else None
        # The file's own hash, for that of the plan changes when a release knows more of plans.
        found = recorded_hash(text, "hash") or plan.hash
        if told not in (None, found):
            raise changed_plan(told, found)
        return plan

    def write_plan(self, record: PlanRecord) -> None:
        """Keep a plan for the workers, with how it was chosen."""
        # A crash between the two leaves a plan without a record, never one with another's.
        self.prediction.unlink(missing_ok=True)
        write_atomically(self.plan, record.plan.to_json(record.origin))
        write_atomically(self.prediction, record.to_json())

    def read_plan_record(self) -> PlanRecord | None:
        """How the run's plan was chosen; None where it has no plan, or no record of it.

        Raises UserError as `read_plan` does.
        """
        if not (self.plan.is_file() and self.prediction.is_file()):
            return None
        return PlanRecord.from_json(self.prediction.read_text(), self.read_plan())

    def read_model_config(self) -> dict:
        """The model's Hugging Face config as a dictionary."""
        return json.loads(self.model_config.read_text())

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.resolved.is_file()

    @property
    def has_trained(self) -> bool:
        """Whether steps were taken here that another recipe's run must not be mixed with."""
        return self.exists and ((self.path / METRICS_FILE).exists() or self.checkpoints.exists())


def may_change(key: str) -> bool:
    """Whether a run goes on with another value of this key."""
    return any(key == free or key.startswith(free + ".") for free in FREE_TO_CHANGE)


def default_run_directory(recipe: Recipe) -> Path:
    """Where a recipe's run goes: `run_directory`, or `runs/NAME` in the current folder."""
    return recipe.run_directory or Path("runs") / recipe.name


def open_run(recipe: Recipe) -> RunDirectory:
    """The recipe's run directory, made if it is new, ready to be continued if it is not.

    Raises UserError where the folder holds something else: another recipe's run (the keys that
    differ are named), or files that are not a run's.
    """
    run = RunDirectory(default_run_directory(recipe))
    if run.path.exists() and not run.path.is_dir():
        raise UserError(f"{run.path} is a file", fix="choose another `run_directory`")
    if run.has_trained:
        _refuse_another_recipe(run, recipe)
    elif not run.exists and run.path.is_dir() and _holds_files(run.path):
        raise UserError(
            f"{run.path} holds files, but no run of Trainwright",
            fix="choose another `run_directory`, or empty the folder",
        )
    run.path.mkdir(parents=True, exist_ok=True)
    return run


def _holds_files(folder: Path) -> bool:
    # A peer's key comes before its run: with it the run is fetched.
    return any(child.name not in (LOCK, OWN) for child in folder.iterdir())


def _refuse_another_recipe(run: RunDirectory, recipe: Recipe) -> None:
    keys = [key for key in different_keys(run.read_recipe(), recipe) if not may_change(key)]
    if keys:
        shown = ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
        raise UserError(
            Mistake(
                f"{run.path} already holds a run of another recipe; these keys differ: {shown}",
                fix="choose another `name` or `run_directory`, or delete the folder to start anew",
                key="run_directory",
            )
        )


@contextmanager
def locked(run: RunDirectory) -> Iterator[None]:
    """Hold the run for this process; a second training of the same folder is refused."""
    with (run.path / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{run.path} is being trained by another process",
                fix="wait for it to end, or choose another `run_directory`",
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise  # what is let through: a file system without locks
        yield


def find_run(path: Path | str) -> RunDirectory:
    """The run at `path`; UserError where there is none."""
    run = RunDirectory(Path(path))
    if not run.exists:
        near = ", ".join(str(found) for found in runs_near(run.path)[:6])
        raise UserError(
            f"{path} holds no run of Trainwright",
            fix=f"runs found nearby: {near}" if near else "start one: `trainwright train RECIPE`",
        )
    return run

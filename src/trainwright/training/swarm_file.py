"""What `swarm join` leaves in a run directory: which run its workers are part of."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from trainwright.errors import Mistake, UserError
from trainwright.files import write_json
from trainwright.swarm.settings import Settings
from trainwright.training.run_directory import OWN, RunDirectory


@dataclass(frozen=True)
class Joined:
    """A run of a swarm that a run directory takes part in. `name` is what others see of it."""

    url: str
    run: str
    name: str
    settings: Settings

    def require(self, run: RunDirectory) -> None:
        """Raise UserError where the directory takes part in another run."""
        before = Joined.read(run)
        if before is not None and before.run != self.run:
            what = f"this directory belongs to a peer of another run, {before.run[:8]}"
            raise UserError(Mistake(what, "give another --directory", where=str(run.path)))

    def write(self, run: RunDirectory) -> None:
        """Into the run directory, for its owner's eyes: a ring's URL has the secret in it.

        Raises UserError where the directory takes part in another run.
        """
        self.require(run)
        write_json(_file(run), asdict(self))
        _file(run).chmod(0o600)

    @classmethod
    def read(cls, run: RunDirectory) -> Joined | None:
        """What is in the run directory; None where it takes part in none."""
        try:
            values = json.loads(_file(run).read_text())
        except FileNotFoundError:
            return None
        return cls(**{**values, "settings": Settings(**values["settings"])})


def _file(run: RunDirectory) -> Path:
    return run.path / "swarm.json"


def own_directory(run: Path) -> Path:
    """What a peer keeps to itself, below its run directory: key, agreed and own state, log."""
    return run / OWN

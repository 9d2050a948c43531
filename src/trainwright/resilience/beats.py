"""A heartbeat: what a rank says of itself once a second, for the others to read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

State = Literal["running", "finished", "failed"]


@dataclass(frozen=True)
class Wait:
    """A collective that a thread of the rank is in."""

    collective: str
    group: str  # its name: "tp", "fsdp", …
    key: str  # the group itself, the same word on all its ranks
    ranks: tuple[int, ...]  # of the group
    sequence: int  # the rank's how-many-eth on the group (or to that peer)
    sizes: str
    place: str  # the line that called it
    peer: int | None = None  # the rank at the other end, for `send` and `receive`


@dataclass(frozen=True)
class Past:
    """A collective that the rank has called, in or out of it."""

    collective: str
    sequence: int
    sizes: str
    place: str = ""


@dataclass(frozen=True)
class Beat:
    """What one rank is doing."""

    rank: int
    number: int = 0  # one more with every beat
    state: State = "running"
    host: str = ""
    pid: int = 0
    parent: int = 0  # process that started it
    place: str = ""  # line of the product's or the user's code that the main thread is at
    quiet: float = 0.0  # seconds in which no collective began or ended
    computing: bool = True  # some thread that talks to other ranks is doing something else just now
    waits: tuple[Wait, ...] = ()
    # Below: only told by a rank that waits for long.
    counts: dict[str, int] = field(default_factory=dict)  # `count_key` → calls so far
    history: dict[str, tuple[Past, ...]] = field(default_factory=dict)  # group's key → last calls

    @property
    def is_waiting(self) -> bool:
        """Whether all that it could do depends on other ranks."""
        return self.state == "running" and bool(self.waits) and not self.computing

    def to_json(self) -> str:
        """As it is sent."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Beat:
        """The reverse of `to_json`."""
        values = json.loads(text)
        values["waits"] = tuple(
            Wait(**{**wait, "ranks": tuple(wait["ranks"])}) for wait in values["waits"]
        )
        values["history"] = {
            key: tuple(Past(**past) for past in calls) for key, calls in values["history"].items()
        }
        return cls(**values)


def count_key(group: str, way: str = "", peer: int = -1) -> str:
    """Name of a count: calls on a group, or messages `to` or `from` a peer in it."""
    return f"{group}|{way}|{peer}"

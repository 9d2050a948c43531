"""What is on every peer's shelf, as far as it is known here: the news that goes round.

Each shelf has one writer, who numbers its changes. Whoever knows a shelf up to change 17 asks
anybody for what came after: no change is sent twice, and a peer that is gone is still known
(van Renesse et al., "Efficient reconciliation and flow control for anti-entropy protocols", 2008).
An `incarnation` counts the times that the writer began; it makes changes of an older life old.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trainwright.swarm.transports.keys import is_key, is_peer
from trainwright.swarm.transports.ring_objects import is_digest

MOST_KEYS = 4096  # objects of a shelf, and deletions that it remembers
_MOST_GONE = 256  # deleted keys that a shelf remembers

Seen = tuple[int, int]  # incarnation and number of the last change that is known
UNSEEN: Seen = (0, 0)


class BadNewsError(ValueError):
    """News that no peer of this protocol writes."""


@dataclass(frozen=True)
class Entry:
    """A key's last change. `size` in bytes; a key that was deleted has size -1."""

    change: int
    size: int
    digest: str

    @property
    def gone(self) -> bool:
        """Whether the key was deleted."""
        return self.size < 0


@dataclass
class Shelf:
    """One peer's keys, and where it listens and how fast others reach it (`about`)."""

    incarnation: int = 0
    change: int = 0
    forgotten: int = 0  # up to this change, deletions are not remembered
    entries: dict[str, Entry] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    about_change: int = 0

    @property
    def seen(self) -> Seen:
        """What is known of it."""
        return self.incarnation, self.change

    def living(self) -> Iterator[tuple[str, Entry]]:
        """The keys that there are."""
        return ((key, entry) for key, entry in self.entries.items() if not entry.gone)

    def digests(self) -> set[str]:
        """The objects that it refers to."""
        return {entry.digest for _, entry in self.living()}

    def write(self, key: str, size: int, digest: str) -> None:
        """Note a change of the writer's own; size -1 deletes."""
        if key not in self.entries and len(self.entries) >= MOST_KEYS:
            raise ValueError(f"over {MOST_KEYS} objects on a shelf")
        self.change += 1
        self.entries[key] = Entry(self.change, size, digest)
        self._forget()

    def tell(self, about: dict[str, Any]) -> bool:
        """Note what the writer says of itself; whether that is new."""
        if about == self.about:
            return False
        self.change += 1
        self.about, self.about_change = about, self.change
        return True

    def news(self, seen: Seen) -> dict[str, Any] | None:
        """What somebody does not know who has seen so much of this shelf; None if nothing."""
        if seen >= self.seen or not self.change:  # nothing was ever written on it
            return None
        since = seen[1] if seen[0] == self.incarnation and seen[1] >= self.forgotten else 0
        return {
            "incarnation": self.incarnation,
            "since": since,
            "change": self.change,
            "about": self.about if self.about_change > since else None,
            "entries": [
                [key, entry.change, entry.size, entry.digest]
                for key, entry in self.entries.items()
                if entry.change > since and not (entry.gone and not since)
            ],
        }

    def take(self, news: dict[str, Any]) -> bool:
        """Make another's news one's own; False where they are old, or do not follow on what is
        known. Raises BadNewsError.
        """
        try:
            entries = {key: Entry(*rest) for key, *rest in news["entries"]}
            incarnation, since, change = news["incarnation"], news["since"], news["change"]
            about = news["about"]
            numbers = [incarnation, since, change]
            for key, entry in entries.items():
                numbers += [entry.change, entry.size]
                if not is_key(key) or not (entry.gone or is_digest(entry.digest)):
                    raise BadNewsError("a name that is none")
            if any(type(number) is not int for number in numbers) or len(entries) > MOST_KEYS:
                raise BadNewsError("a number that is none")
            if about is not None and not isinstance(about, dict):
                raise BadNewsError("no description")
        except (KeyError, TypeError, ValueError) as error:
            raise BadNewsError(f"news that cannot be read: {error}") from error
        if (incarnation, change) <= self.seen:
            return False
        if since == 0:
            self.entries, self.forgotten = entries, change
        elif incarnation == self.incarnation and since <= self.change:
            self.entries.update(entries)
        else:
            return False
        self.incarnation, self.change = incarnation, change
        if about is not None:
            self.about, self.about_change = about, change
        self._forget()
        return True

    def _forget(self) -> None:
        """Drop the oldest deletions; who has not seen them is told the whole shelf."""
        gone = sorted((entry.change, key) for key, entry in self.entries.items() if entry.gone)
        for change, key in gone[:-_MOST_GONE]:
            del self.entries[key]
            self.forgotten = max(self.forgotten, change)


def read_seen(value: object) -> dict[str, Seen]:
    """What a peer says it has seen of each shelf. Raises BadNewsError."""
    if not isinstance(value, dict):
        raise BadNewsError("no list of what was seen")
    found = {}
    for peer, seen in value.items():
        if not is_peer(peer) or not isinstance(seen, list) or len(seen) != 2:
            raise BadNewsError("no list of what was seen")
        if any(type(number) is not int for number in seen):
            raise BadNewsError("no list of what was seen")
        found[peer] = (seen[0], seen[1])
    return found

"""All shelves as a peer of the ring knows them, and the objects of them that it has, on its disk.

objects/, partial/       see `ring_objects`
shelves/<peer>.json      its own shelf, durable; the others' as it heard of them, so that what a
                         peer left behind can be had after all have been started anew
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from threading import Condition
from typing import Any

from trainwright.files import write_atomically
from trainwright.swarm.transports.keys import is_peer
from trainwright.swarm.transports.ring_frames import Header
from trainwright.swarm.transports.ring_objects import Objects, digest_of
from trainwright.swarm.transports.ring_shelves import (
    MOST_KEYS,
    UNSEEN,
    BadNewsError,
    Entry,
    Seen,
    Shelf,
)
from trainwright.swarm.transports.transport import Listed

SMALL = 4096  # bytes of an object that is sent along with the news of it
MOST_SENT_ALONG = 1 << 20  # bytes of all that are sent along at a time


class Library:
    """Thread-safe. `changed` is notified when anything was written, by this peer or another."""

    def __init__(self, directory: Path, me: str) -> None:
        self.me = me
        self.objects = Objects(directory)
        self.changed = Condition()
        self._directory = directory / "shelves"
        self._directory.mkdir(parents=True, exist_ok=True)
        self._shelves = {
            path.stem: _loaded(path)
            for path in self._directory.glob("*.json")
            if is_peer(path.stem)
        }
        self._mine = self._shelves.setdefault(me, Shelf())
        self._mine.incarnation += 1
        self._save(me)
        self.objects.keep_only(self._digests())

    def put(self, key: str, data: bytes) -> None:
        """Write on this peer's own shelf."""
        digest = self.objects.add(data)
        with self.changed:
            before = self._mine.digests()
            self._mine.write(key, len(data), digest)
            if not self.objects.has(digest):  # taken away meanwhile, as nobody referred to it
                self.objects.add(data)
            self._written(self.me, before)

    def delete(self, key: str) -> None:
        """Take a key off this peer's own shelf, if it is there."""
        with self.changed:
            if self.entry(self.me, key) is not None:
                before = self._mine.digests()
                self._mine.write(key, -1, "")
                self._written(self.me, before)

    def tell(self, about: dict[str, Any]) -> None:
        """Say something of this peer, in the place of what was said before."""
        with self.changed:
            if self._mine.tell(about):
                self._written(self.me, set())

    def entry(self, peer: str, key: str) -> Entry | None:
        """What is known of a key; None where it is not."""
        with self.changed:
            shelf = self._shelves.get(peer)
            entry = shelf.entries.get(key) if shelf else None
            return None if entry is None or entry.gone else entry

    def named(self, digest: str) -> tuple[str, Entry] | None:
        """A peer on whose shelf that object is; None where nobody refers to it."""
        with self.changed:
            for peer, shelf in sorted(self._shelves.items()):
                for _, entry in shelf.living():
                    if entry.digest == digest:
                        return peer, entry
            return None

    def known(self) -> list[str]:
        """All peers that were ever heard of."""
        with self.changed:
            return sorted(self._shelves)

    def peers(self) -> list[str]:
        """Those that have anything on their shelf."""
        with self.changed:
            return sorted(peer for peer, shelf in self._shelves.items() if any(shelf.living()))

    def listed(self, peer: str, under: str) -> list[Listed]:
        """What is on a shelf below a path, sorted."""
        above = f"{under}/" if under else ""
        with self.changed:
            shelf = self._shelves.get(peer, Shelf())
            found = [(key, entry.size) for key, entry in shelf.living() if key.startswith(above)]
        return [Listed(key, size) for key, size in sorted(found)]

    def about(self, peer: str) -> dict[str, Any]:
        """What a peer says of itself."""
        with self.changed:
            shelf = self._shelves.get(peer)
            return shelf.about if shelf else {}

    def seen(self, apart_from: Collection[str] = ()) -> dict[str, Seen]:
        """How much of each shelf is known here."""
        with self.changed:
            return {
                peer: shelf.seen for peer, shelf in self._shelves.items() if peer not in apart_from
            }

    def news(
        self, seen: Mapping[str, Seen], elsewhere: Collection[str], wait: float
    ) -> tuple[Header, bytes]:
        """What somebody does not know yet, with the small objects; waits for some so many seconds.

        `elsewhere` are those of whom it hears from others.
        """
        with self.changed:
            self.changed.wait_for(lambda: any(self._news(seen, elsewhere).values()), wait)
            shelves, entries = dict[str, Any](), 0
            for peer, news in self._news(seen, elsewhere).items():
                if entries < MOST_KEYS:  # or else the rest is for the next time
                    shelves[peer] = news
                    entries += len(news["entries"])
        parts, room = list[bytes](), MOST_SENT_ALONG
        for news in shelves.values():
            for _, _, size, digest in news["entries"]:
                if (
                    0 <= size <= min(SMALL, room)
                    and (data := self.objects.read(digest)) is not None
                ):
                    parts.append(data)
                    room -= size
        return {"shelves": shelves, "sizes": [len(part) for part in parts]}, b"".join(parts)

    def take(self, header: Header, body: bytes) -> list[str]:
        """Make such news one's own; whose shelves, known before, have changed since. Raises
        BadNewsError for what cannot be read.
        """
        shelves, sizes = header.get("shelves"), header.get("sizes")
        if not isinstance(shelves, dict) or not isinstance(sizes, list):
            raise BadNewsError("no news")
        start, small, grown = 0, dict[str, bytes](), list[str]()
        for size in sizes:
            if type(size) is not int or not 0 <= size <= SMALL:
                raise BadNewsError("an object that is not small")
            small[digest_of(body[start : start + size])] = body[start : start + size]
            start += size
        for peer, news in shelves.items():
            if not is_peer(peer) or not isinstance(news, dict):
                raise BadNewsError("no shelf")
            with self.changed:
                known = peer in self._shelves
                if self._take(peer, news, small) and known:
                    grown.append(peer)
        return grown

    def _take(self, peer: str, news: dict[str, Any], small: Mapping[str, bytes]) -> bool:
        shelf = self._shelves.get(peer) or Shelf()
        if peer == self.me:
            # Somebody remembers a life of which this disk knows nothing: outlive it.
            remembered = Shelf()
            if remembered.take(news | {"since": 0}) and remembered.seen > shelf.seen:
                shelf.incarnation = remembered.incarnation + 1
                self._written(peer, set())
            return False
        before = shelf.digests()
        newer = shelf.take(news)
        if newer:
            for digest in shelf.digests() - before:
                if digest in small and not self.objects.has(digest):
                    self.objects.keep(digest, small[digest])
            self._shelves[peer] = shelf
            self._written(peer, before)
        return newer

    def _news(self, seen: Mapping[str, Seen], elsewhere: Collection[str]) -> dict[str, Any]:
        return {
            peer: news
            for peer, shelf in self._shelves.items()
            if peer not in elsewhere and (news := shelf.news(seen.get(peer, UNSEEN))) is not None
        }

    def _written(self, peer: str, before: set[str]) -> None:
        """Save a shelf, drop the objects to which nothing refers any more, and wake who waits."""
        self._save(peer)
        dropped = before - self._shelves[peer].digests()
        for digest in dropped and dropped - self._digests():
            self.objects.remove(digest)
        self.changed.notify_all()

    def _digests(self) -> set[str]:
        return set().union(*(shelf.digests() for shelf in self._shelves.values()))

    def _save(self, peer: str) -> None:
        path = self._directory / f"{peer}.json"
        text = json.dumps(asdict(self._shelves[peer]), separators=(",", ":"))
        if peer == self.me:
            write_atomically(path, text)
        else:  # can be asked for again: not worth a flush to disk at every card
            beside = path.with_suffix(".tmp")
            beside.write_text(text)
            beside.replace(path)


def _loaded(path: Path) -> Shelf:
    """A shelf as it was saved; an empty one where a power cut left a broken file."""
    try:
        fields = json.loads(path.read_text())
        entries = {key: Entry(**entry) for key, entry in fields.pop("entries").items()}
        return Shelf(entries=entries, **fields)
    except (ValueError, TypeError, KeyError, AttributeError):
        return Shelf()

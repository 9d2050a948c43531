"""News of shelves: whoever hears it, in whatever order, comes to know what was written."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from trainwright.swarm.transports.ring_shelves import (
    MOST_KEYS,
    BadNewsError,
    Entry,
    Shelf,
    read_seen,
)

DIGEST = "0123456789abcdef" * 4


def contents(shelf: Shelf) -> dict[str, int]:
    return {key: entry.size for key, entry in shelf.living()}


@pytest.mark.parametrize("seed", range(20))
def test_every_replica_comes_to_know_what_the_writer_wrote(seed):
    draw = random.Random(seed)
    writer, written = Shelf(incarnation=1), dict[str, int]()
    replicas, late = [Shelf() for _ in range(4)], list[tuple[Shelf, str]]()

    def ask(asker: Shelf, answerer: Shelf) -> None:
        news = answerer.news(asker.seen)
        if news is not None:
            late.append((asker, json.dumps(news)))

    for _ in range(1500):
        match draw.choice(["write", "write", "delete", "delete", "ask", "hear", "about", "life"]):
            case "write":
                key, size = f"k{draw.randint(0, 400)}", draw.randint(0, 99)
                writer.write(key, size, DIGEST)
                written[key] = size
            case "delete" if written:
                key = draw.choice(sorted(written))
                writer.write(key, -1, "")
                del written[key]
            case "ask":
                ask(draw.choice(replicas), draw.choice([writer, *replicas]))
            case "hear" if late:
                replica, news = late.pop(draw.randrange(len(late)))
                replica.take(json.loads(news))
            case "about":
                writer.tell({"number": draw.random()})
            case "life" if draw.random() < 0.02:
                writer.incarnation += 1
        assert contents(writer) == written
    # In a line: each asks the one before it, and the first the writer.
    for asker, answerer in zip(replicas, [writer, *replicas], strict=False):
        late.clear()
        ask(asker, answerer)
        for replica, news in late:
            replica.take(json.loads(news))
        assert contents(asker) == written
        assert asker.about == writer.about and asker.seen == writer.seen
        assert asker.news(writer.seen) is None


def test_only_what_is_new_is_told():
    shelf = Shelf(incarnation=1)
    shelf.write("a", 1, DIGEST)
    seen = shelf.seen
    shelf.write("b", 2, DIGEST)
    shelf.write("a", -1, "")
    news = shelf.news(seen)
    assert [entry[0] for entry in news["entries"]] == ["a", "b"] and news["about"] is None
    assert [entry[0] for entry in shelf.news((0, 0))["entries"]] == ["b"]


def test_old_deletions_are_forgotten_and_nothing_comes_back_by_that():
    writer, replica = Shelf(incarnation=1), Shelf()
    writer.write("first", 1, DIGEST)
    replica.take(writer.news(replica.seen))
    for at in range(1000):
        writer.write(f"k{at}", 1, DIGEST)
        writer.write(f"k{at}", -1, "")
    writer.write("first", -1, "")
    for at in range(1000, 2000):
        writer.write(f"k{at}", 1, DIGEST)
        writer.write(f"k{at}", -1, "")
    assert len(writer.entries) < 300
    replica.take(writer.news(replica.seen))
    assert contents(replica) == {}


def test_a_shelf_has_a_limit():
    full = {f"k{at}": Entry(at + 1, 1, DIGEST) for at in range(MOST_KEYS)}
    shelf = Shelf(incarnation=1, change=MOST_KEYS, entries=full)
    with pytest.raises(ValueError, match="4096"):
        shelf.write("one more", 1, DIGEST)
    shelf.write("k0", 2, DIGEST)


GOOD = {"incarnation": 1, "since": 0, "change": 1, "about": None, "entries": [["a", 1, 1, DIGEST]]}


@pytest.mark.parametrize(
    "wrong",
    [
        {"entries": [["../a", 1, 1, DIGEST]]},
        {"entries": [["a", 1, 1, "../../etc/passwd"]]},
        {"entries": [["a", 1, 1]]},
        {"entries": [["a", True, 1, DIGEST]]},
        {"entries": [["a", 1, 1.5, DIGEST]]},
        {"entries": [[["a"], 1, 1, DIGEST]]},
        {"entries": 7},
        {"entries": [[]]},
        {"entries": [["a", 1, "1", DIGEST]]},
        {"change": "2"},
        {"about": []},
        {"incarnation": None},
    ],
)
def test_news_that_no_peer_writes_is_refused(wrong):
    assert replace(Shelf()).take(GOOD)
    shelf = Shelf()
    with pytest.raises(BadNewsError):
        shelf.take(GOOD | wrong)
    assert shelf == Shelf()


@pytest.mark.parametrize("seen", [[], {"../x": [1, 1]}, {"a": [1]}, {"a": ["1", 1]}, {"a": 1}])
def test_what_was_seen_is_checked(seen):
    with pytest.raises(BadNewsError):
        read_seen(seen)

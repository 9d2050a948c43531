"""Mutated messages of every kind through their readers: no crash, no hang, no large allocation.

Half are changed on the way, by somebody without the peer's key, and all of those must be refused
without blame. Half are changed by the peer itself, which then hashes and signs them rightly: what
is read of those must be exactly what was signed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import signal
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.swarm.made import (
    ALICE,
    BASE,
    BOB,
    LAYOUT,
    RUN,
    SNAPSHOT_HASH,
    contribution,
    messages,
    method,
)
from tests.swarm.test_checks import CODECS
from trainwright.swarm.agreed_hash import most_snapshot_bytes, read_snapshot
from trainwright.swarm.checks import Refused, check_contribution
from trainwright.swarm.manifest import MANIFEST_BYTES, Manifest
from trainwright.swarm.message import HEADER_BYTES, BadMessage, read_message, write_message
from trainwright.swarm.peer_card import LARGEST, Card

FRAME = 152
SLACK = 2**20  # for headers, and for a few vectors of the layout's 12,352 values
SECONDS = 20  # a message that takes as long hangs its reader


def read_by_kind(name: str, data: bytes) -> Any:
    """The message as its reader gives it; raises BadMessage, or gives a Refused."""
    kind, _, which = name.partition(" ")
    if kind == "contribution":
        message = read_message(
            data, run=RUN, kind=kind, limit=LIMITS[name], peer=ALICE.peer, round=3
        )
        return check_contribution(
            message,
            method=METHODS[which],
            base=BASE,
            most_norm=1e3,
            most_tokens=10**6,
            earlier={},
        )
    if kind == "snapshot":
        base = SNAPSHOT_HASH if which == "agreed" else None
        return read_snapshot(data, run=RUN, peer=ALICE.peer, round=3, count=LAYOUT.count, base=base)
    if kind == "manifest":
        # Whoever changes what they sign makes another run, and may tell somebody to join it.
        run = hashlib.sha256(data[FRAME + header_size(data) :]).hexdigest()[:32]
        return Manifest.read(data, run=run, starter=ALICE.peer)
    if kind == "card":
        return Card.read(data, RUN, ALICE.peer)
    return read_message(data, run=RUN, kind=kind, limit=HEADER_BYTES, peer=ALICE.peer, round=3)


METHODS = {codec: method(codec) for codec in CODECS}
MADE = messages()
WHOLE = {
    "card": MADE["card"],
    "decision": MADE["decision"],
    "manifest": MADE["manifest"],
    "snapshot agreed": MADE["snapshot"],
    "snapshot own": MADE["snapshot"],
} | {f"contribution {codec}": contribution(codec=codec) for codec in CODECS}
LIMITS = {
    "card": LARGEST,
    "decision": HEADER_BYTES,
    "manifest": MANIFEST_BYTES,
    "snapshot agreed": most_snapshot_bytes(LAYOUT.count),
    "snapshot own": most_snapshot_bytes(LAYOUT.count),
} | {f"contribution {codec}": each.most_bytes(3) + HEADER_BYTES for codec, each in METHODS.items()}
HOSTILE_VALUES: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        2**31,
        2**53,
        -(2**53),
        1.5,
        1e308,
        "",
        "../../card",
        "\x1b[2J",
        "x" * 999,
    ),
    *([], {}, [[]] * 50, {"a": {"a": {"a": {}}}}, [0] * 5000, "0" * 64, ALICE.peer, float("nan")),
]
HOSTILE_BYTES = [
    *(b"\0" * 8, b"\xff" * 8, struct.pack("<f", float("nan")), struct.pack("<f", -float("inf"))),
    *(struct.pack("<f", 3e38), struct.pack("<I", 2**32 - 1), struct.pack("<Q", 2**63), b"{}", b'"'),
]


def header_size(data: bytes) -> int:
    return int.from_bytes(data[FRAME - 4 : FRAME], "little")


def stirred(draw: random.Random, data: bytes) -> bytes:
    """Bytes with a few of them changed, left out, put in or doubled."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5, 30))):
        at = draw.randrange(len(found) + 1)
        length = draw.choice((1, 1, 2, 4, 32, 500))
        match draw.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << draw.randrange(8)
            case 1:
                found[at : at + length] = draw.randbytes(length)
            case 2:
                found[at:at] = found[at : at + length]
            case 3:
                del found[at : at + length]
            case 4:
                hostile = draw.choice(HOSTILE_BYTES)
                found[at : at + len(hostile)] = hostile
            case 5 if draw.random() < 0.2:
                del found[at:]
    return bytes(found)


def by_an_outsider(draw: random.Random, data: bytes) -> bytes:
    """The message changed on the way, or put together from parts of others."""
    other = draw.choice(list(WHOLE.values()))
    match draw.randrange(4):
        case 0:
            return stirred(draw, data)
        case 1:  # one part of the frame from elsewhere: hash, signature, key, run, header's size
            start, stop = draw.choice(((4, 36), (36, 100), (100, 132), (132, 148), (148, 152)))
            part = draw.choice((other[start:stop], draw.randbytes(stop - start)))
            return data[:start] + part + data[stop:]
        case 2:  # other content under this frame, or this content with its hash mended
            if draw.random() < 0.5:
                return data[:FRAME] + other[FRAME:]
            content = stirred(draw, data[100:])
            return data[:4] + hashlib.sha256(content).digest() + data[36:100] + content
        case _:  # all of it, mended and signed by somebody else
            return signed(data[132:148], data[FRAME:], header_size(data), BOB)


def by_the_peer(draw: random.Random, data: bytes) -> bytes:
    """Header or planes changed, then rightly hashed and signed."""
    end = FRAME + header_size(data)
    header, planes = data[FRAME:end], data[end:]
    match draw.randrange(4):
        case 0:
            header = stirred(draw, header)
        case 1:
            header = compact(with_another_value(draw, json.loads(header)))
        case 2:
            planes = stirred(draw, planes)
        case _ if planes:
            tree = json.loads(header)
            if tree["kind"] == "manifest" and draw.random() < 0.5:
                planes = compact(with_another_value(draw, json.loads(planes)))
            else:
                planes = stirred(draw, planes)
            sizes = tree["planes"]
            if len(sizes) > 1 and draw.random() < 0.5:
                tree["planes"] = cut(draw, len(planes), draw.choice((len(sizes), 1, 5)))
            else:
                last = len(planes) - sum(sizes[:-1])
                tree["planes"] = [*sizes[:-1], last]
            header = compact(tree)
    run = data[132:148]
    if b'"kind":"manifest"' in header:
        run = hashlib.sha256(planes).digest()[:16]
    return signed(run, header + planes, len(header), ALICE)


def cut(draw: random.Random, total: int, count: int) -> list[int]:
    """Sizes that sum to `total`."""
    marks = sorted(draw.randrange(total + 1) for _ in range(count - 1))
    return [stop - start for start, stop in zip([0, *marks], [*marks, total], strict=True)]


def with_another_value(draw: random.Random, tree: dict[str, Any]) -> Any:
    """One node of the tree replaced, left out or added."""
    holders: list[Any] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict | list) and value:
            holders.append(value)
            for each in value.values() if isinstance(value, dict) else value:
                collect(each)

    tree = copy.deepcopy(tree)
    collect(tree)
    holder = draw.choice(holders)
    value = copy.deepcopy(draw.choice(HOSTILE_VALUES))
    if isinstance(holder, list):
        holder[draw.randrange(len(holder))] = value
    elif draw.random() < 0.2:
        del holder[draw.choice(sorted(holder))]
    else:
        holder[draw.choice([*sorted(holder), "another"])] = value
    return tree


def compact(tree: Any) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def signed(run: bytes, rest: bytes, size: int, by: Any) -> bytes:
    content = by.public + run + struct.pack("<I", size) + rest
    digest = hashlib.sha256(content).digest()
    return b"TWM1" + digest + by.sign(b"trainwright message\n" + digest) + content


def outcome(name: str, data: bytes) -> str:
    """ "read", "proof" or "refused", within the limits of time and memory."""
    signal.alarm(SECONDS)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        found = read_by_kind(name, data)
    except BadMessage:
        return "refused"
    finally:
        signal.alarm(0)
        used = tracemalloc.get_traced_memory()[1] - before
        assert used < LIMITS[name] + SLACK, f"{used} bytes to read {name}"
    if isinstance(found, Refused):
        return "proof" if found.proof else "refused"
    return "read"


def try_many(count: int, seed: int) -> Counter[tuple[str, str, str]]:
    """What became of so many mutated messages, by kind and by who changed them."""
    draw, seen = random.Random(seed), Counter[tuple[str, str, str]]()
    ways: dict[str, Callable[[random.Random, bytes], bytes]] = {
        "outsider": by_an_outsider,
        "peer": by_the_peer,
    }

    def hung(*_: object) -> None:
        raise AssertionError(f"the reader hangs on {name}, seed {seed}, number {number}")

    before = signal.signal(signal.SIGALRM, hung)
    tracemalloc.start()
    try:
        for number in range(count):  # noqa: B007 (`hung` tells it)
            name = draw.choice(list(WHOLE))
            who = draw.choice(list(ways))
            data = ways[who](draw, WHOLE[name])
            if data == WHOLE[name]:
                continue
            found = outcome(name, data)
            seen[name, who, found] += 1
            if who == "outsider":
                assert found == "refused", (name, found, data)
            elif found == "read":
                as_signed(name, data)
    finally:
        tracemalloc.stop()
        signal.signal(signal.SIGALRM, before)
    return seen


def as_signed(name: str, data: bytes) -> None:
    """What was read, written again, is the same to the last byte: nothing was passed over."""
    run, kind = data[132:148].hex(), name.partition(" ")[0]
    found = read_message(data, run=run, kind=kind, limit=LIMITS[name])
    assert write_message(kind, run, found.round, found.body, found.planes, ALICE) == data


def test_3_000_mutated_messages():
    assert all(outcome(name, data) == "read" for name, data in WHOLE.items())
    seen = try_many(3_000, seed=0)
    kinds = {name for name, _, _ in seen}
    assert kinds == set(WHOLE)
    # Peers sign possible changes of all kinds, but for agreed states, whose hash others have told.
    possible = {name for name, who, what in seen if (who, what) == ("peer", "read")}
    assert possible == kinds - {"snapshot agreed"}
    contributions = {name for name in kinds if name.startswith("contribution")}
    assert {name for name, _, what in seen if what == "proof"} == contributions


@pytest.mark.prove
@pytest.mark.parametrize("seed", range(1, 11))
def test_100_000_mutated_messages(seed):
    print(sorted(try_many(10_000, seed).items()))

"""Messages: all that peers publish, as bytes that say whose they are and prove it.

    offset  bytes
         0      4  b"TWM1"
         4     32  SHA-256 of all from offset 100 on: the message's digest
        36     64  Ed25519 signature of that digest
       100     32  the peer's public key
       132     16  the run
       148      4  size of the header, little-endian
       152         the header, JSON: {"body": …, "kind": …, "planes": [sizes], "round": …}
                   the planes, one after the other, to the end

So 152 bytes and a header of about 140. What a stranger sends is compared with these sizes before
anything is allocated for it, and no byte of it is ever run: JSON in one canonical form, and bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainwright.swarm.identity import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    Identity,
    peer_of,
    signed_by,
)

MAGIC = b"TWM1"
DIGEST_BYTES, RUN_BYTES = 32, 16
HEADER_BYTES = 2**16  # the most a header can have: what is larger belongs into a plane
VALUES = 2**12  # the most numbers, strings, lists and objects in a JSON text, unless said otherwise
DEPTH = 8  # of lists and objects in each other
PLANES = 64

_SIGNATURE = len(MAGIC) + DIGEST_BYTES
_CONTENT = _SIGNATURE + SIGNATURE_BYTES
_RUN = _CONTENT + KEY_BYTES
_SIZE = _RUN + RUN_BYTES
_HEADER = _SIZE + 4
_SIGNED = b"trainwright message\n"  # no signature for another purpose can be taken for a message's
_KIND = re.compile(r"[a-z]{1,20}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LARGEST = 2**53  # integers above are not the same number in every reader of JSON

Plane = NDArray[np.uint8]


class BadMessage(ValueError):  # noqa: N818
    """Bytes that are no message, or not the one that was asked for; `reason` says what is wrong.

    Nobody is to blame for one: somebody else may have written the bytes, or put them there.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Message:
    """What a peer signed. `digest` stands for all of it, 64 hex digits.

    Planes are the reader's own memory, to keep and to write to.
    """

    kind: str
    run: str
    peer: str
    round: int
    body: dict[str, Any]
    planes: list[Plane] = field(repr=False)
    digest: str


def write_message(
    kind: str,
    run: str,
    round: int,
    body: dict[str, Any],
    planes: Sequence[Plane | bytes],
    identity: Identity,
) -> bytes:
    """A message of this peer. `run` is 32 hex digits; `body` is what JSON can say, without
    NaN, line breaks, `..` in a path, or more than 64 KiB; planes are bytes: ValueError otherwise.
    """
    parts = [_flat(plane) for plane in planes]
    header = write_json(
        {"body": body, "kind": kind, "planes": [len(part) for part in parts], "round": round}
    )
    try:
        _check_header(read_json(header, limit=HEADER_BYTES))
    except BadMessage as error:
        raise ValueError(f"nobody could read this message: {error.reason}") from None
    size = len(header).to_bytes(_HEADER - _SIZE, "little")
    content: list[bytes | memoryview] = [identity.public, _run_bytes(run), size, header, *parts]
    digest = hashlib.sha256()
    for part in content:
        digest.update(part)
    signature = identity.sign(_SIGNED + digest.digest())
    return b"".join([MAGIC, digest.digest(), signature, *content])


def read_message(
    data: bytes,
    *,
    run: str,
    kind: str,
    limit: int,
    peer: str | None = None,
    round: int | None = None,
) -> Message:
    """The message in these bytes, if it is of this run, kind, peer and round (where given).

    Raises BadMessage for anything else. `limit` is the most bytes that it may have; reading
    allocates those of the planes once more, and under 1 MiB for the header whatever is in it.
    """
    view = memoryview(data)
    if len(view) > limit:
        raise BadMessage(f"oversized: {len(view)} bytes, and at most {limit} can be right")
    if len(view) < _HEADER or view[: len(MAGIC)] != MAGIC:
        raise BadMessage("truncated, or not a message at all")
    public, content = bytes(view[_CONTENT:_RUN]), view[_CONTENT:]
    signer = peer_of(public)
    if peer is not None and signer != peer:
        raise BadMessage(f"signed by {signer}, and it should be by {peer}")
    if view[_RUN:_SIZE] != _run_bytes(run):
        raise BadMessage(f"of another run, {view[_RUN:_SIZE].hex()}")
    digest = hashlib.sha256(content).digest()
    if view[len(MAGIC) : _SIGNATURE] != digest:
        raise BadMessage("damaged or truncated: it does not have the hash that it names")
    if not signed_by(public, bytes(view[_SIGNATURE:_CONTENT]), _SIGNED + digest):
        raise BadMessage(f"the signature is not of {signer}")
    end = _HEADER + int.from_bytes(view[_SIZE:_HEADER], "little")
    if end > len(view):
        raise BadMessage("its header is larger than the message")
    header = _check_header(read_json(view[_HEADER:end], limit=HEADER_BYTES))
    if header["kind"] != kind:
        raise BadMessage(f"it is a {header['kind']} and no {kind}")
    if round is not None and header["round"] != round:
        raise BadMessage(f"of round {header['round']}, and it should be of {round}")
    sizes = header["planes"]
    if sum(sizes) != len(view) - end:
        raise BadMessage(f"{len(view) - end} bytes of planes, and its header says {sum(sizes)}")
    planes = []
    for size in sizes:
        planes.append(np.frombuffer(view[end : end + size], np.uint8).copy())  # aligned, writable
        end += size
    return Message(kind, run, signer, header["round"], header["body"], planes, digest.hex())


def is_digest(text: object) -> bool:
    """Whether that can be a message's digest: only then may it be part of a path."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def write_json(value: Any) -> bytes:
    """The one way to write a value: keys sorted, no spaces, UTF-8. Raises ValueError for NaN."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def read_json(
    data: bytes | memoryview, *, limit: int, values: int = VALUES, lines: bool = False
) -> Any:
    """The value that `write_json` wrote, from a stranger.

    Raises BadMessage for JSON in any other form (a key twice, spaces, NaN), larger, deeper or of
    more values than is allowed, and with strings that could do harm where they are shown
    or are part of a path: characters that do not print (but line breaks and tabs, if `lines`), or
    `..` between slashes.
    """
    if len(data) > limit:
        raise BadMessage(f"JSON of {len(data)} bytes, and at most {limit} can be right")
    data = bytes(data)
    if sum(data.count(mark) for mark in (b",", b":", b"[", b"{")) >= values:
        raise BadMessage(f"JSON of more than {values} values")
    try:
        value = json.loads(data.decode())
        if write_json(value) != data:
            raise BadMessage("its JSON is not in the form in which it is written here")
    except (RecursionError, ValueError) as error:  # ValueError: JSON, UTF-8, NaN, endless numbers
        raise error if isinstance(error, BadMessage) else BadMessage("it is not JSON") from None
    _check_value(value, DEPTH, lines)
    return value


def _check_value(value: Any, depth: int, lines: bool) -> None:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        if depth == 0:
            raise BadMessage(f"JSON nested more than {DEPTH} deep")
        for each in value:
            _check_value(each, depth - 1, lines)
    elif isinstance(value, str):
        shown = value.replace("\n", "").replace("\t", "") if lines else value
        if not shown.isprintable():
            raise BadMessage("a string with characters that do not print")
        if ".." in re.split(r"[/\\]", value):
            raise BadMessage("a path that climbs out of its directory")
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise BadMessage("a number too large")


def _check_header(header: Any) -> dict[str, Any]:
    if not isinstance(header, dict) or set(header) != {"body", "kind", "planes", "round"}:
        raise BadMessage("its header is not of body, kind, planes and round")
    if not isinstance(header["kind"], str) or not _KIND.fullmatch(header["kind"]):
        raise BadMessage("its kind is not a word")
    if not isinstance(header["body"], dict):
        raise BadMessage("its body is not an object")
    if not _is_count(header["round"]):
        raise BadMessage("its round is not a number from 0")
    sizes = header["planes"]
    if not isinstance(sizes, list) or len(sizes) > PLANES or not all(map(_is_count, sizes)):
        raise BadMessage(f"its planes are not up to {PLANES} sizes")
    return header


def _flat(plane: Plane | bytes) -> memoryview:
    """The plane's memory, a copy only where it does not lie in one piece."""
    if isinstance(plane, bytes):
        return memoryview(plane)
    if plane.dtype != np.uint8:
        raise ValueError(f"planes are bytes, not {plane.dtype}")
    return memoryview(np.ascontiguousarray(plane).reshape(-1))  # type: ignore[arg-type]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # JSON's true is an int too


def _run_bytes(run: str) -> bytes:
    """A run's id of 32 hex digits, as it stands in messages."""
    found = bytes.fromhex(run)
    if len(found) != RUN_BYTES or found.hex() != run:
        raise ValueError(f"a run's id has {2 * RUN_BYTES} hex digits, not {run!r}")
    return found

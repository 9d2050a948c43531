"""The hash of what a run agrees on, and snapshots of it for those who join or heal.

Every card and contribution names the hash, so peers see at once who has other weights. A snapshot
is believed for its hash, which others have told, and not for who sends it: nothing in it is looked
at before the hash is right.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainwright.swarm.identity import Identity
from trainwright.swarm.message import (
    BadMessage,
    Plane,
    read_json,
    read_message,
    write_json,
    write_message,
)
from trainwright.swarm.methods.method import Agreed

HASH_DIGITS = 32
LEDGER_BYTES = 4 * 2**20
_LEDGER_VALUES = 2**18
_MOST_VECTORS = 8  # weights, and those of the outer optimizers that there are

assert sys.byteorder == "little"  # weights are hashed and sent as they lie in memory


def agreed_hash(agreed: Agreed, ledger: Mapping[str, Any]) -> str:
    """SHA-256 of round, weights, outer vectors and ledger, its first 32 hex digits.

    Equal on all machines for equal bits, and for no others: 0 and −0 differ.
    """
    return _hash(agreed.round, sorted(agreed.outer), _planes(agreed, ledger))


def write_snapshot(
    agreed: Agreed, ledger: Mapping[str, Any], run: str, identity: Identity
) -> bytes:
    """The agreed state before round `agreed.round`, as a message."""
    names, planes = sorted(agreed.outer), _planes(agreed, ledger)
    return write_message("snapshot", run, agreed.round, {"outer": names}, planes, identity)


def read_snapshot(
    data: bytes, *, run: str, peer: str, round: int, count: int, base: str | None
) -> tuple[Agreed, dict[str, Any]]:
    """The agreed state whose hash is `base`, and its ledger. `count` is the layout's.
    With None any finite state will do: under NoLoCo peers have none in common.

    Raises BadMessage for any other state: of another round, size, or with one bit changed.
    """
    message = read_message(
        data, run=run, kind="snapshot", limit=most_snapshot_bytes(count), peer=peer, round=round
    )
    names, planes = message.body.get("outer"), message.planes
    if len(message.body) != 1 or not isinstance(names, list) or len(planes) != len(names) + 2:
        raise BadMessage("a snapshot has weights, the outer vectors that it names, and a ledger")
    if not all(isinstance(name, str) for name in names) or names != sorted(set(names)):
        raise BadMessage("the names of its outer vectors are not sorted words")
    if any(plane.size != 4 * count for plane in planes[:-1]):
        raise BadMessage(f"its vectors are not of {count} fp32 values each")
    found = _hash(round, names, planes)
    if base is not None and found != base:
        raise BadMessage(f"another state: its hash is {found}, and most peers have {base}")
    weights, *outer = (torch.from_numpy(plane.view(np.float32)) for plane in planes[:-1])
    if base is None and not all(vector.isfinite().all() for vector in (weights, *outer)):
        raise BadMessage("its vectors have values that are NaN or infinite")
    ledger = read_json(planes[-1].data, limit=LEDGER_BYTES, values=_LEDGER_VALUES)
    if not isinstance(ledger, dict):
        raise BadMessage("its ledger is not an object")
    return Agreed(round, weights, dict(zip(names, outer, strict=True))), ledger


def most_snapshot_bytes(count: int) -> int:
    """The most bytes that a snapshot of so many weights can have."""
    return 4 * count * _MOST_VECTORS + LEDGER_BYTES + 2**12


def _planes(agreed: Agreed, ledger: Mapping[str, Any]) -> list[Plane]:
    vectors = [agreed.weights, *(agreed.outer[name] for name in sorted(agreed.outer))]
    text = np.frombuffer(write_json(ledger), np.uint8)
    return [*(_bytes_of(vector) for vector in vectors), text]


def _bytes_of(vector: Tensor) -> Plane:
    """The vector's memory, not a copy."""
    if vector.dtype != torch.float32 or vector.dim() != 1:
        raise ValueError(f"agreed vectors are fp32 [count], not {vector.dtype} {vector.shape}")
    return vector.detach().contiguous().numpy().view(np.uint8)


def _hash(round: int, names: list[str], planes: list[Plane]) -> str:
    sizes = [plane.size for plane in planes]
    digest = hashlib.sha256(write_json({"outer": names, "round": round, "sizes": sizes}))
    for plane in planes:
        digest.update(plane.data)
    return digest.hexdigest()[:HASH_DIGITS]

"""The hash of the agreed state beside one spelt out, and snapshots from strangers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct

import numpy as np
import pytest
import torch

from tests.swarm.made import ALICE, BOB, LAYOUT, LEDGER, RUN, SNAPSHOT_HASH, agreed
from trainwright.swarm.agreed_hash import (
    agreed_hash,
    most_snapshot_bytes,
    read_snapshot,
    write_snapshot,
)
from trainwright.swarm.message import BadMessage, read_message, write_message
from trainwright.swarm.methods.method import Agreed


def read(data: bytes, **changes):
    asked = {"run": RUN, "peer": ALICE.peer, "round": 3, "count": LAYOUT.count}
    return read_snapshot(data, **{**asked, "base": SNAPSHOT_HASH, **changes})


def test_the_hash_spelt_out():
    state = Agreed(7, torch.tensor([1.0, -2.5]), {"b": torch.tensor([3.0]), "a": torch.zeros(2)})
    ledger = json.dumps({"strikes": [1, 2]}, separators=(",", ":")).encode()
    spelt = b'{"outer":["a","b"],"round":7,"sizes":[8,8,4,%d]}' % len(ledger)
    spelt += struct.pack("<ff", 1.0, -2.5) + struct.pack("<ff", 0, 0) + struct.pack("<f", 3.0)
    expected = hashlib.sha256(spelt + ledger).hexdigest()[:32]
    assert agreed_hash(state, {"strikes": [1, 2]}) == expected


def test_every_bit_counts_and_nothing_else():
    state = agreed()
    found = {agreed_hash(state, LEDGER)}
    assert agreed_hash(state.copy(), json.loads(json.dumps(LEDGER))) in found
    for name in ("weights", "momentum", "zero"):
        other = state.copy()
        vector = other.outer[name] if name == "momentum" else other.weights
        vector.view(torch.int32)[-1] ^= 1
        if name == "zero":
            vector[:2] = torch.tensor([0.0, -0.0])
            found.add(agreed_hash(other, LEDGER))
            vector[:2] = torch.tensor([-0.0, 0.0])
        found.add(agreed_hash(other, LEDGER))
    found.add(agreed_hash(dataclasses.replace(state, round=4), LEDGER))
    found.add(agreed_hash(state, {**LEDGER, "strikes": {BOB.peer: 1}}))
    found.add(agreed_hash(Agreed(3, state.weights, {"speed": state.outer["momentum"]}), LEDGER))
    swapped = Agreed(3, state.outer["momentum"], {"momentum": state.weights})
    found.add(agreed_hash(swapped, LEDGER))
    assert len(found) == 9


def test_the_hash_is_of_values_however_they_lie_in_memory():
    state = agreed()
    spread = torch.stack([state.weights, state.weights], 1)[:, 0]
    assert not spread.is_contiguous()
    assert agreed_hash(Agreed(3, spread, state.outer), LEDGER) == SNAPSHOT_HASH
    with pytest.raises(ValueError, match="bfloat16"):
        agreed_hash(Agreed(3, state.weights.bfloat16()), LEDGER)


def test_a_snapshot_is_read_as_it_was_written():
    state, ledger = read(write_snapshot(agreed(), LEDGER, RUN, ALICE))
    assert state.round == 3 and ledger == LEDGER
    assert torch.equal(state.weights, agreed().weights)
    assert torch.equal(state.outer["momentum"], agreed().outer["momentum"])
    state.weights += 1  # it is the reader's own


def test_only_the_state_that_most_peers_have_is_believed():
    other = agreed()
    other.weights[5] += 1e-6
    with pytest.raises(BadMessage, match="another state"):
        read(write_snapshot(other, LEDGER, RUN, ALICE))
    with pytest.raises(BadMessage, match="another state"):
        read(write_snapshot(agreed(), {"strikes": {}}, RUN, ALICE))
    with pytest.raises(BadMessage, match="round 3"):
        read(write_snapshot(agreed(), LEDGER, RUN, ALICE), round=4)
    with pytest.raises(BadMessage, match="signed by"):
        read(write_snapshot(agreed(), LEDGER, RUN, BOB))


def test_where_nothing_is_agreed_any_finite_state_will_do():
    other = agreed()
    other.weights[5] += 1
    state, _ = read(write_snapshot(other, LEDGER, RUN, ALICE), base=None)
    assert torch.equal(state.weights, other.weights)
    for vector in (other.weights, other.outer["momentum"]):
        kept, vector[7] = vector[7].clone(), torch.nan
        with pytest.raises(BadMessage, match="NaN"):
            read(write_snapshot(other, LEDGER, RUN, ALICE), base=None)
        vector[7] = kept
    planes = [agreed().weights.numpy().view(np.uint8), b"[1]"]
    with pytest.raises(BadMessage, match="ledger"):
        read(write_message("snapshot", RUN, 3, {"outer": []}, planes, ALICE), base=None)


@pytest.mark.parametrize(
    "outer, keep",
    [
        (["momentum"], 2),
        (["momentum", "second"], 3),
        (["b", "a"], 4),
        (["a", "a"], 4),
        ([["momentum"]], 3),
        ("momentum", 3),
        (None, 3),
    ],
)
def test_snapshots_of_another_make_are_refused(outer, keep):
    message = read_message(
        write_snapshot(agreed(), LEDGER, RUN, ALICE), run=RUN, kind="snapshot", limit=2**20
    )
    planes = [message.planes[0]] * (keep - 1) + [message.planes[-1]]
    data = write_message("snapshot", RUN, 3, {"outer": outer}, planes, ALICE)
    for base in (SNAPSHOT_HASH, None):
        with pytest.raises(BadMessage, match="outer vectors"):
            read(data, base=base)


def test_vectors_of_another_length_are_refused():
    short = Agreed(3, agreed().weights[:-1], {})
    with pytest.raises(BadMessage, match="fp32 values each"):
        read(write_snapshot(short, LEDGER, RUN, ALICE))
    planes = [np.zeros(4 * LAYOUT.count + 1, np.uint8), b"{}"]
    with pytest.raises(BadMessage, match="fp32 values each"):
        read(write_message("snapshot", RUN, 3, {"outer": []}, planes, ALICE))


def test_the_limit_of_a_snapshot_holds_what_methods_have():
    state = agreed()
    state.outer = dict.fromkeys("abcdef", state.weights)
    assert len(write_snapshot(state, LEDGER, RUN, ALICE)) < most_snapshot_bytes(LAYOUT.count)

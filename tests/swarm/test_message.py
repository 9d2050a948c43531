"""Identities and the frame of messages, beside RFC 8032, openssl and a frame spelt out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import stat
import struct
import subprocess
import threading
import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tests.swarm.made import ALICE, BOB, RUN, messages
from trainwright.errors import UserError
from trainwright.swarm.identity import Identity, is_peer, peer_of, signed_by
from trainwright.swarm.message import (
    HEADER_BYTES,
    VALUES,
    BadMessage,
    read_json,
    read_message,
    write_json,
    write_message,
)

LIMIT = 2**20


def note(body=None, planes=(), by=ALICE, round=3, kind="note", run=RUN) -> bytes:
    return write_message(kind, run, round, body or {}, list(planes), by)


def refused(data: bytes, **asked) -> str:
    asked = {"run": RUN, "kind": "note", "limit": LIMIT} | asked
    with pytest.raises(BadMessage) as caught:
        read_message(data, **asked)
    return caught.value.reason


def forged(header: bytes, planes: bytes = b"", by: Identity = ALICE) -> bytes:
    """A message with this header, whatever it is, rightly hashed and signed."""
    content = by.public + bytes.fromhex(RUN) + struct.pack("<I", len(header)) + header + planes
    digest = hashlib.sha256(content).digest()
    return b"TWM1" + digest + by.sign(b"trainwright message\n" + digest) + content


def header(body: bytes = b"{}", planes: bytes = b"[]", round: bytes = b"3") -> bytes:
    return b'{"body":%s,"kind":"note","planes":%s,"round":%s}' % (body, planes, round)


# Identities


def test_keys_and_signatures_are_those_of_rfc_8032():
    # Section 7.1, test 1.
    seed = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    signature = (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )
    identity = Identity.from_seed(bytes.fromhex(seed))
    assert identity.public.hex() == public
    assert identity.sign(b"").hex() == signature
    assert signed_by(identity.public, bytes.fromhex(signature), b"")
    assert not signed_by(identity.public, bytes.fromhex(signature), b"x")
    assert not signed_by(BOB.public, bytes.fromhex(signature), b"")
    assert identity.peer == hashlib.sha256(bytes.fromhex(public)).hexdigest()[:20]


def test_a_signature_moved_by_the_group_order_is_another_and_refused():
    order = 2**252 + 27742317777372353535851937790883648493
    signature = ALICE.sign(b"data")
    moved = int.from_bytes(signature[32:], "little") + order
    assert not signed_by(ALICE.public, signature[:32] + moved.to_bytes(32, "little"), b"data")


def test_a_kept_identity_stays_the_same_and_private(tmp_path):
    path = tmp_path / "peer" / "identity.pem"
    first = Identity.kept_at(path)
    assert Identity.kept_at(path).peer == first.peer != Identity.new().peer
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    if openssl := shutil.which("openssl"):
        shown = subprocess.run(
            [openssl, "pkey", "-in", path, "-pubout", "-outform", "DER"],
            capture_output=True,
            check=True,
        ).stdout
        assert shown[-32:] == first.public


def test_of_many_that_create_an_identity_at_once_all_get_the_first(tmp_path):
    path, found = tmp_path / "identity.pem", []
    threads = [
        threading.Thread(target=lambda: found.append(Identity.kept_at(path).peer)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n"])
def test_a_file_with_something_else_is_refused_and_left(tmp_path, content):
    path = tmp_path / "identity.pem"
    path.write_bytes(content)
    with pytest.raises(UserError, match="Ed25519"):
        Identity.kept_at(path)
    assert path.read_bytes() == content


def test_a_key_of_another_kind_is_refused(tmp_path):
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    pem = generate_private_key(SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    (tmp_path / "identity.pem").write_bytes(pem)
    with pytest.raises(UserError, match="Ed25519"):
        Identity.kept_at(tmp_path / "identity.pem")


@pytest.mark.parametrize(
    "text", ["../../etc/passwd", "0" * 19, "0" * 21, "G" * 20, "0" * 20 + "\n", "", None, 7]
)
def test_what_is_no_peer(text):
    assert not is_peer(text)


# The frame


def test_the_frame_read_byte_by_byte():
    planes = [np.arange(5, dtype=np.uint8), b"", np.full(3, 255, np.uint8)]
    data = note({"b": [1, None], "a": "é"}, planes)
    magic, digest, signature, public, run, size = struct.unpack("<4s32s64s32s16sI", data[:152])
    assert magic == b"TWM1" and public == ALICE.public and run.hex() == RUN
    text = data[152 : 152 + size]
    assert text.decode() == (
        '{"body":{"a":"é","b":[1,null]},"kind":"note","planes":[5,0,3],"round":3}'
    )
    assert data[152 + size :] == bytes([0, 1, 2, 3, 4, 255, 255, 255])
    assert digest == hashlib.sha256(data[100:]).digest()
    Ed25519PublicKey.from_public_bytes(public).verify(signature, b"trainwright message\n" + digest)

    found = read_message(data, run=RUN, kind="note", limit=len(data), peer=ALICE.peer, round=3)
    assert (found.kind, found.run, found.peer, found.round) == ("note", RUN, ALICE.peer, 3)
    assert found.body == {"a": "é", "b": [1, None]} and found.digest == digest.hex()
    assert [bytes(plane) for plane in found.planes] == [bytes(plane) for plane in planes]
    assert found.peer == peer_of(public)


def test_planes_are_the_readers_own_memory():
    data = note({}, [b"\0" * 3, np.arange(8, dtype="<f4").view(np.uint8)])
    found = read_message(data, run=RUN, kind="note", limit=LIMIT)
    found.planes[1].view(np.float32)[:] += 1
    assert found.planes[1].view(np.float32).tolist() == list(range(1, 9))
    assert read_message(data, run=RUN, kind="note", limit=LIMIT).digest == found.digest


def test_the_same_message_is_the_same_bytes():
    assert note({"a": 1, "b": 2}) == note({"b": 2, "a": 1})
    assert note(planes=[np.zeros((2, 3), np.uint8)]) == note(planes=[bytes(6)])
    assert note(planes=[np.arange(9, dtype=np.uint8)[::2]]) == note(planes=[bytes([0, 2, 4, 6, 8])])


def test_a_message_costs_300_bytes_more_than_its_planes():
    planes = read_message(
        messages()["contribution"], run=RUN, kind="contribution", limit=LIMIT
    ).planes
    assert len(messages()["contribution"]) - sum(plane.size for plane in planes) < 300


@pytest.mark.parametrize(
    "body",
    [
        {"loss": float("nan")},
        {"text": "one\ntwo"},
        {"key": "../identity.pem"},
        {"colour": "\x1b[31m"},
        {"big": 2**53 + 1},
        {"long": "x" * HEADER_BYTES},
        {"many": [0] * VALUES},
        {"deep": [[[[[[[[[]]]]]]]]]},
        {"lone": "\ud800"},
    ],
)
def test_what_nobody_would_read_is_not_written(body):
    with pytest.raises(ValueError):
        note(body)


def test_a_plane_of_anything_but_bytes_is_not_written():
    with pytest.raises(ValueError, match="float32"):
        note(planes=[np.zeros(3, np.float32)])


# What is asked for and what is there


def test_every_single_change_is_seen():
    data = note({"a": 1}, [b"planes"])
    for at in range(len(data)):
        for bit in (1, 128):
            changed = bytearray(data)
            changed[at] ^= bit
            refused(bytes(changed))
    for end in range(len(data)):
        refused(data[:end])
    refused(data + b"\0")


def test_messages_in_the_wrong_place_are_refused():
    data = note()
    assert "of round 3" in refused(data, round=4)  # replayed
    assert "no card" in refused(data, kind="card")
    assert f"signed by {ALICE.peer}" in refused(data, peer=BOB.peer)
    assert "another run" in refused(data, run="f" * 32)
    assert "oversized" in refused(data, limit=len(data) - 1)


def test_taking_over_a_message_takes_its_signature_away():
    """Another's content under one's own key, with all that can be mended mended."""
    data = note({"tokens": 5}, [b"work"])
    content = BOB.public + data[132:]
    digest = hashlib.sha256(content).digest()
    assert "signature" in refused(b"TWM1" + digest + data[36:100] + content)
    resigned = b"TWM1" + digest + BOB.sign(b"trainwright message\n" + digest) + content
    assert f"signed by {BOB.peer}" in refused(resigned, peer=ALICE.peer)
    # A signature that the peer made for something else.
    assert "signature" in refused(b"TWM1" + data[4:36] + ALICE.sign(data[4:36]) + data[100:])


def test_the_run_is_signed_too():
    data = note()
    elsewhere = data[:132] + bytes(16) + data[148:]
    assert "another run" in refused(elsewhere)
    assert "damaged" in refused(elsewhere, run="0" * 32)


@pytest.mark.parametrize(
    "text, reason",
    [
        (header(body=b'{"a":1,"a":2}'), "form"),
        (header(body=b'{"a": 1}'), "form"),
        (header(body=b'{"b":1,"a":2}'), "form"),
        (header(body=b'{"a":1.0e0}'), "form"),
        (header(body=b'{"a":"\\u0061"}'), "form"),
        (header(body=b'{"a":NaN}'), "not JSON"),
        (header(body=b'{"a":Infinity}'), "not JSON"),
        (header(body=b'{"a":1e999}'), "not JSON"),
        (header(body=b'{"a":"\\ud800"}'), "not JSON"),
        (header(body=b'{"a":"\xff"}'), "not JSON"),
        (header(body=b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
        (header(body=b'{"a":9007199254740993}'), "too large"),
        (header(body=b'{"a":"\\u001b[2J"}'), "print"),
        (header(body='{"a":"\u202e"}'.encode()), "print"),
        (header(body=b'{"a":"rounds/../../card"}'), "climbs"),
        (header(body=b'{"../a":1}'), "climbs"),
        (header(body=b'{"a":"..\\\\b"}'), "climbs"),
        (header(body=b'{"a":' + b"[" * 7 + b"]" * 7 + b"}"), "deep"),
        (header(body=b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}"), "not JSON"),
        (header(body=b'{"a":[' + b"0," * 5000 + b"0]}"), "values"),
        (header(body=b'{"a":"' + b"x" * HEADER_BYTES + b'"}'), "at most 65536"),
        (header(body=b"[]"), "body"),
        (header(planes=b"[-1]"), "sizes"),
        (header(planes=b"[true]"), "sizes"),
        (header(planes=b"[1.0]"), "sizes"),
        (header(planes=b"{}"), "sizes"),
        (header(planes=b"[" + b"0," * 64 + b"0]"), "sizes"),
        (header(planes=b"[9007199254740992]"), "0 bytes of planes"),
        (header(round=b"-1"), "round"),
        (header(round=b"true"), "round"),
        (header(round=b"3.0"), "round"),
        (b'{"body":{},"kind":"note","planes":[]}', "its header is not"),
        (b'{"body":{},"kind":"note","peer":"x","planes":[],"round":3}', "its header is not"),
        (b'{"body":{},"kind":"../card","planes":[],"round":3}', "climbs"),
        (b'{"body":{},"kind":"No","planes":[],"round":3}', "word"),
        (b"[]", "its header is not"),
        (b"7", "its header is not"),
        (b"", "not JSON"),
    ],
)
def test_headers_of_liars_are_refused(text, reason):
    """Their signatures are right: peers of the run may write what they like."""
    assert reason in refused(forged(text))


def test_bytes_that_no_plane_has_are_refused():
    assert "5 bytes of planes, and its header says 4" in refused(
        forged(header(planes=b"[4]"), b"12345")
    )


def test_a_header_larger_than_the_message_is_refused():
    content = ALICE.public + bytes.fromhex(RUN) + struct.pack("<I", 2**32 - 1)
    digest = hashlib.sha256(content).digest()
    signature = ALICE.sign(b"trainwright message\n" + digest)
    assert "larger than the message" in refused(b"TWM1" + digest + signature + content)


def test_no_message_makes_its_reader_allocate_much():
    """Texts made to become large: many small lists, keys and numbers in few bytes."""
    hostile = [
        b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"a":[' + b"[]," * 1300 + b"[]]}",
        b'{"a":[' + b"{}," * 1300 + b"{}]}",
        b"{" + b",".join(b'"%d":1.5' % number for number in range(10_000, 12_000)) + b"}",
        b'{"a":[' + b"1e9," * 4000 + b"0]}",
        b'{"a":"' + "\U0001f600".encode() + b"x" * 65_000 + b'"}',  # four bytes a character
        b'{"a":"' + b"\\u0041" * 10_000 + b'"}',
        b'{"a":' + b"9" * 4000 + b"}",
    ]
    for body in hostile:
        data = forged(header(body=body))
        tracemalloc.start()
        with contextlib.suppress(BadMessage):
            read_message(data, run=RUN, kind="note", limit=LIMIT)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20, body[:20]


def test_json_with_lines_where_lines_are_wanted():
    text = write_json({"a": "one\n\ttwo"})
    assert read_json(text, limit=99, lines=True) == json.loads(text)
    with pytest.raises(BadMessage, match="print"):
        read_json(text, limit=99)
    with pytest.raises(BadMessage, match="print"):
        read_json(write_json("one\rtwo"), limit=99, lines=True)


@pytest.mark.parametrize("run", ["", "../" * 11, "G" * 32, "A" * 32, "0" * 30, "0 " * 16])
def test_what_is_no_run(run):
    with pytest.raises(ValueError):
        note(run=run)


def test_all_kinds_are_read_as_they_were_written():
    for kind, data in messages().items():
        run = RUN if kind != "manifest" else data[132:148].hex()
        found = read_message(data, run=run, kind=kind, limit=len(data))
        again = write_message(kind, run, found.round, found.body, found.planes, ALICE)
        assert again == data, kind

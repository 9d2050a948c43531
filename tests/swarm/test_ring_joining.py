"""Looking for a ring at its URL's addresses: what is found there instead, and oneself."""

from __future__ import annotations

import socket
import threading
from contextlib import closing

import pytest

from tests.swarm.test_ring import IDS, until
from trainwright.swarm.transports.ring import open_ring
from trainwright.swarm.transports.transport import TransportError


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def problem(url: str, tmp_path, monkeypatch) -> str:
    """What is said of a URL at which there is no ring to join."""
    monkeypatch.setattr("trainwright.swarm.transports.ring.PATIENCE", 0.1)
    with closing(open_ring(url, IDS[1], tmp_path / "one")) as ring:
        until(lambda: "127.0.0.1" in ring._gossip.problem)
        with pytest.raises(TransportError) as error:
            ring.peers()
        return str(error.value)


def test_nobody_is_there(port, tmp_path, monkeypatch):
    listen = f"?listen={port + 1 if port < 65535 else 1024}"
    said = problem(f"ring://secret@127.0.0.1:{port}{listen}", tmp_path, monkeypatch)
    assert said.startswith(f"127.0.0.1:{port}: nobody answers: ") and "refused" in said
    assert "secret" not in said


def test_a_ring_of_another_secret_is_there(port, tmp_path, monkeypatch):
    with closing(open_ring(f"ring://one@127.0.0.1:{port}", IDS[0], tmp_path)):
        said = problem(f"ring://another@127.0.0.1:{port}", tmp_path, monkeypatch)
        assert said == f"127.0.0.1:{port}: {IDS[0]} has another secret than this URL"


def test_another_program_is_there(tmp_path, monkeypatch):
    def answer() -> None:
        with listening.accept()[0] as sock:
            sock.recv(1000)
            sock.sendall(b"HTTP/1.0 400 Bad request\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=answer, daemon=True).start()
        url = f"ring://127.0.0.1:{listening.getsockname()[1]}"
        assert "something else than a ring" in problem(url, tmp_path, monkeypatch)


def test_who_only_looks_leaves_the_address_to_the_peers(port, tmp_path):
    url = f"ring://secret@127.0.0.1:{port}"
    with (
        closing(open_ring(url, IDS[1], tmp_path / "looks", visit=True)) as visitor,
        closing(open_ring(url, IDS[0], tmp_path / "peer")) as peer,
    ):
        assert peer._gossip.own.port == port != visitor._gossip.own.port
        peer.settle("run", b"mine", ())
        until(lambda: visitor.settled("run", 9) == b"mine")


def test_oneself_is_there(port, tmp_path):
    """A machine that others reach at the URL's address, and that only knows the port: a ring may
    be begun on it.
    """
    url = f"ring://secret@127.0.0.1:{port}?listen={port}"
    with closing(open_ring(url, IDS[0], tmp_path)) as ring:
        assert ring.settle("run", b"mine", ()) == b"mine"
        ring.put("card", b"there")
        assert ring.peers() == [IDS[0]]

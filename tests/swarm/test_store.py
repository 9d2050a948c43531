"""Peers that meet in a folder or a bucket: one behaviour, held against three kinds of store."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from trainwright.errors import UserError
from trainwright.swarm.identity import Identity
from trainwright.swarm.transports import store as store_module
from trainwright.swarm.transports.bucket import Bucket, open_bucket
from trainwright.swarm.transports.folder import Folder
from trainwright.swarm.transports.open import open_transport
from trainwright.swarm.transports.store import Store
from trainwright.swarm.transports.transport import Listed, TransportError

Open = Callable[[str], Store]


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """URL of a run in a bucket of moto's S3 server on loopback."""
    moto = pytest.importorskip("moto.server", reason="moto, an S3 server for tests, is not here")
    boto3 = pytest.importorskip("boto3")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret")):
            patch.setenv(f"AWS_{name}", value)
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
        server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        client.create_bucket(Bucket="swarm")
        yield f"s3://swarm/run?endpoint={endpoint}&region=us-east-1"
        server.stop()


@pytest.fixture(params=["folder", "memory", "s3"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens an empty store, by peer."""
    if request.param == "folder":
        return lambda me: Store(Folder(tmp_path), me)
    if request.param == "memory":
        obstore = pytest.importorskip("obstore")
        memory = obstore.store.MemoryStore()
        return lambda me: Store(Bucket(memory), me)
    url = request.getfixturevalue("s3_server").replace("/run?", f"/{tmp_path.name}?")
    return lambda me: Store(open_bucket(url), me)


def test_shelves_are_read_by_all_and_written_by_one(opened: Open) -> None:
    ada, bob = opened("ada"), opened("bob")
    assert ada.peers() == [] and ada.keys("bob", "") == []
    ada.put("card", b"first")
    ada.put("card", b"second")
    ada.put("rounds/2/contribution", b"two")
    ada.put("rounds/12/contribution", b"twelve")
    bob.put("card", b"")
    assert bob.peers() == ["ada", "bob"]
    assert bob.get("ada", "card", 6) == b"second"
    assert ada.get("bob", "card", 6) == b""
    assert bob.get("ada", "rounds/3/contribution", 6) is None
    assert bob.get("nobody", "card", 6) is None
    assert bob.get("ada", "rounds/2", 6) is None  # a folder is no object
    twelve, two = (Listed(f"rounds/{n}/contribution", s) for n, s in ((12, 6), (2, 3)))
    assert bob.keys("ada", "") == [Listed("card", 6), twelve, two]
    assert bob.keys("ada", "rounds") == [twelve, two]
    assert bob.keys("ada", "rounds/1") == []  # no prefix of names, a path
    ada.delete("rounds/12/contribution")
    ada.delete("rounds/12/contribution")
    assert bob.keys("ada", "rounds") == [two]
    assert ada.bytes_moved() == (len(b"first" + b"second" + b"two" + b"twelve"), 0)
    assert bob.bytes_moved() == (0, len(b"second"))


def test_a_register_is_settled_once(opened: Open) -> None:
    ada, bob = opened("ada"), opened("bob")
    assert ada.settled("rounds/7", 100) is None
    assert bob.settle("rounds/7", b"bob's", ()) == b"bob's"
    assert ada.settle("rounds/7", b"ada's", ()) == b"bob's"
    assert ada.settle("rounds/7.1", b"ada's", ()) == b"ada's"
    assert ada.settled("rounds/7", 5) == b"bob's"
    with pytest.raises(ValueError, match="over 4"):
        ada.settled("rounds/7", 4)


def test_of_many_that_settle_at_once_one_is_first(opened: Open) -> None:
    peers = [opened(f"peer{n}") for n in range(6)]
    for attempt in range(4):
        found: list[bytes] = []
        barrier = threading.Barrier(len(peers))

        def settle(peer: Store, register: str, found=found, barrier=barrier) -> None:
            barrier.wait()
            found.append(peer.settle(register, peer.me.encode(), ()))

        threads = [
            threading.Thread(target=settle, args=(peer, f"rounds/{attempt}")) for peer in peers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == len(peers) and len(set(found)) == 1


def test_large_objects_come_whole(opened: Open) -> None:
    data = os.urandom(12 << 20)  # three parts, the last of them short
    ada = opened("ada")
    ada.put("snapshots/1", data)
    assert opened("bob").get("ada", "snapshots/1", len(data)) == data


def test_too_large_is_refused_unread(opened: Open) -> None:
    ada, bob = opened("ada"), opened("bob")
    ada.put("card", bytes(101))
    with pytest.raises(ValueError, match="101 bytes, over 100"):
        bob.get("ada", "card", 100)
    assert bob.bytes_moved() == (0, 0)


CLIMBING = [
    "../ada/card", "..", "a/../b", "/etc/passwd", "a//b", "a/", "", ".aside/x", "a/.b", "a\\b",
    "a b", "a\0b", "a\n", "ä", "%2e%2e/x", "x" * 101, "a/" * 120 + "a", "~/x", "C:x",
]  # fmt: skip


@pytest.mark.parametrize("bad", CLIMBING)
def test_paths_that_climb_are_refused(tmp_path: Path, bad: str) -> None:
    ada = Store(Folder(tmp_path), "ada")
    calls: list[Callable[[], object]] = [
        lambda: ada.put(bad, b"x"),
        lambda: ada.get("ada", bad, 1),
        lambda: ada.get(bad, "card", 1),
        lambda: ada.keys(bad, ""),
        lambda: ada.delete(bad),
        lambda: ada.settle(bad, b"x", ()),
        lambda: ada.settled(bad, 1),
        lambda: Store(Folder(tmp_path), bad),
    ]
    if bad:
        calls.append(lambda: ada.keys("ada", bad))
    for call in calls:
        with pytest.raises(ValueError, match="not "):
            call()
    assert list(tmp_path.iterdir()) == []


def test_what_strangers_put_into_the_folder_does_no_harm(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "run", tmp_path / "secret"
    root.mkdir()
    elsewhere.write_bytes(b"secret")
    ada = Store(Folder(root), "ada")
    ada.put("card", b"card")
    shelf = root / "peers" / "eve"
    shelf.mkdir()
    (shelf / "card").symlink_to(elsewhere)
    (shelf / "loop").symlink_to(shelf)
    (shelf / "a b").write_bytes(b"")
    (root / "peers" / "not a peer").mkdir()
    os.mkfifo(shelf / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(shelf / "socket"))
    server.close()
    assert [ada.get("eve", key, 100) for key in ("card", "loop", "pipe", "socket")] == [None] * 4
    assert ada.keys("eve", "") == [] and ada.peers() == ["ada", "eve"]


def test_a_flood_of_objects_is_listed_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MOST_LISTED", 5)
    ada = Store(Folder(tmp_path), "ada")
    for n in range(8):
        ada.put(f"rounds/{n}", b"")
    assert len(ada.keys("ada", "")) == 5


def test_a_folder_that_is_away_is_an_error_and_comes_back(tmp_path: Path) -> None:
    root, away = tmp_path / "run", tmp_path / "away"
    root.mkdir()
    ada = Store(Folder(root), "ada")
    ada.put("card", b"card")
    root.rename(away)
    for call in (
        lambda: ada.put("rounds/1/contribution", b"x"),
        lambda: ada.get("ada", "card", 9),
        ada.peers,
        lambda: ada.keys("ada", ""),
        lambda: ada.delete("card"),
        lambda: ada.settle("run", b"x", ()),
        lambda: ada.settled("run", 9),
    ):
        with pytest.raises(TransportError):
            call()
        assert not root.exists()  # an empty one in its place would be another run
    away.rename(root)
    assert ada.get("ada", "card", 9) == b"card" and ada.settled("run", 9) is None
    assert ada.settle("run", b"x", ()) == b"x"


def test_a_bucket_that_is_away_is_an_error_and_comes_back(s3_server: str) -> None:
    # A relay in front of the server is what comes and goes.
    host, port = s3_server.split("endpoint=http://")[1].split("&")[0].split(":")
    relay = Relay((host, int(port)))
    ada = Store(open_bucket(s3_server.replace(f"{host}:{port}", relay.address)), "ada")
    ada.put("card", b"card")
    relay.close()
    for call in (
        lambda: ada.put("card", b"x"),
        lambda: ada.get("ada", "card", 9),
        lambda: ada.settle("away", b"x", ()),
        ada.peers,
    ):
        with pytest.raises(TransportError, match=r"HTTP error|sending request"):
            call()
    relay.open()
    assert ada.get("ada", "card", 9) == b"card" and "ada" in ada.peers()
    relay.close()


REFUSALS = {403: "may not be read", 401: "may not be read", 404: "no such", 301: "region"}


def test_a_bucket_that_cannot_be_had_is_the_users_to_put_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not the secret")

    class Answer(BaseHTTPRequestHandler):
        code = 0

        def do_GET(self) -> None:
            self.send_response(self.code)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *words: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"s3://swarm/run?endpoint=http://127.0.0.1:{server.server_port}"
        for Answer.code, says in REFUSALS.items():
            with pytest.raises(UserError, match=says):
                open_bucket(url)
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(UserError, match="fix: set the right AWS_ACCESS_KEY_ID"):
            open_bucket(url)
        with pytest.raises(UserError, match=r"write \?endpoint=https://host"):
            open_bucket(url.replace("http://", ""))
        server.shutdown()


class Relay:
    """TCP from a port of its own to a server, until it is closed; opens again on the same port."""

    def __init__(self, server: tuple[str, int]) -> None:
        self.server, self.port = server, 0
        self.open()

    def open(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listening.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, args=(self.listening,), daemon=True).start()

    def close(self) -> None:
        for each in [self.listening, *self.sockets]:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                near = listening.accept()[0]
            except OSError:
                return
            far = socket.create_connection(self.server)
            self.sockets += [near, far]
            for pair in ((near, far), (far, near)):
                threading.Thread(target=_pump, args=pair, daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def test_readers_see_whole_objects_while_they_are_replaced(tmp_path: Path) -> None:
    ada, bob = (Store(Folder(tmp_path), me) for me in ("ada", "bob"))
    ended = threading.Event()

    def write() -> None:
        for n in range(100):
            ada.put("rounds/1/card", bytes([n]) * 4000)
            ada.delete("rounds/1/card")  # the folder goes with it, and another write brings it back
        ended.set()

    def other() -> None:
        for _ in range(100):
            ada.put("rounds/2", b"x")
            ada.delete("rounds/2")

    threads = [threading.Thread(target=each) for each in (write, other)]
    for thread in threads:
        thread.start()
    seen = 0
    while not ended.is_set():
        data = bob.get("ada", "rounds/1/card", 4000)
        assert data is None or (len(data) == 4000 and len(set(data)) == 1)
        seen += data is not None
    for thread in threads:
        thread.join()
    assert not list((tmp_path / ".aside").iterdir()) and not (tmp_path / "peers").exists()


def test_files_that_a_crash_left_aside_are_taken_away(tmp_path: Path) -> None:
    Store(Folder(tmp_path), "ada").put("card", b"card")
    old, new = tmp_path / ".aside" / "old", tmp_path / ".aside" / "new"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, new.stat().st_mtime - 4000))
    Store(Folder(tmp_path), "bob").put("card", b"card")
    assert not old.exists() and new.exists()


def test_a_disk_without_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UserError, match="no hard links"):
        Store(Folder(tmp_path), "ada").settle("run", b"x", ())


def test_urls(tmp_path: Path, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ada, bob = Identity.from_seed(b"a" * 32), Identity.from_seed(b"b" * 32)
    folder, own = tmp_path / "run", tmp_path / "own"
    with pytest.raises(UserError, match="no such folder"):
        open_transport(str(folder), ada, own)
    open_transport(str(folder), ada, own, create=True).put("card", b"card")
    looked = open_transport(f"file://{folder}", bob, own)
    assert looked.get(ada.peer, "card", 4) == b"card" and looked.peers() == [ada.peer]
    assert not own.exists()
    open_transport(s3_server, ada, own).put("card", b"card")
    endpoint = s3_server.split("endpoint=")[1].split("&")[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert open_transport("s3://swarm/run", bob, own).get(ada.peer, "card", 4) == b"card"
    with pytest.raises(UserError, match="no such bucket"):
        open_transport(s3_server.replace("swarm", "other"), ada, own)
    for wrong in ("ftp://host/run", "s3:///run", "s3://swarm/run?colour=red"):
        with pytest.raises(UserError):
            open_transport(wrong, ada, own)

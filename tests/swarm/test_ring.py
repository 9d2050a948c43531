"""The ring among threads and real processes, which are killed, stopped and started again."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from tests.swarm.ring_peer import RingPeer
from trainwright.errors import UserError
from trainwright.swarm.transports.ring import Ring, RingUrl, open_ring
from trainwright.swarm.transports.ring_frames import PIECE, Address
from trainwright.swarm.transports.transport import Listed, TransportError

IDS = [hashlib.sha256(bytes([number])).hexdigest()[:20] for number in range(5)]


@pytest.fixture
def url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"ring://127.0.0.1:{sock.getsockname()[1]}"


@contextmanager
def rings(url: str, directory: Path, count: int) -> Iterator[list[Ring]]:
    """So many peers in this process, who all know each other."""
    with ExitStack() as stack:
        found = [
            stack.enter_context(closing(open_ring(url, me, directory / me))) for me in IDS[:count]
        ]
        for each in found:
            each.put("card", each.me.encode())
        until(lambda: all(each._gossip.ring() == found[0]._gossip.ring() for each in found))
        until(lambda: all(len(each._gossip.ring()) == count for each in found))
        yield found


def until(holds: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until it does; a test that waits longer has failed."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def fetched(each: Ring, peer: str, key: str, limit: int = 1 << 28) -> bytes:
    """An object, as soon as it is heard of."""
    until(lambda: each.keys(peer, "") and key in {listed.key for listed in each.keys(peer, "")})
    return each.get(peer, key, limit)


def partial_bytes(directory: Path, data: bytes) -> int:
    path = directory / "ring" / "partial" / hashlib.sha256(data).hexdigest()
    return path.stat().st_size if path.exists() else 0


def test_shelves_are_seen_by_all_as_they_change(url, tmp_path):
    with rings(url, tmp_path, 3) as (a, b, c):
        assert a.peers() == b.peers() == c.peers() == sorted([a.me, b.me, c.me])
        a.put("rounds/1/contribution", b"x" * 50_000)
        a.put("rounds/1/scores", b"s")
        a.put("rounds/11/scores", b"t")
        assert fetched(c, a.me, "rounds/11/scores") == b"t"
        assert c.keys(a.me, "rounds/1") == [
            Listed("rounds/1/contribution", 50_000),
            Listed("rounds/1/scores", 1),
        ]
        assert c.get(a.me, "rounds/1/contribution", 50_000) == b"x" * 50_000
        with pytest.raises(ValueError, match="50,000 bytes, over 49,999"):
            b.get(a.me, "rounds/1/contribution", 49_999)
        assert b.get(a.me, "rounds/2/contribution", 10) is None
        assert b.get(IDS[4], "card", 10) is None and b.keys(IDS[4], "") == []
        for number in range(5):
            a.put("card", b"%d" % number * 3000)
        until(lambda: b.get(a.me, "card", 5000) == b"4" * 3000 == c.get(a.me, "card", 5000))
        a.delete("card")
        a.delete("never-was")
        until(lambda: b.get(a.me, "card", 5000) is None and c.get(a.me, "card", 5000) is None)
        # Nothing stays on anybody's disk that is on no shelf.
        until(lambda: not partial_bytes(tmp_path / b.me, b"4" * 3000))
        digest = hashlib.sha256(b"4" * 3000).hexdigest()
        assert not list(tmp_path.glob(f"*/ring/objects/{digest}"))


@pytest.mark.parametrize("key", ["../x", "/x", "a//b", "a/../b", ".hidden", "a\\b", "", "x" * 300])
def test_keys_that_climb_are_refused(url, tmp_path, key):
    with closing(open_ring(url, IDS[0], tmp_path)) as ring:
        for call in (
            lambda: ring.put(key, b""),
            lambda: ring.get(IDS[0], key, 1),
            lambda: ring.delete(key),
            lambda: ring.settle(key, b"", (IDS[0],)),
            lambda: ring.settled(key, 1),
            lambda: ring.get(f"../{IDS[0]}", "card", 1),
        ):
            with pytest.raises(ValueError):
                call()


def test_a_large_object_leaves_its_owner_once_and_goes_round(url, tmp_path):
    data = os.urandom(1 << 22)
    with rings(url, tmp_path, 4) as found:
        by_name = {each.me: each for each in found}
        owner, *others = (by_name[name] for name in measured_ring(found))
        before = owner.bytes_moved()[0]
        owner.put("big", data)
        with ThreadPoolExecutor() as pool:
            assert set(pool.map(lambda each: fetched(each, owner.me, "big"), others)) == {data}
        assert len(data) < owner.bytes_moved()[0] - before < 1.1 * len(data)


def test_the_slowest_link_is_not_part_of_the_ring(url, tmp_path):
    with rings(url, tmp_path, 4) as found:
        names = sorted(measured_ring(found))
        slow = names[0], names[1]
        for each in found:
            for peer in names:
                if peer != each.me:
                    each._gossip._rates[peer] = 10 if (peer, each.me) == slow else 50
        until(lambda: all(slow not in links(each._gossip.ring()) for each in found))
        until(lambda: len({each._gossip.ring() for each in found}) == 1)


def measured_ring(found: list[Ring]) -> tuple[str, ...]:
    """The order on which all agree once every link has been measured and told of."""

    def told(each: Ring) -> bool:
        rates = (each._library.about(other.me).get("rates", ()) for other in found)
        return all(len(known) == len(found) - 1 for known in rates)

    until(lambda: all(told(each) for each in found))
    until(lambda: len({each._gossip.ring() for each in found}) == 1)
    return found[0]._gossip.ring()


def links(order: tuple[str, ...]) -> list[tuple[str, str]]:
    return list(zip(order, (*order[1:], order[0]), strict=True))


@pytest.mark.parametrize(
    "blow", ["kill", *(pytest.param(each, marks=pytest.mark.prove) for each in ("calm", "stop"))]
)
def test_a_relay_that_goes_is_gone_round_and_nothing_is_sent_twice(url, tmp_path, blow):
    """Owner → relay → this process; the relay dies, or freezes, while it passes an object on."""
    data = os.urandom(1 << 20)
    ids = sorted(IDS[:3])
    with ExitStack() as stack:
        me = stack.enter_context(closing(open_ring(url, ids[0], tmp_path / "me")))
        me.put("card", b"")
        others = {}
        for name in ids[1:]:
            others[name] = RingPeer(url, name, tmp_path / name, rate=2e6)
            stack.callback(others[name].kill)
            others[name].ask("put", "card", "")
        until(lambda: all(len(me._library.about(name).get("rates", ())) == 2 for name in ids))
        until(lambda: all(each.ask("ring") == [*me._gossip.ring()] for each in others.values()))
        order = me._gossip.ring()
        relay, owner = others[order[2]], others[order[1]]  # this one is the first by name
        owner.ask("put", "big", data.hex())
        before, sent = me.bytes_moved()[1], owner.ask("bytes_moved")[0]
        with ThreadPoolExecutor() as pool:
            found = pool.submit(fetched, me, owner.me, "big")
            until(lambda: partial_bytes(tmp_path / "me", data) > 4 * PIECE)
            assert me._pulls._running[hashlib.sha256(data).hexdigest()].source == relay.me
            if blow != "calm":
                getattr(relay, blow)()
            assert found.result(60) == data
        if blow == "calm":
            assert owner.ask("bytes_moved")[0] - sent < 1.2 * len(data)
        assert me.bytes_moved()[1] - before < 1.2 * len(data)


def test_what_came_in_before_a_crash_is_not_fetched_again(url, tmp_path):
    data = os.urandom(1 << 21)
    with closing(open_ring(url, IDS[0], tmp_path / "owner")) as owner:
        owner.put("big", data)
        child = RingPeer(url, IDS[1], tmp_path / "child")
        child.ask("put", "card", "")
        until(lambda: child.ask("keys", owner.me, ""))
        child.kill()
        half = len(data) // 2
        digest = hashlib.sha256(data).hexdigest()
        (tmp_path / "child/ring/partial" / digest).write_bytes(data[:half])
        with closing(open_ring(url, IDS[1], tmp_path / "child")) as again:
            until(lambda: again.keys(owner.me, ""))
            until(lambda: again._gossip._rates)  # it has measured the link
            before = again.bytes_moved()[1]
            assert again.get(owner.me, "big", len(data)) == data
            assert again.bytes_moved()[1] - before < 0.6 * len(data)


def test_damage_on_the_way_is_found_and_put_right(url, tmp_path):
    data = os.urandom(1 << 20)
    with rings(url, tmp_path, 2) as (a, b):
        digest = hashlib.sha256(data).hexdigest()
        a.put("big", data)
        (tmp_path / b.me / "ring/partial" / digest).write_bytes(b"something else")
        with pytest.raises(TransportError, match="not what it should be"):
            fetched(b, a.me, "big")
        assert b.get(a.me, "big", 1 << 20) == data
        (tmp_path / b.me / "ring/objects" / digest).write_bytes(data[:-1] + b"?")
        assert b.get(a.me, "big", 1 << 20) == data


def test_what_a_peer_left_behind_outlives_it_and_a_new_start_of_all_others(url, tmp_path):
    data = os.urandom(1 << 17)
    with rings(url, tmp_path, 3) as (a, b, c):
        c.put("manifest", b"small")
        c.put("snapshot", data)
        assert fetched(b, c.me, "snapshot") == data
        c.close()
        until(lambda: c.me not in a._links.live())
        assert a.get(c.me, "snapshot", 1 << 20) == data  # b has it
    with (
        closing(open_ring(url, a.me, tmp_path / a.me)) as first,
        closing(open_ring(url, b.me, tmp_path / b.me)),
        closing(open_ring(url, IDS[3], tmp_path / "newcomer")) as newcomer,
    ):
        assert fetched(newcomer, c.me, "manifest") == b"small"
        assert fetched(newcomer, c.me, "snapshot") == data
        assert first.peers() == newcomer.peers() == sorted([a.me, b.me, c.me])


def test_an_object_that_nobody_has_any_more_is_an_error_not_a_wait(url, tmp_path):
    with rings(url, tmp_path, 2) as (a, b):
        a.put("big", os.urandom(1 << 20))
        until(lambda: b.keys(a.me, "big") or len(b.keys(a.me, "")) == 2)
        a.close()
        with pytest.raises(TransportError, match="cannot be had"):
            b.get(a.me, "big", 1 << 20)


def test_a_peer_that_lost_its_disk_is_heard_again(url, tmp_path):
    with rings(url, tmp_path, 2) as (a, b):
        for number in range(9):
            b.put("card", b"%d" % number)
        until(lambda: a.get(b.me, "card", 9) == b"8")
        b.close()
        with closing(open_ring(url, b.me, tmp_path / "another disk")) as again:
            again.put("card", b"new")
            until(lambda: a.get(b.me, "card", 9) == b"new")


def test_in_a_large_ring_news_comes_through_others(url, tmp_path, monkeypatch):
    monkeypatch.setattr("trainwright.swarm.transports.ring_gossip._FOLLOWED", 2)
    monkeypatch.setattr("trainwright.swarm.transports.ring_gossip._RETRIED", 1)
    monkeypatch.setattr("trainwright.swarm.transports.ring_gossip._ANEW", 0.5)
    with rings(url, tmp_path, 5) as found:
        for each in found:
            each.put("card", b"newer")
        until(lambda: all(a.get(b.me, "card", 99) == b"newer" for a in found for b in found))


def test_a_full_disk_is_an_error_of_the_transport(url, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with closing(open_ring(url, IDS[0], tmp_path)) as ring:
        with monkeypatch.context() as patch:
            patch.setattr("trainwright.swarm.transports.ring_objects.write_atomically", full)
            with pytest.raises(TransportError, match="No space left"):
                ring.put("card", b"1")
        ring.put("card", b"2")
        assert ring.get(ring.me, "card", 1) == b"2"


def test_registers_have_one_value_whoever_asks(url, tmp_path):
    with rings(url, tmp_path, 4) as found, ThreadPoolExecutor() as pool:
        electorate = tuple(sorted(each.me for each in found))
        for number in range(5):
            name = f"rounds/{number}"
            settled = [
                pool.submit(each.settle, name, each.me.encode(), electorate) for each in found
            ]
            values = {each.result() for each in settled}
            assert len(values) == 1 and values <= {each.me.encode() for each in found}
            assert {each.settled(name, 20) for each in found} == values
            with pytest.raises(ValueError, match="over 19"):
                found[0].settled(name, 19)
        assert found[0].settled("rounds/99", 100) is None
        # Before there is any round, whoever is at the URL's address decides.
        assert found[2].settle("run", b"mine", ()) == b"mine" == found[0].settle("run", b"x", ())
        # Half of them with the first is a quorum, the other half is none.
        by_name = dict(zip(electorate, sorted(found, key=lambda each: each.me), strict=True))
        by_name[electorate[1]].close()
        by_name[electorate[2]].close()
        last, first = by_name[electorate[3]], by_name[electorate[0]]
        assert (
            last.settle("rounds/5", b"v", electorate)
            == b"v"
            == first.settle("rounds/5", b"w", electorate)
        )


@pytest.mark.prove
def test_without_a_quorum_nothing_is_settled(url, tmp_path):
    with rings(url, tmp_path, 3) as found:
        electorate = tuple(sorted(each.me for each in found))
        for each in found[1:]:
            each.close()
        with pytest.raises(TransportError, match="1 of the last round's 3 peers answer"):
            found[0].settle("rounds/0", b"v", electorate)


@pytest.mark.prove
def test_registers_stay_the_same_whoever_is_killed(url, tmp_path):
    """Three processes settle the same registers at once, one of them killed and started again at
    a moment drawn; in the end all three say the same of each, and every value was somebody's.
    """
    draw, electorate = random.Random(6), tuple(sorted(IDS[:3]))
    said: dict[str, set[str]] = {}
    with ExitStack() as stack:
        peers = {me: RingPeer(url, me, tmp_path / me) for me in electorate}
        stack.callback(lambda: [each.kill() for each in peers.values()])
        for each in peers.values():
            each.ask("put", "card", "")
        for number in range(40):
            name = f"rounds/{number}"
            victim = draw.choice(electorate)
            for me, each in peers.items():
                each.tell("settle", name, f"{me} wants this", electorate)
            time.sleep(draw.uniform(0, 0.06))
            peers[victim].kill()
            said[name] = {str(each.answer()) for me, each in peers.items() if me != victim}
            peers[victim] = RingPeer(url, victim, tmp_path / victim)
        for name, values in said.items():
            now = {each.ask("settle", name, "too late", electorate) for each in peers.values()}
            assert len(now) == 1 and "too late" not in now
            assert now == {value for value in values if "problem" not in value} or not values


def test_a_wrong_secret_is_turned_away(url, tmp_path):
    address = url.removeprefix("ring://")
    with closing(open_ring(f"ring://right@{address}", IDS[0], tmp_path / "a")) as ring:
        ring.put("card", b"")
        for number, wrong in enumerate((url, f"ring://wrong@{address}")):
            with closing(open_ring(wrong, IDS[1 + number], tmp_path / str(number))) as other:
                with pytest.raises(TransportError, match="another secret"):
                    other._links.meet(RingUrl.read(wrong).seeds[0])
                assert not other._gossip.joined.is_set()
        assert ring._links.live() == []


def test_strangers_who_send_anything_at_all_do_no_harm(url, tmp_path):
    address = RingUrl.read(url).seeds[0]
    draw = random.Random(7)
    with rings(url, tmp_path, 2) as (a, b):
        for _ in range(60):
            with socket.create_connection(address) as sock:
                length = draw.choice([0, 5, 40, 2**22 + 1, 2**32 - 1])
                sock.sendall(length.to_bytes(4, "big") + draw.randbytes(draw.randint(0, 60)))
        questions = [
            {},
            {"ask": "pull"},
            {"ask": "pull", "digest": "../../../etc/passwd", "offset": 0},
            {"ask": "pull", "digest": "0" * 64, "offset": -1},
            {"ask": "news", "seen": [], "elsewhere": 3, "wait": "x"},
            {"ask": "news", "seen": {}, "elsewhere": [], "wait": float("nan")},
            {"ask": "probe", "size": 1 << 40},
            {"ask": "prepare", "register": "../x", "ballot": [1, "p"]},
            {"ask": "prepare", "register": "x", "ballot": [1.5, None]},
            {"ask": "learn", "register": "a/../b"},
            {"ask": "close"},
            {"ask": ["pull"]},
        ]
        for question in questions:
            with pytest.raises(TransportError):
                b._links.ask(a.me, question)
        b.put("card", b"still here")
        until(lambda: a.get(b.me, "card", 100) == b"still here")
        assert not list(tmp_path.glob("*/ring/ballots/*"))


def test_a_directory_has_one_process(url, tmp_path):
    with (
        closing(open_ring(url, IDS[0], tmp_path)),
        pytest.raises(UserError, match="another process"),
    ):
        open_ring(url, IDS[0], tmp_path)
    open_ring(url, IDS[0], tmp_path).close()


def test_a_url_nobody_answers_at_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("trainwright.swarm.transports.ring.PATIENCE", 0.1)
    with (
        closing(open_ring("ring://192.0.2.1:9", IDS[0], tmp_path)) as ring,
        pytest.raises(TransportError, match="nobody answers"),
    ):
        ring.peers()


def test_urls_are_read():
    read = RingUrl.read("ring://s%40fe@h1.org:7000,10.0.0.2:7001?listen=me.org:9")
    assert read.seeds == (Address("h1.org", 7000), Address("10.0.0.2", 7001))
    assert read.secret == "s@fe" and read.listen == Address("me.org", 9)
    assert RingUrl.read("ring://h:1?listen=7").listen == Address("", 7)
    assert RingUrl.read("ring://a:1").secret == "" and RingUrl.read("ring://a:1/").listen is None
    for wrong in (
        "ring://",
        "ring://host",
        "ring://h:0",
        "ring://h:x",
        "ring://:1",
        "ring://h:1?port=3",
    ):
        with pytest.raises(UserError, match="no ring's URL"):
            RingUrl.read(wrong)

"""Slow links on one machine: the arithmetic of a wire, and a star of namespaces as TCP finds it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from benchmarks.emulated_links.star import Star, missing, star
from benchmarks.emulated_links.wire import Wire

ROUND_TRIP = 40.0  # ms
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 9009), timeout=%s).close()"


def test_a_wire_takes_its_time() -> None:
    wire = Wire(bytes_per_s=1000, delay=0.5, loss=0, random=Random(0))
    assert wire.send(10.0, 100) == 10.6  # 0.1 s onto the wire, 0.5 s along it
    assert wire.send(10.0, 50) == pytest.approx(10.65)  # behind the first
    assert wire.send(11.0, 100) == pytest.approx(11.6)  # the wire was free again
    assert Wire(0, 0.25, 0, Random(0)).send(1.0, 10**9) == 1.25


def test_a_wire_carries_no_more_than_its_rate() -> None:
    # Ten times too much for 10 s: what arrives is the rate's, and the queue's 0.1 s more.
    wire = Wire(bytes_per_s=1e5, delay=0.04, loss=0, random=Random(0))
    arrivals = [wire.send(n / 1000, 1000) for n in range(10_000)]
    through = [due for due in arrivals if due is not None]
    assert through == sorted(through)
    assert len(through) * 1000 / 1e5 == pytest.approx(10.1, abs=0.02)
    assert max(due - n / 1000 for n, due in enumerate(arrivals) if due) <= 0.1 + 0.04 + 0.0101


def test_a_wire_loses_its_share() -> None:
    wire = Wire(0, 0, 0.03, Random(1))
    lost = sum(wire.send(n, 100) is None for n in range(20_000))
    assert lost == pytest.approx(600, abs=5 * (20_000 * 0.03 * 0.97) ** 0.5)
    wire.cut = True
    assert all(wire.send(n, 100) is None for n in range(100))


@pytest.fixture(scope="module", params=["with delay", "rate alone"])
def net(request: pytest.FixtureRequest):
    """Three peers; kernel or forwarder makes the links, as the kernel can."""
    if why := missing():
        pytest.skip(why)
    with star(3, mbit=20, delay_ms=ROUND_TRIP / 2 if request.param == "with delay" else 0) as net:
        yield net


def test_tcp_finds_the_link_that_was_asked_for(net: Star, capsys: pytest.CaptureFixture) -> None:
    before = net.moved(0)
    path, between = net.measure(0, "hub", seconds=0.3), net.measure(0, 1, seconds=0.1)
    with capsys.disabled():
        print(f"\n  {net.mbit:g} Mbit/s, {net.delay_ms:g} ms each way, by {net.made_by}: {path}")
    # Bounds that hold however busy the machine is: nothing is faster than its link.
    assert path.rtt_ms >= 2 * net.delay_ms and between.rtt_ms >= 4 * net.delay_ms
    assert 0 < path.up_mbit < 1.2 * net.mbit and 0 < path.down_mbit < 1.2 * net.mbit
    moved = [after - first for after, first in zip(net.moved(0), before, strict=True)]
    assert all(path.up_mbit * 1e6 / 8 * 0.1 < size < 20e6 / 8 * 30 for size in moved)
    assert net.moved(2)[1] < 10_000  # nobody else's packets come by


def test_a_cut_link_says_nothing(net: Star) -> None:
    probe = Path(__file__).parents[2] / "benchmarks" / "emulated_links" / "probe.py"
    serve = [sys.executable, str(probe), "serve", net.address("hub")]
    server = net.run("hub", serve, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None and server.stdout.readline() == "ready\n"

    def connects(patience: float) -> bool:
        command = [sys.executable, "-c", CONNECT % patience, net.address("hub")]
        return net.run(1, command, stderr=subprocess.DEVNULL).wait() == 0

    assert connects(30)
    net.cut(1)
    assert not connects(0.3)
    net.mend(1)
    assert connects(30)
    server.kill()


def test_a_star_leaves_nothing_behind() -> None:
    if why := missing():
        pytest.skip(why)
    with pytest.raises(RuntimeError, match="over"), star(1, mbit=10, delay_ms=1) as net:
        process = net.run(0, ["sleep", "600"])
        raise RuntimeError("over")
    assert process.poll() is not None
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    names = {line.split()[0] for line in left.stdout.splitlines()}
    assert not names & {net._namespace(place) for place in ("hub", 0)}

"""Peers around a hub, each on a link of its own: 10 Mbit/s, 40 ms each way, a share of loss.

The kernel's own netem makes the links where it is there (or tbf, where only the rate matters), on
veth pairs to a bridge; elsewhere `forwarder.py` does. Which, and what was measured over it, is
printed beside every result: an emulated link is a claim until then.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).resolve().parent
DEVICE = "eth0"
Place = int | Literal["hub"]  # a peer's number, from 0, or the middle of the star


def missing() -> str:
    """What keeps this machine from emulating links; empty if nothing does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("tc"):
        return "`ip` and `tc` (iproute2) are not here"
    probe = f"tw-{os.getpid()}-probe"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "this kernel, or container, gives no network namespaces"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


@dataclass(frozen=True)
class Measured:
    """A path as TCP finds it: least round trip, and what goes through each way."""

    rtt_ms: float
    up_mbit: float
    down_mbit: float

    def __str__(self) -> str:
        rates = f"{self.up_mbit:.1f} Mbit/s up, {self.down_mbit:.1f} down"
        return f"round trip {self.rtt_ms:.1f} ms, TCP {rates}"


@dataclass
class Star:
    """What `star` gives."""

    peers: int
    mbit: float
    delay_ms: float
    loss: float
    made_by: str = ""  # what emulates the links
    throttled: dict[int, float] = field(default_factory=dict)  # peers of other rates, in Mbit/s
    _number: int = field(default_factory=count().__next__)  # of the stars of this process
    _stack: ExitStack = field(default_factory=ExitStack)
    _forwarder: subprocess.Popen | None = None

    def address(self, place: Place) -> str:
        """Its IPv4 address."""
        return f"10.77.0.{_number(place) + 1}"

    def run(self, place: Place, command: Sequence[str], **options: Any) -> subprocess.Popen:
        """Start a process there; ended with the star, if it has not by then."""
        inside = ["ip", "netns", "exec", self._namespace(place), *command]
        return self._started(inside, **options)

    def moved(self, place: Place) -> tuple[int, int]:
        """Bytes sent and received by the place's network device so far, IP headers included."""
        folder = f"/sys/class/net/{DEVICE}/statistics"
        read = ["cat", f"{folder}/tx_bytes", f"{folder}/rx_bytes"]
        done = self.run(place, read, stdout=subprocess.PIPE, text=True).communicate()[0]
        sent, received = map(int, done.split())
        return sent, received

    def cut(self, peer: int) -> None:
        """From now on nothing goes over a peer's link, and neither end is told."""
        self._switch(peer, "cut", "down")

    def mend(self, peer: int) -> None:
        """Undo `cut`."""
        self._switch(peer, "mend", "up")

    def throttle(self, peer: int, mbit: float) -> None:
        """From now on a peer's link carries so much each way."""
        self.throttled[peer] = mbit
        if self._forwarder is not None:
            self._tell(f"rate {peer + 1} {mbit}")
        elif not self._limit(peer, self._qdisc(mbit)):
            raise RuntimeError(f"the kernel does not change the rate of peer {peer}")

    def measure(self, source: Place, sink: Place, seconds: float = 2.0) -> Measured:
        """The path between two places, by a few round trips and then as much as goes through."""
        probe = [sys.executable, str(HERE / "probe.py")]
        address = self.address(sink)
        server = self.run(sink, [*probe, "serve", address], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            server.stdout.readline()
            command = [*probe, "measure", address, str(seconds)]
            client = self.run(source, command, stdout=subprocess.PIPE, text=True)
            return Measured(**json.loads(client.communicate()[0]))
        finally:
            _end(server)

    def measured(self, seconds: float = 2.0) -> str:
        """A line for reports: what was asked for, what makes it, and what TCP finds."""
        asked = f"{self.mbit:g} Mbit/s, {self.delay_ms:g} ms each way, {self.loss:.1%} lost"
        found = str(self.measure(0, "hub", seconds))
        for peer, mbit in self.throttled.items():
            path = self.measure(peer, "hub", seconds)
            found += f"; of peer {peer}, {mbit:g} Mbit/s asked: {path}"
        return f"link of each of {self.peers} peers: {asked}, by {self.made_by}; measured: {found}"

    def _namespace(self, place: Place) -> str:
        return f"tw-{os.getpid()}-{self._number}-{place}"

    def _places(self) -> list[Place]:
        return ["hub", *range(self.peers)]

    def _build(self) -> None:
        _sweep()
        for place in self._places():
            name = self._namespace(place)
            _call("ip", "netns", "add", name)
            self._stack.callback(_call, "ip", "netns", "del", name)
            _call("ip", "-n", name, "link", "set", "lo", "up")
        self._veths()
        qdisc = self._qdisc(self.mbit)
        if all(self._limit(peer, qdisc) for peer in range(self.peers)):
            self.made_by = f"the kernel's {qdisc[0]}"
        else:
            for peer in range(self.peers):
                _call("ip", "-n", self._namespace(peer), "link", "del", DEVICE)
            _call("ip", "-n", self._namespace("hub"), "link", "del", DEVICE)
            self._forward()
            self.made_by = "a forwarder in user space (this kernel has no netem)"
        for place in self._places():
            name = self._namespace(place)
            _call("ip", "-n", name, "address", "add", f"{self.address(place)}/24", "dev", DEVICE)
            _call("ip", "-n", name, "link", "set", DEVICE, "up")

    def _veths(self) -> None:
        """A bridge in the hub's namespace, and a veth pair from each peer's to it."""
        hub = self._namespace("hub")
        _call("ip", "-n", hub, "link", "add", DEVICE, "type", "bridge")
        for peer in range(self.peers):
            far = ("peer", "name", f"peer{peer}", "netns", hub)
            _call("ip", "-n", self._namespace(peer), "link", "add", DEVICE, "type", "veth", *far)
            _call("ip", "-n", hub, "link", "set", f"peer{peer}", "master", DEVICE, "up")
            for name, end in ((self._namespace(peer), DEVICE), (hub, f"peer{peer}")):
                # Packets as a wire would carry them: counted, and lost, one by one.
                _call("ip", "-n", name, "link", "set", end, "gso_max_segs", "1")

    def _qdisc(self, mbit: float) -> list[str]:
        rate = f"{mbit}mbit"
        if not self.delay_ms and not self.loss:
            return ["tbf", "rate", rate, "burst", "32kb", "latency", "100ms"]
        waiting = 2 * self.delay_ms + 100  # milliseconds: netem's queue holds what is under way
        packets = max(100, int(mbit * 1e3 * waiting / 8 / 1500))
        link = ["rate", rate, "delay", f"{self.delay_ms}ms", "loss", f"{100 * self.loss}%"]
        return ["netem", *link, "limit", str(packets)]

    def _limit(self, peer: int, qdisc: list[str]) -> bool:
        ends = ((self._namespace(peer), DEVICE), (self._namespace("hub"), f"peer{peer}"))
        return all(
            not subprocess.run(
                ["tc", "-n", name, "qdisc", "replace", "dev", device, "root", *qdisc],
                capture_output=True,
            ).returncode
            for name, device in ends
        )

    def _forward(self) -> None:
        names = [self._namespace(place) for place in self._places()]
        link = [f"{number}" for number in (self.mbit, self.delay_ms, self.loss)]
        self._forwarder = self._started(
            [sys.executable, str(HERE / "forwarder.py"), DEVICE, *link, *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._forwarder.stdout is not None
        if self._forwarder.stdout.readline() != "ready\n":
            raise RuntimeError("the forwarder did not start")

    def _switch(self, peer: int, word: str, state: str) -> None:
        if self._forwarder is None:
            _call("ip", "-n", self._namespace("hub"), "link", "set", f"peer{peer}", state)
        else:
            self._tell(f"{word} {peer + 1}")

    def _tell(self, line: str) -> None:
        assert self._forwarder is not None and self._forwarder.stdin is not None
        self._forwarder.stdin.write(line + "\n")
        self._forwarder.stdin.flush()

    def _started(self, command: Sequence[str], **options: Any) -> subprocess.Popen:
        process = subprocess.Popen(command, **options)
        self._stack.callback(_end, process)
        return process


@contextmanager
def star(peers: int, mbit: float, delay_ms: float = 0.0, loss: float = 0.0) -> Iterator[Star]:
    """Peers on links to a hub: `mbit` each way, `delay_ms` on each way (a round trip to the hub has
    two of them, one to another peer four), and a share `loss` of packets lost on each way.

    Processes that were started in it and the namespaces are gone after it.
    """
    net = Star(peers, mbit, delay_ms, loss)
    with net._stack:
        net._build()
        yield net


def _number(place: Place) -> int:
    return 0 if place == "hub" else place + 1


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _sweep() -> None:
    """Take away namespaces of processes that are no more."""
    folder = Path("/run/netns")
    for path in folder.glob("tw-*-*") if folder.is_dir() else ():
        if not Path(f"/proc/{path.name.split('-')[1]}").exists():
            _call("ip", "netns", "del", path.name)

"""A star of links in user space: one tun device in each namespace, and this process between them.

    python forwarder.py DEVICE MBIT DELAY_MS LOSS NAMESPACE…      (the first is the hub)

An IP packet that leaves a peer goes over the peer's wire to the hub, and from there over the wire
of the peer whose address it has; the hub's own are without limit. Addresses end in the number of
the namespace, counted from 1. Says "ready", then obeys lines of standard input (`cut 1`, `mend 1`,
`rate 1 MBIT` for the first peer) until that ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import struct
import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to be run as a file

from benchmarks.emulated_links.wire import Wire

TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 1, 0x1000, 0x40000000
LARGEST, BURST, COMMANDS = 65536, 32, 0
HELD = 10 * 1500  # bytes that may always wait before a wire: TCP stands still with less


def open_tun(namespace: str, device: str) -> int:
    """A tun device in a namespace: a file that gives what it sends and takes what it receives."""
    here, there = os.open("/proc/self/ns/net", os.O_RDONLY), None
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        there = os.open(Path("/run/netns") / namespace, os.O_RDONLY)
        if libc.setns(there, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
        return tun
    finally:
        libc.setns(here, CLONE_NEWNET)
        os.close(here)
        if there is not None:
            os.close(there)


def forward(tuns: list[int], up: list[Wire], down: list[Wire]) -> None:
    """Carry packets until standard input ends."""
    sources = {tun: number for number, tun in enumerate(tuns)}
    under_way: list[tuple[float, int, int, bytes, bool]] = []  # due, order, to, packet, at the hub
    order = count()

    def enter(wire: Wire, now: float, to: int, packet: bytes, at_hub: bool) -> None:
        due = wire.send(now, len(packet))
        if due is not None:
            heapq.heappush(under_way, (due, next(order), to, packet, at_hub))

    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        readable, _, _ = select.select([*tuns, COMMANDS], [], [], wait)
        for source in readable:
            if source == COMMANDS:
                if not obey(os.read(COMMANDS, LARGEST).decode(), up, down):
                    return
                continue
            for _ in range(BURST):
                try:
                    packet = os.read(source, LARGEST)
                except BlockingIOError:
                    break
                to = packet[19] - 1  # the last byte of IPv4's destination
                if packet[0] >> 4 == 4 and 0 <= to < len(tuns):
                    enter(up[sources[source]], time.monotonic(), to, packet, True)
        while under_way and under_way[0][0] <= time.monotonic():
            due, _, to, packet, at_hub = heapq.heappop(under_way)
            if at_hub:  # when it was due, so that this process being late adds up nowhere
                enter(down[to], due, to, packet, False)
                continue
            with suppress(BlockingIOError):  # a receiver whose queue is full loses it
                os.write(tuns[to], packet)


def obey(lines: str, up: list[Wire], down: list[Wire]) -> bool:
    """Carry out commands; False at the end of them."""
    for line in lines.splitlines():
        what, number, *mbit = line.split()
        for wire in (up[int(number)], down[int(number)]):
            if what == "rate":
                limit(wire, float(mbit[0]))
            else:
                wire.cut = what == "cut"
    return bool(lines)


def limit(wire: Wire, mbit: float) -> None:
    """Give a wire that rate, and a queue for it."""
    wire.bytes_per_s = mbit * 1e6 / 8
    wire.queue = max(Wire.queue, HELD / wire.bytes_per_s)


def main() -> None:
    """Open the devices, say so, and forward."""
    device, mbit, delay_ms, loss, *namespaces = sys.argv[1:]
    tuns = [open_tun(namespace, device) for namespace in namespaces]
    random = Random(0)

    def wires() -> list[Wire]:
        peers = [Wire(0, float(delay_ms) / 1000, float(loss), random) for _ in namespaces[1:]]
        for wire in peers:
            limit(wire, float(mbit))
        return [Wire(0, 0, 0, random), *peers]

    print("ready", flush=True)
    forward(tuns, wires(), wires())


if __name__ == "__main__":
    main()

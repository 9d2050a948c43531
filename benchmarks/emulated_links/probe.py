"""Measure a TCP path: `probe.py serve ADDRESS`, and from elsewhere `probe.py measure ADDRESS S`.

Prints JSON: the least round trip in milliseconds, Mbit/s up and down over so many seconds.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time

PORT, BLOCK, ROUND_TRIPS = 9009, 1 << 16, 5


def serve(address: str) -> None:
    """Answer each connection by what its first byte asks."""
    with socket.create_server((address, PORT)) as listening:
        print("ready", flush=True)
        while True:
            threading.Thread(target=_answer, args=(listening.accept()[0],), daemon=True).start()


def measure(address: str, seconds: float) -> dict[str, float]:
    """The path to a server."""
    with _asking(address, b"e") as sock:
        trips = []
        for _ in range(ROUND_TRIPS):
            started = time.perf_counter()
            sock.sendall(b"x")
            sock.recv(1)
            trips.append(time.perf_counter() - started)
    with _asking(address, b"d") as sock:
        sock.sendall(f"{seconds:8.3f}".encode())
        down = _rate(sock)
    with _asking(address, b"u") as sock:
        _fill(sock, seconds)
        sock.shutdown(socket.SHUT_WR)
        up = float(sock.makefile().readline())
    return {"rtt_ms": 1000 * min(trips), "up_mbit": up, "down_mbit": down}


def _asking(address: str, what: bytes) -> socket.socket:
    sock = socket.create_connection((address, PORT), timeout=60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(what)
    return sock


def _answer(sock: socket.socket) -> None:
    with sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        what = sock.recv(1)
        if what == b"e":
            while data := sock.recv(1):
                sock.sendall(data)
        elif what == b"d":
            _fill(sock, float(sock.recv(8, socket.MSG_WAITALL)))
        elif what == b"u":
            sock.sendall(f"{_rate(sock)}\n".encode())


def _fill(sock: socket.socket, seconds: float) -> None:
    until, block = time.monotonic() + seconds, bytes(BLOCK)
    while time.monotonic() < until:
        sock.sendall(block)


def _rate(sock: socket.socket) -> float:
    """Mbit/s of what comes in until it ends, from its first byte on."""
    total, started = len(sock.recv(BLOCK)), time.perf_counter()
    while data := sock.recv(BLOCK):
        total += len(data)
    return total * 8 / 1e6 / (time.perf_counter() - started)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        print(json.dumps(measure(sys.argv[2], float(sys.argv[3]))))

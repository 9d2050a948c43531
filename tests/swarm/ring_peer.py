"""A peer of a ring as a process of its own, that does what it is told on standard input.

    python -m tests.swarm.ring_peer URL PEER DIRECTORY [BYTES_PER_SECOND]

A line in is JSON, [method, arguments…] of the transport, bytes as hex; a line out is its answer.
The last argument slows down what the peer sends of an object, so that a test can step in between.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from trainwright.swarm.transports import ring_pull
from trainwright.swarm.transports.ring import open_ring
from trainwright.swarm.transports.ring_frames import Link
from trainwright.swarm.transports.transport import TransportError

REPOSITORY = Path(__file__).parents[2]
PACKET = 1400  # bytes, as they come over a slow link


class RingPeer:
    """The process, as a test sees it; `start` is Popen, or what starts it somewhere else."""

    def __init__(
        self, url: str, me: str, directory: Path, rate: float = 0, start=subprocess.Popen
    ) -> None:
        command = [
            sys.executable,
            "-m",
            "tests.swarm.ring_peer",
            url,
            me,
            str(directory),
            str(rate),
        ]
        pipe = subprocess.PIPE
        self.me = me
        self.process = start(command, stdin=pipe, stdout=pipe, text=True, cwd=REPOSITORY, bufsize=1)
        self.answer()

    def tell(self, method: str, *arguments: object) -> None:
        print(json.dumps([method, *arguments]), file=self.process.stdin, flush=True)

    def answer(self):
        line = self.process.stdout.readline()
        assert line, "the process is gone"
        return json.loads(line)

    def ask(self, method: str, *arguments: object):
        self.tell(method, *arguments)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


def slow_down(rate: float) -> None:
    """Objects leave this process with so many bytes/s."""

    class Slow(Link):
        def write(self, data: bytes) -> None:
            for start in range(0, len(data), PACKET):
                time.sleep(PACKET / rate if len(data) > PACKET else 0)
                super().write(data[start : start + PACKET])

    answer = ring_pull.Pulls.answer

    def slowly(self, link, header, body):
        link.__class__ = Slow
        answer(self, link, header, body)
        link.__class__ = Link

    ring_pull.Pulls.answer = slowly


def main(arguments: Sequence[str]) -> None:
    url, me, directory, rate = arguments
    if float(rate):
        slow_down(float(rate))
    ring = open_ring(url, me, Path(directory))
    print("true", flush=True)
    for line in sys.stdin:
        method, *given = json.loads(line)
        try:
            match method:
                case "put":
                    answer = ring.put(given[0], bytes.fromhex(given[1]))
                case "get":
                    found = ring.get(*given)
                    answer = None if found is None else found.hex()
                case "keys":
                    answer = [listed.key for listed in ring.keys(*given)]
                case "ring":
                    answer = ring._gossip.ring()
                case "measured":  # links to each peer, as far as it is known here
                    abouts = [ring._library.about(peer) for peer in ring.peers()]
                    answer = [len(about.get("rates", ())) for about in abouts]
                case "settle":
                    answer = ring.settle(given[0], given[1].encode(), tuple(given[2])).decode()
                case _:
                    answer = getattr(ring, method)(*given)
        except TransportError as error:
            answer = {"problem": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Several toy peers as processes of one run: started, killed, stopped, looked at."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.emulated_links.star import Star
from trainwright.swarm.events import Rules
from trainwright.swarm.identity import Identity
from trainwright.swarm.layout import Layout

from .toy_peer import LAYOUT, RULES, begin_run, open_run, settings

ROOT = Path(__file__).parents[2]


class ToySwarm:
    """Peers 0, 1, … of one run, each with a directory. Peer 0 starts it.

    They meet in a folder, or, each at its place of a `net`, at `url`.
    """

    def __init__(
        self,
        root: Path,
        method: str = "diloco",
        rules: Rules = RULES,
        layout: Layout = LAYOUT,
        net: Star | None = None,
        url: str = "",
    ) -> None:
        self.root, self.run, self.net = root, root / "run", net
        self.url = url or str(self.run)
        self.processes: dict[int, subprocess.Popen[str]] = {}
        if net is None:
            identity = Identity.kept_at(self.directory(0) / "key.pem")
            begin_run(open_run(self.run, identity.peer), identity, settings(method), rules, layout)
        begin = {"method": method, "rules": asdict(rules), "shapes": layout.shapes}
        self.begin = json.dumps(begin)

    def directory(self, peer: int) -> Path:
        """A peer's own."""
        return self.root / f"peer{peer}"

    def id(self, peer: int) -> str:
        """A peer's id."""
        return Identity.kept_at(self.directory(peer) / "key.pem").peer

    def launch(self, peer: int, rounds: int, *options: str) -> None:
        """Start a peer, or start it again."""
        command = [sys.executable, "-m", "tests.swarm.toy_peer", f"--run={self.url}"]
        command += [f"--directory={self.directory(peer)}", f"--rounds={rounds}", f"--seed={peer}"]
        if self.net and not peer:
            command.append(f"--begin={self.begin}")
        start = partial(self.net.run, peer) if self.net else subprocess.Popen
        with (self.root / f"peer{peer}.log").open("a") as log:
            self.processes[peer] = start(
                [*command, *options],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                text=True,
            )

    def signal(self, peer: int, number: signal.Signals) -> None:
        """Send a peer's process a signal."""
        self.processes[peer].send_signal(number)

    def ended(self, peer: int, within: float = 60.0) -> int:
        """Wait for a peer's process: its exit code."""
        try:
            return self.processes[peer].wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"peer {peer} goes on:\n{self.log(peer)}") from None

    def log(self, peer: int) -> str:
        """What a peer printed."""
        return (self.root / f"peer{peer}.log").read_text()

    def events(self, peer: int, event: str = "round") -> list[dict[str, Any]]:
        """What a peer wrote down of that kind."""
        path = self.directory(peer) / "swarm.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}\n")]
        return [line for line in found if line["event"] == event]

    def round(self, peer: int) -> int:
        """The round that a peer works on, as far as it has written it down."""
        return max((line["round"] + 1 for line in self.events(peer)), default=0)

    def until(self, condition: Callable[[], bool], most: float = 60.0) -> None:
        """Wait for something that the peers do."""
        end = time.monotonic() + most
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join(f"peer {peer}:\n{self.log(peer)}" for peer in self.processes)
                raise AssertionError(f"not after {most} s\n{logs}")
            time.sleep(0.02)

    def waits(self, peer: int) -> dict[int, float]:
        """Seconds that a peer waited for each round's outcome, of those that one came after."""
        lines = itertools.pairwise(self.events(peer))  # a line is written before its wait is over
        return {line["round"]: after["waited"] - line["waited"] for line, after in lines}

    def histories(self) -> dict[int, dict[str, set[int]]]:
        """By round: the hashes of what was agreed, and which peers found it."""
        found: dict[int, dict[str, set[int]]] = {}
        for peer in self.processes:
            for line in self.events(peer):
                found.setdefault(line["round"], {}).setdefault(line["base"], set()).add(peer)
        return found

    def agreed(self) -> int:
        """Rounds that all peers agree on; raises AssertionError where they do not."""
        histories = self.histories()
        for round, bases in histories.items():
            assert len(bases) == 1, f"round {round}: {bases}"
        return len(histories)

    def contributed(self, peer: int) -> list[int]:
        """Rounds that a peer's contribution is part of, as all others say."""
        mine = self.id(peer)
        lines = [line for other in self.processes for line in self.events(other)]
        return sorted({line["round"] for line in lines if mine in line["peers"]})

    def close(self) -> None:
        """Kill what is left."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()

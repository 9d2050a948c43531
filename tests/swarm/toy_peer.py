"""A peer that trains a tiny least-squares model, for tests of everything around the training.

`Toy` runs one in this process; as a program (`python -m tests.swarm.toy_peer …`) it is a peer of
its own that can be killed, stopped and started again. `--die` kills it at a certain line; `--begin`
has it start the run, where only it can reach the place.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trainwright.recipe.swarm import Swarm, Trust
from trainwright.swarm import peer_memory
from trainwright.swarm.aggregation import combine
from trainwright.swarm.events import Rules
from trainwright.swarm.identity import Identity
from trainwright.swarm.layout import Layout, take
from trainwright.swarm.manifest import Manifest
from trainwright.swarm.methods.build import build_method
from trainwright.swarm.methods.method import Agreed
from trainwright.swarm.peer import Peer
from trainwright.swarm.runs import find_run, genesis_hash, start_run
from trainwright.swarm.settings import Settings
from trainwright.swarm.transports.folder import Folder
from trainwright.swarm.transports.open import open_transport
from trainwright.swarm.transports.store import Store
from trainwright.swarm.transports.transport import Transport, TransportError

LAYOUT = Layout((("a", (8, 8)), ("b", (24,))))
RULES = Rules(quorum=2, grace=0.5, deadline=6.0, silence=1.5)
TRUST = Trust(scores=False)
RATE = 0.05


def settings(method: str = "diloco", **changes: object) -> Settings:
    """A method's, small."""
    values: dict[str, object] = {
        "method": method,
        "inner_steps": 4,
        "codec": "fp32",
        "density": 0.25,
        "outer_learning_rate": 0.7,
        "outer_momentum": 0.9 if method == "diloco" else 0.0,
        "feedback_decay": 0.9 if method == "sparseloco" else 0.0,
        "fragments": 2,
        "delay": 0,
        "mixing": 0.5,
        "average": "plain",
        "weight_decay": 0.0,
    }
    return Settings(**(values | changes))  # type: ignore[arg-type]


def open_run(root: Path, peer: str) -> Store:
    """The shelves in a folder."""
    root.mkdir(parents=True, exist_ok=True)
    return Store(Folder(root), peer)


def begin_run(
    transport: Transport,
    identity: Identity,
    chosen: Settings,
    rules: Rules = RULES,
    layout: Layout = LAYOUT,
) -> Manifest:
    """Start a run of the toy model."""
    genesis = Agreed(0, torch.zeros(layout.count))
    hashed = genesis_hash(genesis, identity.peer)
    manifest = Manifest(identity.peer, {}, layout.shapes, chosen, rules, hashed)
    start_run(transport, identity, manifest, genesis)
    return manifest


def gradient_of(weights: Tensor, target: Tensor, step: int) -> Tensor:
    """Of the squared distance to the target, another one at every step as with real batches."""
    return weights - target - 0.01 * torch.sin(torch.arange(len(target)) + step)


class Toy:
    """A trainer as the real one is, of weights that it draws towards data of its own."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        directory: Path,
        *,
        seed: int = 0,
        step_seconds: float = 0.01,
        every: int = 3,
        name: str = "",
        say: Callable[[str], None] = lambda line: None,
        trust: Trust = TRUST,
    ) -> None:
        manifest = find_run(transport)
        assert manifest is not None
        chosen = manifest.settings
        self.method = build_method(chosen, manifest.layout, partial(combine, average="plain"))
        self.peer = Peer(
            transport,
            identity,
            manifest,
            self.method,
            Swarm(snapshot_every=every, trust=trust),
            directory,
            rate=lambda round: RATE,
            most_tokens=1000,
            say=say,
            name=name,
        )
        generator = torch.Generator().manual_seed(seed)
        count = manifest.layout.count
        self.target = torch.ones(count) + 0.1 * torch.randn(count, generator=generator)
        self.step_seconds = step_seconds
        self.total = self.steps = self.unsent = 0
        self.sent: Tensor | None = None
        self.rounds: list[tuple[int, bool]] = []
        self.weights = torch.zeros(count)

    def start(self) -> None:
        """Catch up, and take up what is agreed."""
        agreed = self.peer.start()
        assert agreed is not None
        self.weights = agreed.weights.clone()

    def step(self) -> None:
        """One step, and whatever the peer wants after it, be it to wait."""
        self.train()
        while (what := self.peer.wanted(self.steps)) != "go on":
            if what == "contribute":
                self._offer()
            else:
                self._merge()

    def train(self) -> None:
        """One step, and a contribution if it is time for one."""
        time.sleep(self.step_seconds)
        self.gradient = gradient_of(self.weights, self.target, self.total)
        if self.method.takes == "weights":
            self.weights = self.weights - RATE * self.gradient
        self.total += 1
        self.steps, self.unsent = self.steps + 1, self.unsent + 1
        if self.peer.wanted(self.steps) == "contribute":
            self._offer()

    def until(self, round: int, most: float = 60.0) -> None:
        """Train until that many rounds are over."""
        end = time.monotonic() + most
        while self.peer.round < round:
            assert time.monotonic() < end, f"still at round {self.peer.round} after {most} s"
            self.step()

    def close(self, leave: bool = True) -> None:
        """End the peer."""
        if leave:
            self.peer.leave()
        self.peer.close()

    def _offer(self) -> None:
        whole = self.weights if self.method.takes == "weights" else self.gradient
        local = take(whole, self.method.fragment(self.peer.round))
        loss = float(self.gradient.square().mean())
        if self.peer.offer(local, tokens=self.unsent, steps=self.unsent, loss=loss):
            self.steps, self.sent = 0, local

    def _merge(self) -> None:
        outcome = self.peer.outcome()
        assert outcome is not None
        self.weights = outcome.merged(self.method, self.weights, self.sent)
        self.sent = None
        if outcome.included or outcome.replaced:
            self.unsent = self.steps
        self.rounds.append((outcome.round, outcome.included))


# As a program


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in_write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f".{path.name}.half.tmp").write_bytes(content[: len(content) // 2])  # type: ignore[arg-type]
    _die()


def plant(toy: Toy, transport: Transport, fault: str) -> None:
    """Have the process kill itself: "before-sending:3" as a contribution to round 3, or the first
    one later, is put,
    "sending", half-way through that, "after-sending", "advancing", "saving", "deciding".
    """
    what, _, number = fault.partition(":")
    round, put, settle = int(number), transport.put, transport.settle
    advance, write = toy.method.advance, peer_memory.write_atomically

    def put_and_die(key: str, data: bytes) -> None:
        mine = key.endswith("/contribution") and int(key.split("/")[1]) >= round
        if mine:
            if what == "before-sending":
                _die()
            if what == "sending":
                os.fsync = lambda fd: _die()
        put(key, data)
        if what == "after-sending" and mine:
            _die()

    def advance_and_die(agreed: Agreed, *rest: object) -> Agreed:
        if agreed.round >= round:
            _die()
        return advance(agreed, *rest)  # type: ignore[arg-type]

    def write_and_die(path: Path, content: bytes | str) -> None:
        late = toy.peer.round >= round
        (_die_in_write if late and path.name == "state" else write)(path, content)

    def settle_and_die(register: str, data: bytes, electorate: tuple[str, ...]) -> bytes:
        found = settle(register, data, electorate)
        if register.startswith("rounds/") and float(register.split("/")[1]) >= round:
            _die()
        return found

    if what.endswith("sending"):
        transport.put = put_and_die  # type: ignore[method-assign]
    elif what == "advancing":
        toy.method.advance = advance_and_die  # type: ignore[method-assign, assignment]
    elif what == "saving":
        peer_memory.write_atomically = write_and_die
    elif what == "deciding":
        transport.settle = settle_and_die  # type: ignore[method-assign]
    else:
        raise ValueError(fault)


def wait_for_run(transport: Transport) -> None:
    """Until somebody has started it."""
    while True:
        with suppress(TransportError):
            if find_run(transport) is not None:
                return
        time.sleep(0.1)


def main() -> None:
    """A peer until that round, or until it is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", required=True, help="a transport's URL")
    parser.add_argument("--begin", type=json.loads, help="a run: method, rules, shapes")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step-seconds", type=float, default=0.02)
    parser.add_argument("--clock", type=float, default=0.0, help="seconds that time.time is off")
    parser.add_argument("--die", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.clock:
        real = time.time
        time.time = lambda: real() + options.clock
    identity = Identity.kept_at(options.directory / "key.pem")
    transport = open_transport(options.run, identity, options.directory)
    if options.begin:
        chosen, rules = settings(options.begin["method"]), Rules(**options.begin["rules"])
        shapes = ((name, tuple(shape)) for name, shape in options.begin["shapes"])
        begin_run(transport, identity, chosen, rules, Layout(tuple(shapes)))
    wait_for_run(transport)
    toy = Toy(
        transport,
        identity,
        options.directory,
        seed=options.seed,
        step_seconds=options.step_seconds,
        say=partial(print, file=sys.stderr, flush=True),
    )
    if options.die:
        plant(toy, transport, options.die)
    toy.start()
    print(f"ready at round {toy.peer.round}", flush=True)
    toy.until(options.rounds, most=600.0)
    toy.close()


if __name__ == "__main__":
    main()

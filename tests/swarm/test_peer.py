"""Peers in threads, mostly over a folder: what they agree on, and how they find back to it."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trainwright.comm.codecs.codec import Planes
from trainwright.errors import UserError
from trainwright.recipe.swarm import Trust
from trainwright.swarm.aggregation import clip_to_median, combine
from trainwright.swarm.events import Rules
from trainwright.swarm.identity import Identity
from trainwright.swarm.message import write_message
from trainwright.swarm.methods.build import build_method
from trainwright.swarm.methods.method import Own
from trainwright.swarm.peer_duties import Duties
from trainwright.swarm.rehearsal import Rehearsal
from trainwright.swarm.settings import Settings
from trainwright.swarm.transports.bucket import open_bucket
from trainwright.swarm.transports.ring import open_ring
from trainwright.swarm.transports.store import Store
from trainwright.swarm.transports.transport import Transport

from .toy_peer import LAYOUT, RATE, Toy, begin_run, gradient_of, open_run, settings

# Nobody is told to hurry before all have offered: every round has the same steps of everybody.
PATIENT = Rules(quorum=3, grace=20.0, deadline=40.0, silence=20.0)
BRISK = Rules(quorum=2, grace=0.2, deadline=5.0, silence=1.0)


class Meeting:
    """A run, and toys that take part in it; at a folder unless said otherwise."""

    def __init__(self, root: Path) -> None:
        self.root, self.toys = root, list[Toy]()
        self.said: list[str] = []
        self.transports: dict[int, Transport] = {}
        self.open: Callable[[Identity, Path], Transport] = lambda identity, directory: open_run(
            root / "run", identity.peer
        )

    def begin(self, method: str = "diloco", rules: Rules = BRISK, **changes: object) -> Settings:
        chosen = settings(method, **changes)
        begin_run(self.transport(0), self.identity(0), chosen, rules)
        return chosen

    def identity(self, number: int) -> Identity:
        return Identity.from_seed(bytes([number]) * 32)

    def transport(self, number: int) -> Transport:
        if number not in self.transports:
            directory = self.root / f"peer{number}"
            self.transports[number] = self.open(self.identity(number), directory)
        return self.transports[number]

    def toy(self, number: int, **options: object) -> Toy:
        options = {"seed": number, "step_seconds": 0.002, "say": self.said.append} | options
        directory, transport = self.root / f"peer{number}", self.transport(number)
        toy = Toy(transport, self.identity(number), directory, **options)  # type: ignore[arg-type]
        self.toys.append(toy)
        return toy

    def history(self, number: int) -> dict[int, tuple[str, list[str]]]:
        """By round: hash and contributors, as a peer wrote them down."""
        lines = (self.root / f"peer{number}" / "swarm.jsonl").read_text().splitlines()
        rounds = [line for line in map(json.loads, lines) if line["event"] == "round"]
        return {line["round"]: (line["base"], line["peers"]) for line in rounds}

    def shelf(self, number: int) -> Path:
        return self.root / "run" / "peers" / self.identity(number).peer


@pytest.fixture
def meeting(tmp_path: Path) -> Iterator[Meeting]:
    found = Meeting(tmp_path)
    yield found
    for toy in found.toys:
        toy.close(leave=False)
    for transport in found.transports.values():
        transport.close()


def together(toys: Sequence[Toy], *work: Callable[[Toy], object]) -> None:
    """Each toy does all this on a thread of its own; raises what any of them raised."""
    faults: list[BaseException] = []

    def run(toy: Toy) -> None:
        try:
            for each in work:
                each(toy)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=run, args=(toy,)) for toy in toys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


def until(round: int) -> Callable[[Toy], None]:
    return lambda toy: toy.until(round, most=30.0)


class Alone:
    """A toy's training as `rehearsal` wants it."""

    def __init__(self, toy: Toy) -> None:
        self.target, self.values = toy.target, torch.zeros(LAYOUT.count)

    def load(self, weights: torch.Tensor) -> None:
        self.values = weights.clone()

    def weights(self) -> torch.Tensor:
        return self.values.clone()

    def train(self, step: int) -> int:
        self.values = self.values - RATE * gradient_of(self.values, self.target, step)
        return 1

    def gradient(self, step: int) -> tuple[torch.Tensor, int]:
        return gradient_of(self.values, self.target, step), 1


def rehearsed(chosen: Settings, toys: Sequence[Toy], steps: int) -> dict[str, torch.Tensor]:
    """What the same peers come to without any of what is tested here."""
    method = build_method(chosen, LAYOUT, lambda received: combine(received))
    trainees = {toy.peer.me: Alone(toy) for toy in toys}
    genesis = torch.zeros(LAYOUT.count)
    rehearsal = Rehearsal(method, trainees, genesis, rate=lambda step: RATE)
    if method.agrees:
        rehearsal.judge = lambda round, received: clip_to_median(received)
    rehearsal.run(steps)
    return {peer: trainee.values for peer, trainee in trainees.items()}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("diloco", {}),
        ("diloco", {"delay": 2}),
        ("streaming", {"delay": 1}),
        ("sparseloco", {"codec": "top-k"}),
        ("noloco", {}),
        ("distro", {"codec": "bf16", "delay": 1}),
    ],
)
def test_peers_come_to_what_the_method_alone_comes_to(
    meeting: Meeting, method: str, changes: dict[str, object]
) -> None:
    chosen = meeting.begin(method, PATIENT, **changes)
    toys = [meeting.toy(number) for number in range(3)]
    together(toys, Toy.start)
    rounds = 4
    together(toys, until(rounds))
    steps = rounds * toys[0].method.inner_steps + int(chosen.delay)
    expected = rehearsed(chosen, toys, steps)
    for toy in toys:
        assert toy.rounds == [(round, True) for round in range(rounds)]
        assert torch.equal(toy.weights, expected[toy.peer.me])


@pytest.mark.prove
@pytest.mark.parametrize("place", ["folder", "bucket", "ring"])
@pytest.mark.parametrize("method", ["diloco", "sparseloco"])
def test_run_is_the_same_wherever_peers_meet(
    meeting: Meeting, request: pytest.FixtureRequest, method: str, place: str
) -> None:
    if place == "bucket":
        url = request.getfixturevalue("bucket").replace("/run?", f"/{method}?")
        meeting.open = lambda identity, _: Store(open_bucket(url), identity.peer)
    elif place == "ring":
        with socket.create_server(("127.0.0.1", 0)) as free:
            url = f"ring://127.0.0.1:{free.getsockname()[1]}"
        meeting.open = lambda identity, directory: open_ring(url, identity.peer, directory)
    codec = "top-k" if method == "sparseloco" else "int8"
    chosen, trust = meeting.begin(method, PATIENT, codec=codec), Trust(conduct=False, scores=False)
    toys = [meeting.toy(number, trust=trust) for number in range(3)]
    together(toys, Toy.start, until(8))
    expected = rehearsed(chosen, toys, 8 * toys[0].method.inner_steps)
    for toy in toys:
        assert toy.rounds == [(round, True) for round in range(8)]
        assert torch.equal(toy.weights, expected[toy.peer.me])


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of a run in a bucket of moto's S3 server."""
    moto, boto3 = pytest.importorskip("moto.server"), pytest.importorskip("boto3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        client.create_bucket(Bucket="swarm")
        yield f"s3://swarm/run?endpoint={endpoint}&region=us-east-1"
        server.stop()


def test_interrupted_run_is_the_same_run(meeting: Meeting) -> None:
    chosen = meeting.begin("sparseloco", PATIENT, codec="top-k")
    for stop in (2, 4):
        toys = [meeting.toy(number) for number in range(3)]
        together(toys, Toy.start)
        for toy in toys:
            toy.total = toy.peer.round * toy.method.inner_steps
        together(toys, until(stop))
        for toy in toys:
            toy.peer.close()
        meeting.toys.clear()
    expected = rehearsed(chosen, toys, 4 * toys[0].method.inner_steps)
    for toy in toys:
        assert torch.equal(toy.weights, expected[toy.peer.me])


class Training:
    """Toys that train on threads of their own until they are told to stop."""

    def __init__(self, *toys: Toy) -> None:
        self.toys = toys
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=together, args=(toys, self._train))
        self.thread.start()

    def _train(self, toy: Toy) -> None:
        with suppress(Stopped):
            while not self.stopping.is_set():
                toy.step()

    def until(self, condition: Callable[[], bool], most: float = 20.0) -> None:
        end = time.monotonic() + most
        while not condition():
            assert time.monotonic() < end, [toy.peer.status for toy in self.toys]
            assert self.thread.is_alive(), "a toy's training has failed"
            time.sleep(0.005)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *what: object) -> None:
        self.stopping.set()
        for toy in self.toys:  # whoever waits for an outcome waits no more
            toy.peer._desk.fail(Stopped())
        self.thread.join()


class Stopped(Exception):  # noqa: N818
    """The test is over."""


def agree(meeting: Meeting, *numbers: int) -> int:
    """The rounds that all these peers wrote down; all of them with the same hash."""
    histories = [meeting.history(number) for number in numbers]
    common = set.intersection(*map(set, histories))
    for round in common:
        assert len({history[round][0] for history in histories}) == 1, f"round {round}"
    return len(common)


def test_one_that_joins_is_in_within_two_rounds_and_nobody_waits_for_it(meeting: Meeting) -> None:
    meeting.begin()
    first = [meeting.toy(number, every=2) for number in range(2)]
    together(first, Toy.start)
    with Training(*first) as training:
        training.until(lambda: first[0].peer.round >= 5)
        joiner = meeting.toy(2)
        waited = [(toy.peer.round, toy.peer.status.waited) for toy in first]
        joiner.start()  # and says nothing for some rounds, as one whose first step takes long
        began = joiner.peer.round
        training.until(lambda: min(toy.peer.round for toy in first) >= began + 2)
        for toy, (round, before) in zip(first, waited, strict=True):
            rounds = toy.peer.round - round
            assert toy.peer.status.waited - before < 2.5 * BRISK.grace * rounds
        with Training(joiner) as own:
            ready = joiner.peer.status.round
            own.until(lambda: any(included for _, included in joiner.rounds))
    taken_in = min(round for round, included in joiner.rounds if included)
    assert taken_in <= ready + 2
    assert agree(meeting, 0, 1, 2) > 0
    assert min(meeting.history(2)) >= 2  # it began with a snapshot, not with the first round


def test_peer_with_other_weights_heals_from_the_others(meeting: Meeting) -> None:
    meeting.begin()
    toys = [meeting.toy(number) for number in range(3)]
    together(toys, Toy.start)
    with Training(*toys) as training:
        training.until(lambda: toys[2].peer.round >= 3)
        duties = toys[2].peer._driver.duties
        toys[2].peer._driver.errands.call(lambda: _damage(duties))
        training.until(lambda: any("other weights" in line for line in meeting.said))
        healed = toys[2].peer.status.round
        training.until(lambda: min(toy.peer.round for toy in toys) >= healed + 3)
    last = max(set.intersection(*(set(meeting.history(number)) for number in range(3))))
    assert len({meeting.history(number)[last][0] for number in range(3)}) == 1
    assert len({meeting.history(number)[last][0] for number in range(2)}) == 1


def _damage(duties: Duties) -> None:
    agreed = duties.state.agreed.copy()
    agreed.weights[7] += 1e-6
    base = duties.terms.hash(agreed, duties.state.ledger)
    duties.state = replace(duties.state, agreed=agreed, base=base)


def test_what_was_published_before_a_crash_is_what_counts(meeting: Meeting) -> None:
    meeting.begin("sparseloco", codec="top-k")
    lonely = meeting.toy(0)
    lonely.start()
    while lonely.sent is None:
        lonely.train()
    contribution = meeting.shelf(0) / "rounds" / "0" / "contribution"
    wait_for(contribution.exists)
    published, own = contribution.read_bytes(), lonely.peer._driver.memory.offered(0)
    assert own is not None and own.after is not None
    lonely.peer.close()
    meeting.toys.clear()
    toys = [meeting.toy(0), meeting.toy(1)]
    together(toys, Toy.start, until(1))
    assert contribution.read_bytes() == published
    assert meeting.identity(0).peer in meeting.history(1)[0][1]
    state = toys[0].peer._driver.duties.state
    assert torch.equal(state.own.vectors["unsent"], own.after.vectors["unsent"])


def wait_for(condition: Callable[[], bool], most: float = 20.0) -> None:
    end = time.monotonic() + most
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_is_no_decision_is_passed_over_by_all(meeting: Meeting) -> None:
    meeting.begin()
    toys = [meeting.toy(number) for number in range(2)]
    stranger, run = Identity.from_seed(b"s" * 32), toys[0].peer._driver.shelves.run
    lonely = [[stranger.peer, "0" * 64]]
    signed = [
        b"no message at all",
        write_message("decision", run, 1, {"entries": lonely, "reports": []}, [], stranger),
        write_message("decision", run, 2, {"entries": [], "reports": []}, [], stranger),
    ]
    transport = open_run(meeting.root / "run", stranger.peer)
    for attempt, data in enumerate(signed):
        transport.settle("rounds/1" if attempt == 0 else f"rounds/1.{attempt}", data, ())
    together(toys, Toy.start, until(4))
    assert agree(meeting, 0, 1) == 4
    assert len(meeting.history(0)[1][1]) == 2
    assert transport.settled("rounds/1.3", 10_000) is not None


def test_others_put_up_copies_of_what_is_gone(meeting: Meeting) -> None:
    meeting.begin()
    first = [meeting.toy(number, every=100) for number in range(2)]
    together(first, Toy.start)
    with Training(*first) as training:
        training.until(lambda: first[0].peer.round >= 4)
        shutil.rmtree(meeting.shelf(1) / "rounds" / "1")
        joiner = meeting.toy(2, every=100)
        joiner.start()
    assert 0 in meeting.history(2)  # all from the first round on
    assert agree(meeting, 0, 1, 2) >= 4
    assert list((meeting.shelf(0) / "copies" / "1").iterdir())


def test_store_that_is_away_costs_no_round(meeting: Meeting) -> None:
    meeting.begin()
    toys = [meeting.toy(number) for number in range(2)]
    together(toys, Toy.start)
    run = meeting.root / "run"
    with Training(*toys) as training:
        training.until(lambda: toys[0].peer.round >= 2)
        run.rename(meeting.root / "away")
        training.until(lambda: sum("cannot be reached" in line for line in meeting.said) >= 2)
        (meeting.root / "away").rename(run)
        before = toys[0].peer.round
        training.until(lambda: min(toy.peer.round for toy in toys) >= before + 3)
    why = [line for line in meeting.said if "cannot be reached" in line]
    assert all(str(run) in line for line in why), why
    assert agree(meeting, 0, 1) >= before + 2
    assert all(peers for _, peers in meeting.history(0).values())


def test_who_sends_nonsense_is_named_and_excluded(meeting: Meeting) -> None:
    meeting.begin()
    toys = [meeting.toy(number) for number in range(3)]
    outgoing = toys[2].method.outgoing

    def nonsense(*given: object) -> tuple[Planes, Own]:
        planes, own = outgoing(*given)  # type: ignore[arg-type]
        return [np.full_like(plane, 255) for plane in planes], own  # NaN in fp32

    toys[2].method.outgoing = nonsense  # type: ignore[method-assign, assignment]
    together(toys, Toy.start)
    liar = meeting.identity(2).peer
    with Training(*toys) as training:
        training.until(lambda: all(liar in toy.peer.status.excluded for toy in toys))
    assert any(liar[:6] in line and "refused" in line for line in meeting.said)
    assert any(liar[:6] in line and "is excluded" in line for line in meeting.said)
    assert agree(meeting, 0, 1, 2) > 3
    assert all(torch.isfinite(toy.weights).all() for toy in toys[:2])


def test_directory_belongs_to_one_process(meeting: Meeting) -> None:
    meeting.begin()
    meeting.toy(0)
    with pytest.raises(UserError, match="another process is this peer"):
        meeting.toy(0)

"""What one liar among four peers does to a run, and how soon it is named.

Real models on Python's standard library (`swarm_runs`): SparseLoCo, three honest peers
with their shares of every batch, and a fourth that sends what it should not, from the first round
on. A run of the honest three alone is what each is held against. What is no contribution is refused
by the peers' own checks; the rest goes through the ledger (`swarm.ledger`), with everybody's
reports, of which the liar's are lies too.

    OMP_NUM_THREADS=1 python benchmarks/swarm_liars.py
    OMP_NUM_THREADS=1 python benchmarks/swarm_liars.py --model 4m --rounds 40 --only flipped copied
    OMP_NUM_THREADS=1 python benchmarks/swarm_liars.py --honest 200      # nobody may be barred

The target: a loss within 2 % of the honest three's, and the liar named within three rounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to be run as a file, too

from benchmarks.swarm_runs import SEQUENCE, TEST_ROWS, TUNING_ROWS, ModelPeer, Run
from trainwright.comm.codecs.codec import Planes
from trainwright.recipe.swarm import Trust
from trainwright.swarm.aggregation import clip_to_median
from trainwright.swarm.agreed_hash import agreed_hash
from trainwright.swarm.checks import (
    Refused,
    check_contribution,
    contribution_body,
    largest_norm,
)
from trainwright.swarm.identity import Identity
from trainwright.swarm.layout import take
from trainwright.swarm.ledger import Ledger, judge
from trainwright.swarm.message import read_message, write_message
from trainwright.swarm.methods.build import build_method
from trainwright.swarm.methods.method import Agreed, Method, Received
from trainwright.swarm.rehearsal import Rehearsal
from trainwright.swarm.scores import Evaluate, Report, Score, try_contributions, write_report
from trainwright.swarm.settings import DEFAULTS

RUN = "0" * 32
ROWS, INNER_STEPS = 4, 10
WITHIN = 0.02  # of the honest peers' loss
SCORED_STEPS = 4  # whose batches a contribution is tried on


@dataclass
class Scene:
    """What a liar sees of a round: what it should send, what the others sent, and all before."""

    mine: Tensor
    others: Sequence[Received]
    past: Sequence[Sequence[Received]]
    draws: torch.Generator

    def noise(self, length: float) -> Tensor:
        """Of that norm, in every direction alike."""
        values = torch.randn(len(self.mine), generator=self.draws)
        return values.mul_(length / values.norm())


def stale(scene: Scene) -> Tensor:
    """Its own of three rounds ago, later on again and again the same."""
    return scene.past[max(0, len(scene.past) - 3)][-1].values if scene.past else scene.mine


def replayed(scene: Scene) -> Tensor:
    """What another sent a round ago."""
    return scene.past[-1][0].values if scene.past else scene.mine


VALUES: dict[str, Callable[[Scene], Tensor]] = {
    "× 1000": lambda scene: scene.mine * 1000,
    "flipped": lambda scene: -scene.mine,
    "random": lambda scene: scene.noise(float(scene.mine.norm())),
    "zero": lambda scene: torch.zeros_like(scene.mine),
    "stale": stale,
    "replayed": replayed,
    "copied": lambda scene: scene.others[0].values.clone(),
    "copied, with noise": lambda scene: (
        scene.others[0].values + scene.noise(0.03 * float(scene.others[0].values.norm()))
    ),
}
PLANES: dict[str, Callable[[Planes], Planes]] = {
    "NaN": lambda planes: [
        torch.full((len(each),), 255).to(torch.uint8).numpy() for each in planes
    ],
    "truncated": lambda planes: [*planes[:-1], planes[-1][: len(planes[-1]) // 2]],
}
WRONG_HASH = "wrong hash"
LIES = ("NaN", *VALUES, "truncated", WRONG_HASH)


@dataclass
class Court:
    """The `judge` of a rehearsal, as every honest peer would be it. `liars` are lies by peer.

    `evaluate(round)` gives the loss that contributions to a round are tried with. Peers' names are
    their identities', so that the liars' contributions are messages like any other.
    """

    method: Method
    liars: Mapping[Identity, str]
    evaluate: Callable[[int], Evaluate]
    rules: Trust = field(default_factory=Trust)
    ledger: Ledger = field(default_factory=Ledger)
    rehearsal: Rehearsal = field(init=False)
    reports: dict[str, Any] = field(default_factory=dict)
    past: list[list[Received]] = field(default_factory=list)
    named: dict[str, tuple[int, str]] = field(default_factory=dict)  # the first round, and why
    barred: dict[str, tuple[int, str]] = field(default_factory=dict)
    struck: set[str] = field(default_factory=set)  # who ever had a strike

    def __call__(self, round: int, received: list[Received]) -> list[Received]:
        agreed = next(iter(self.rehearsal.agreed.values()))
        base = agreed_hash(agreed, self.ledger.to_json())
        came, refused = self._through_the_wire(round, agreed, base, received)
        for peer, found in refused.items():
            self.named.setdefault(peer, (round, found.reason))
        self.ledger, weights, verdicts = judge(self.ledger, round, came, self.reports, self.rules)
        for each in verdicts:
            if each.kind != "twin":
                self.named.setdefault(each.peer, (round, f"{each.kind}: {each.what}"))
            if each.excludes:
                self.barred.setdefault(each.peer, (round, f"{each.kind}: {each.what}"))
        self.struck |= {peer for peer, each in self.ledger.standing.items() if each.strikes}
        self.reports = self._report(round, agreed, came, refused)
        weighed = [replace(each, weight=weights[each.peer]) for each in came]
        return clip_to_median(weighed) if self.rules.clip_to_median else weighed

    def _through_the_wire(
        self, round: int, agreed: Agreed, base: str, received: list[Received]
    ) -> tuple[list[Received], dict[str, Refused]]:
        """Contributions as they arrive, the liars' among them, and those that are refused."""
        lying = {identity.peer: (identity, lie) for identity, lie in self.liars.items()}
        received = [each for each in received if each.peer not in self.ledger.excluded]
        honest = [each for each in received if each.peer not in lying]
        came, refused = list(honest), dict[str, Refused]()
        for each in received:
            if each.peer not in lying:
                continue
            identity, lie = lying[each.peer]
            draws = torch.Generator().manual_seed(round)
            scene = Scene(each.values, honest, self.past, draws)
            values = VALUES[lie](scene) if lie in VALUES else each.values
            planes = self.method.codec.encode(values)  # type: ignore[attr-defined]
            planes = PLANES[lie](planes) if lie in PLANES else planes
            claimed = base[::-1] if lie == WRONG_HASH else base
            body = contribution_body(claimed, int(each.weight), INNER_STEPS, None)
            data = write_message("contribution", RUN, round, body, planes, identity)
            message = read_message(data, run=RUN, kind="contribution", limit=len(data))
            found = check_contribution(
                message,
                method=self.method,
                base=base,
                most_norm=largest_norm(take(agreed.weights, self.method.fragment(round))),
                most_tokens=1 << 40,
                earlier={},  # the ledger has to see it
            )
            if isinstance(found, Refused):
                refused[each.peer] = found
            else:
                came.append(replace(each, values=found.values))
        self.past.append(came)
        return came, refused

    def _report(
        self, round: int, agreed: Agreed, came: list[Received], refused: Mapping[str, Refused]
    ) -> dict[str, Any]:
        """Everybody's report of a round. The liars, who are the last to send, praise themselves."""
        lying = {identity.peer for identity in self.liars}
        wanted = {each.peer: self.ledger.to_try(each.peer) for each in came}
        chosen = {target for targets in wanted.values() for target in targets}
        rate = self.rehearsal.rate(self.rehearsal.step - 1)
        scores = try_contributions(self.method, agreed, came, rate, self.evaluate(round), chosen)
        arrivals = {each.peer: 2 if each.peer in lying else 1 for each in came}
        proven = {peer: found.reason for peer, found in refused.items() if found.proof}
        reports = {}
        for peer, targets in wanted.items():
            report = Report(round, {each: scores[each] for each in targets}, arrivals, proven)
            if peer in lying:
                praise = {each: Score(1.0, 1.0 if each in lying else -1.0) for each in targets}
                report = Report(round, praise, {each: 3 - n for each, n in arrivals.items()})
            reports[peer] = write_report(report)
        return reports


@dataclass(frozen=True)
class Outcome:
    """A line of the table."""

    loss: float
    court: Court
    seconds: float


def train(model: str, rounds: int, lie: str | None, honest: int, seed: int = 0) -> Outcome:
    """A run of `honest` peers and, if there is a lie, of one that tells it."""
    started = time.perf_counter()
    share = ROWS // 4
    count = honest + (lie is not None)
    run = Run(model, "sparseloco", count, INNER_STEPS, 0, 4e-3, 1.0, seed, rows=ROWS)
    tokens = INNER_STEPS * 3 * ROWS * SEQUENCE * -(-rounds // 3)
    run = replace(run, tokens=tokens, warmup=0.03, final=0.1)
    identities = [Identity.from_seed(bytes([index]) * 32) for index in range(count)]
    peers = {
        identity.peer: ModelPeer(run, slice(index * share, (index + 1) * share))
        for index, identity in enumerate(identities)
    }
    first = next(iter(peers.values()))
    settings = replace(DEFAULTS["sparseloco"], inner_steps=INNER_STEPS)
    method = build_method(settings, first.layout)

    def evaluate(round: int) -> Evaluate:
        return lambda weights, peer: (
            first.loss(weights, TUNING_ROWS + TEST_ROWS, 8)
            if peer is None
            else assigned_loss(peers[peer], weights, round)
        )

    court = Court(method, {identities[-1]: lie} if lie else {}, evaluate)
    rehearsal = Rehearsal(method, peers, first.weights(), rate=first.rate, judge=court)
    court.rehearsal = rehearsal
    rehearsal.run(rounds * INNER_STEPS)
    loss = first.loss(next(iter(rehearsal.agreed.values())).weights, TUNING_ROWS, TEST_ROWS)
    return Outcome(loss, court, time.perf_counter() - started)


def assigned_loss(peer: ModelPeer, weights: Tensor, round: int) -> float:
    """The loss of weights on what a peer trained on at the end of a round."""
    stop = (round + 1) * INNER_STEPS
    steps = range(stop - SCORED_STEPS, stop)
    return peer.loss_on(weights, (peer.data.train.batch(step, peer.rows) for step in steps))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1m", choices=("1m", "4m"))
    parser.add_argument("--rounds", type=int, default=24, help="rounds of each run")
    parser.add_argument("--only", nargs="*", default=list(LIES), choices=LIES, metavar="LIE")
    parser.add_argument("--honest", type=int, default=0, help="rounds of four honest peers instead")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.honest:
        outcome = train(given.model, given.honest, None, 4)
        court = outcome.court
        print(f"{given.honest} rounds of four honest peers: loss {outcome.loss:.4f}")
        print(f"ever given a strike: {len(court.struck)}; barred: {len(court.barred)}")
        for peer, (round, why) in court.named.items():
            print(f"  {peer[:8]} in round {round}: {why}")
        return 1 if court.barred else 0
    alone = train(given.model, given.rounds, None, 3)
    print(f"SparseLoCo, {INNER_STEPS} steps a round, {given.rounds} rounds, {given.model}")
    print(f"three honest peers: loss {alone.loss:.4f} ({alone.seconds:.0f} s)\n")
    print(f"{'the fourth sends':20} {'loss':>7} {'':>8} {'named':>6} {'barred':>7}  as")
    missed = 0
    for lie in given.only:
        outcome = train(given.model, given.rounds, lie, 3)
        court, apart = outcome.court, outcome.loss / alone.loss - 1
        liar = next(iter(court.liars)).peer
        round, why = court.named.get(liar, (-1, "not named"))
        barred, _ = court.barred.get(liar, (-1, ""))
        wronged = set(court.barred) - {liar}
        good = apart <= WITHIN and 0 <= round < 3 and not wronged
        missed += not good
        print(
            f"{lie:20} {outcome.loss:7.4f} {apart:+8.2%} {_ordinal(round):>6} "
            f"{_ordinal(barred):>7}  {why}" + ("" if good else "   MISSED"),
            flush=True,
        )
    return 1 if missed else 0


def _ordinal(round: int) -> str:
    """Rounds as people count them."""
    return "-" if round < 0 else str(round + 1)


if __name__ == "__main__":
    raise SystemExit(main())

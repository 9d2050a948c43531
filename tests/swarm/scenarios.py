"""Seeded runs of the simulated world with faults drawn at random, and what must hold of them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from itertools import pairwise

from tests.swarm.simulated import LIARS, FarCard, Inventor, Peer, Withholder, World, WrongCard
from trainwright.swarm.events import Advanced, Rules

TROUBLED = 120.0  # seconds in which faults begin
CALM = 150.0  # seconds after the last one is over


@dataclass
class Run:
    """A world after its run, and what was done to it."""

    seed: int
    world: World
    honest: list[Peer]
    well: list[Peer]  # to which nothing happened
    log: list[str] = field(default_factory=list)
    renewed: bool = False  # a decision may have been given up for another
    outage: float = 0.0

    def __str__(self) -> str:
        return "\n".join([f"seed {self.seed}, {self.world.rules}", *self.log])


def simulate(seed: int) -> Run:
    """Two to six peers, up to five faults, then a calm in which all must come right again."""
    draw = random.Random(seed)
    size = draw.choice((2, 3, 3, 4, 4, 5, 6))
    quorum = draw.randint(1, size)
    rules = Rules(quorum, draw.choice((0.0, 3.0, 8.0)), draw.choice((20.0, 40.0)), 8.0)
    world = World(rules, draw, lasting=draw.random() < 0.6, keeps=draw.choice((4, 1000)))
    run = Run(seed, world, [], [])
    run.log.append(f"lasting {world.lasting}, keeps {world.keeps}")
    kinds: list[type[Peer]] = [Peer] * size
    if size >= 4 and quorum > 1 and draw.random() < 0.4:
        kinds[-1] = draw.choice(LIARS)
        world.rules = replace(rules, quorum=min(quorum, size - 1))  # the honest can make rounds
        run.log.append(f"{kinds[-1].__name__} at p{size - 1}")
        run.renewed |= kinds[-1] in (Inventor, Withholder)
    for number, kind in enumerate(kinds):
        _peer(run, f"p{number}", kind, draw.uniform(0, 3))
    if draw.random() < 0.2:
        validator = _peer(run, "v", Peer, draw.uniform(0, 20))
        validator.trains = False
    ends = max((_fault(run, draw) for _ in range(draw.randint(0, 5))), default=0.0)
    world.run(ends + CALM)
    return run


def _peer(run: Run, name: str, kind: type[Peer], starts: float) -> Peer:
    draw = run.world.random
    peer = kind(
        run.world,
        name,
        train=draw.uniform(4, 7),
        upload=draw.choice((0.2, 2.0)),
        fetch=draw.choice((0.1, 1.5)),
        poll=draw.choice((0.5, 1.5)),
        drift=draw.uniform(0.99, 1.01),
        blocking=draw.random() < 0.2,
    )
    run.world.at(starts, peer.start)
    if kind is Peer:
        run.honest.append(peer)
        run.well.append(peer)
    return peer


def _fault(run: Run, draw: random.Random) -> float:
    """Do something to somebody; when it is over."""
    world, begins = run.world, draw.uniform(0, TROUBLED)
    lasts = draw.choice((1.0, 10.0, 40.0, 120.0))
    kind = draw.choice(
        ("kill", "stop", "away", "outage", "blind", "wrong", "join", "leave", "slow")
    )
    victim = draw.choice(run.honest)
    run.log.append(f"{kind} {victim.name} at {begins:.0f} s for {lasts:.0f} s")
    trainers = [each for each in run.honest if each.trains]
    if victim in run.well and kind not in ("outage", "join"):
        run.well.remove(victim)
    match kind:
        case "kill":
            world.at(begins, victim.kill)
            world.at(begins + lasts, victim.start)
        case "stop":
            world.at(begins, lambda: victim.stop(lasts))
        case "away":
            world.at(begins, lambda: setattr(victim, "away", max(victim.away, begins + lasts)))
        case "outage":
            run.outage += lasts

            def away() -> None:
                for peer in world.peers.values():
                    peer.away = max(peer.away, begins + lasts)

            world.at(begins, away)
        case "blind":
            other = draw.choice(list(world.peers))
            world.at(begins, lambda: victim.blind.update({other: begins + lasts}))
        case "wrong":
            # One peer, that cannot make rounds by itself, nor with a liar's help.
            alone = not any(line.startswith("wrong") for line in run.log[:-1])
            alone = alone and all(type(peer) is Peer for peer in world.peers.values())
            if alone and world.rules.quorum > 1 and len(trainers) > 2:
                world.at(begins, lambda: setattr(victim, "wrong_next", True))
        case "join":
            joiner = _peer(run, f"j{len(run.honest)}", Peer, begins)
            world.at(begins - 1e-6, lambda: _snapshot(joiner))
        case "leave":
            if len(trainers) - 1 >= world.rules.quorum and len(trainers) > 3:
                run.honest.remove(victim)
                world.at(begins, lambda: setattr(victim, "trains", False))
                world.at(begins + 5.0, victim.kill)
        case "slow":
            victim.train *= 6
    if not world.lasting or kind == "blind":
        run.renewed = True
    return begins + lasts


def _snapshot(joiner: Peer) -> None:
    """What it finds when it comes: the newest snapshot, a few rounds old."""
    states = [each.state for each in joiner.world.peers.values() if each.state and not _lies(each)]
    if states:
        found = max(states, key=lambda state: state.round)
        joiner.saved = Advanced(found.round, found.base, found.electorate)


def _lies(peer: Peer) -> bool:
    return isinstance(peer, (FarCard, WrongCard))


def check(run: Run) -> None:
    """Raises AssertionError, with all that was done, where something does not hold."""
    rules = run.world.rules
    agreed: dict[int, tuple[str, object]] = {}
    if not run.renewed:  # the same decisions everywhere
        for peer in run.honest:
            for round, decision in peer.decisions.items():
                name, other = agreed.setdefault(round, (peer.name, decision))
                assert other == decision, f"{run}\n{name} and {peer.name} differ in round {round}"
    # All that live go on together, with the same weights.
    last = min(peer.state.round for peer in run.honest)
    newest = max(peer.state.round for peer in run.honest)
    where = {peer.name: (peer.state.round, peer.state.base) for peer in run.honest}
    assert newest - last <= 1, f"{run}\nsomebody is left behind: {where}"
    at = {peer.bases.get(last) for peer in run.honest}
    assert len(at) == 1, f"{run}\nthey have parted by round {last}: {where}"
    # Whoever trains is part of the last rounds, and they do not fail.
    trainers = {peer.name for peer in run.honest if peer.trains and peer.train < 20}
    if len(trainers) >= rules.quorum and rules.grace > 5:
        known = dict(item for peer in run.honest for item in peer.decisions.items())
        tail = [known.get(round) for round in range(last - 4, last)]
        assert all(d and d.entries for d in tail), f"{run}\nrounds fail in the calm: {tail}"
        included = {name for decision in tail for name, _ in decision.entries}
        missing = trainers - included
        assert not missing, f"{run}\nleft out in the calm: {missing}, {tail}"
    # Nobody stalls those to whom nothing happened.
    for peer in run.well:
        rounds = sorted(peer.entered)
        for before, after in pairwise(rounds):
            took = peer.entered[after] - peer.entered[before]
            most = rules.deadline * (2 if run.renewed else 1) + rules.silence + 10 + run.outage
            assert took <= most, f"{run}\n{peer.name} was in round {before} for {took:.0f} s"
    # Nobody takes up weights that were wrong, and nobody twice in a round.
    for peer in run.honest:
        assert len({round for round, _ in peer.healed}) == len(peer.healed), f"{run}\n{peer.healed}"
        assert not [base for _, base in peer.healed if base.startswith("wrong")], str(run)

"""Methods against what they must equal, bit for bit, and against their papers' own lines."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor

from tests.swarm.trainees import Exact, Learner, pickled
from trainwright.comm.codecs.dense import Dense
from trainwright.swarm.layout import Layout, put, take
from trainwright.swarm.methods.build import METHODS, build_method
from trainwright.swarm.methods.method import Agreed, Method, Own, Received
from trainwright.swarm.methods.streaming import fragments
from trainwright.swarm.rehearsal import Rehearsal
from trainwright.swarm.settings import DEFAULTS, Settings

PEERS = ("ada", "ben", "cy", "dot")
LAYOUT = Layout((("layers.0.w", (64, 64)), ("layers.1.w", (64, 128)), ("norm", (64,))))


def settings(method: str, **changes: object) -> Settings:
    """Its defaults, but so fine and so frequent that little is lost."""
    return replace(DEFAULTS[method], **changes)  # type: ignore[arg-type]


def plain(method: str, **changes: object) -> Settings:
    """Without anything but the exchange: no momentum, no loss, rate 1."""
    bare = {"codec": "fp32", "outer_learning_rate": 1.0, "outer_momentum": 0.0}
    return settings(method, **{**bare, "feedback_decay": 0.0, "delay": 0, "mixing": 0.0, **changes})


def exact(peers: int = 4, **changes: int) -> dict[str, Exact]:
    return {name: Exact(LAYOUT, seed, **changes) for seed, name in enumerate(PEERS[:peers])}


def rehearse(method: Method, trainees: dict, steps: int, **options: object) -> Rehearsal:
    genesis = next(iter(trainees.values())).weights()
    found = Rehearsal(method, trainees, genesis, rate=lambda step: 0.125, **options)  # type: ignore[arg-type]
    found.run(steps)
    return found


def agreed_of(rehearsal: Rehearsal) -> Tensor:
    return rehearsal.agreed[PEERS[0]].weights


# Identities


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_diloco_of_one_step_is_large_batch_sgd(momentum: float) -> None:
    method = build_method(plain("diloco", inner_steps=1, outer_momentum=momentum), LAYOUT)
    found = rehearse(method, exact(), 6)

    weights = torch.zeros(LAYOUT.count, requires_grad=True)
    sgd = torch.optim.SGD([weights], lr=1.0, momentum=momentum, nesterov=momentum > 0)
    peers = exact()
    for step in range(6):
        for peer in peers.values():
            peer.load(weights.detach())
        weights.grad = torch.stack([peer.gradient(step)[0] for peer in peers.values()]).mean(0)
        sgd.step()
    assert torch.equal(agreed_of(found), weights.detach())
    assert not torch.equal(weights.detach(), torch.zeros(LAYOUT.count))


def test_streaming_of_one_fragment_is_diloco() -> None:
    more = {"inner_steps": 5, "codec": "int8", "outer_learning_rate": 0.7, "outer_momentum": 0.9}
    found = {}
    for name in ("diloco", "streaming"):
        trainees = {peer: Learner(seed) for seed, peer in enumerate(PEERS)}
        one = plain(name, fragments=1, **more)
        found[name] = rehearse(build_method(one, trainees["ada"].layout), trainees, 20)
    assert torch.equal(agreed_of(found["diloco"]), agreed_of(found["streaming"]))
    for one, other in zip(*(each.trainees.values() for each in found.values()), strict=True):
        assert torch.equal(one.weights(), other.weights())


def test_sparseloco_that_sends_all_is_federated_averaging() -> None:
    whole = plain("sparseloco", inner_steps=3, codec="top-k", density=1.0)
    method = build_method(whole, LAYOUT)
    method.codec.values = Dense("fp32")  # type: ignore[attr-defined]
    tokens = {"ada": 1, "ben": 3, "cy": 2, "dot": 2}

    def peers() -> dict[str, Exact]:
        seeds = enumerate(tokens.items())
        return {name: Exact(LAYOUT, seed, many) for seed, (name, many) in seeds}

    found = rehearse(method, peers(), 12)
    weights, others = torch.zeros(LAYOUT.count), peers()
    for round in range(4):
        total = torch.zeros(LAYOUT.count)
        for name, peer in others.items():  # McMahan et al. 2017: Σ n_k/n θ_k
            peer.load(weights)
            for step in range(3 * round, 3 * round + 3):
                peer.train(step)
            total += peer.weights() * (tokens[name] / 8)
        weights = total
    assert torch.equal(agreed_of(found), weights)


@pytest.mark.parametrize("stays", [0.0, 0.5])
def test_demo_that_sends_all_is_the_sign_of_momentum(stays: float) -> None:
    whole = plain("demo", density=1.0, feedback_decay=0.5, outer_momentum=stays)
    found = rehearse(build_method(whole, LAYOUT), exact(3), 4)
    weights, peers = torch.zeros(LAYOUT.count), exact(3)
    momenta = {name: torch.zeros(LAYOUT.count) for name in peers}
    for step in range(4):
        for name, peer in peers.items():
            peer.load(weights)
            momenta[name] = momenta[name] * stays * 0.5 + 0.125 * peer.gradient(step)[0]
        # Of three peers with odd gradients the sum is never 0, whose sign rounding would decide.
        weights = weights - 0.125 * torch.stack(list(momenta.values())).sum(0).sign()
    assert torch.equal(agreed_of(found), weights)
    assert all(torch.equal(p.weights(), weights) for p in found.trainees.values())


def test_muloco_and_sparseloco_with_its_settings_are_diloco() -> None:
    ends = []
    for name in ("diloco", "muloco", "sparseloco"):
        method = build_method(replace(DEFAULTS["muloco"], method=name, inner_steps=2), LAYOUT)
        ends.append(agreed_of(rehearse(method, exact(), 6)))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_run_ends_as_one_that_was_not(name: str) -> None:
    def run(stop: int | None) -> list[Tensor]:
        trainees = {peer: Learner(seed) for seed, peer in enumerate(PEERS[:3])}
        options = {"inner_steps": 4} if DEFAULTS[name].inner_steps > 1 else {}
        method = build_method(settings(name, **options), trainees["ada"].layout)
        attends = lambda round, peer: (round, peer) != (1, "ben")  # noqa: E731
        found = rehearse(method, trainees, stop or 14, attends=attends)
        if stop is not None:
            saved = pickled(found.state())
            restored = {peer: Learner(seed) for seed, peer in enumerate(PEERS[:3])}
            found = Rehearsal(
                *(method, restored, trainees["ada"].weights()),
                rate=lambda step: 0.125,
                attends=attends,
            )
            for peer, trainee in restored.items():
                trainee.restore(trainees[peer].save())
            found.restore(saved)
            found.run(14)
        ends = [trainee.weights() for trainee in found.trainees.values()]
        return [*ends, *(agreed.weights for agreed in found.agreed.values())]

    whole = run(None)
    for stop in (4, 9):  # right after an exchange (maybe under way), and between two
        assert all(torch.equal(a, b) for a, b in zip(whole, run(stop), strict=True))


# Nothing is lost, nothing counts twice


@pytest.mark.parametrize(
    ("name", "codec", "delay"),
    [
        ("diloco", "fp32", 0),
        ("diloco", "fp32", 2),
        ("sparseloco", "top-k", 0),
        ("sparseloco", "top-k", 2),
        ("streaming", "e3m0", 0),  # with a delay its mixture gives up a share of some steps
    ],
)
def test_every_step_is_sent_once(name: str, codec: str, delay: int) -> None:
    """Steps = contributions that rounds took in + what is unsent + local change; of values that
    need no rounding exactly.

    Whoever misses rounds, as often as chance has it, and with steps during an exchange.
    """
    parts = 3 if name == "streaming" else 1
    every = plain(name, inner_steps=3 * parts, fragments=parts, delay=delay, codec=codec)
    method = build_method(
        replace(every, feedback_decay=float(codec != "fp32")),
        LAYOUT,
        lambda received: torch.stack([each.values for each in received]).sum(0).div(4),
    )
    taken = {peer: torch.zeros(LAYOUT.count) for peer in PEERS}

    def count(round: int, received: list[Received]) -> list[Received]:
        part = method.fragment(round)
        for each in received:
            put(taken[each.peer], part, take(taken[each.peer], part) + each.values)
        return received

    for seed in range(5):
        chance = random.Random(seed)
        misses = {(round, peer) for round in range(9) for peer in PEERS if chance.random() < 0.4}
        for each in taken.values():
            each.zero_()
        peers = exact()
        steps = 27 + delay
        found = rehearse(
            *(method, peers, steps), attends=lambda r, p, m=misses: (r, p) not in m, judge=count
        )
        assert found.round == 9 and found.sent is None
        for peer, trainee in peers.items():
            unsent = found.own[peer].vectors.get("unsent", torch.zeros(LAYOUT.count))
            change = found.agreed[peer].weights - trainee.weights()
            torch.testing.assert_close(
                taken[peer] + unsent + change,
                trainee.moved,
                rtol=0,
                atol=0 if codec == "fp32" else 1e-5,
            )


def test_demos_momentum_has_what_no_round_took_in() -> None:
    method = build_method(plain("demo", feedback_decay=1.0, density=8 / 4096), LAYOUT)
    own, agreed = (
        method.begin(Agreed(0, torch.zeros(LAYOUT.count))),
        Agreed(0, torch.zeros(LAYOUT.count)),
    )
    peer, sent, total = Exact(LAYOUT, 1), torch.zeros(LAYOUT.count), torch.zeros(LAYOUT.count)
    for step in range(8):
        gradient = peer.gradient(step)[0]
        total += 0.125 * gradient
        planes, after = method.outgoing(agreed, own, step, gradient, 0.125)
        if step % 3 == 1:
            own = method.missed(agreed, own, step, gradient, 0.125)
            continue
        own = after
        sent += method.codec.decode(planes, LAYOUT.count)  # type: ignore[attr-defined]
    torch.testing.assert_close(sent + own.vectors["momentum"], total, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_failed_round_changes_nothing_but_its_number(name: str) -> None:
    method = build_method(settings(name), LAYOUT)
    draws = torch.Generator().manual_seed(3)
    first = Agreed(4, torch.randn(LAYOUT.count, generator=draws))
    planes, own = method.outgoing(
        first, method.begin(first), 4, torch.randn(_size(method, 4), generator=draws), 0.1
    )
    once = method.advance(first, [Received("ada", method.decode(planes, 4), 1.0)], 0.1)
    again = method.advance(once, [], 0.1)
    assert again.round == once.round + 1 == first.round + 2
    assert torch.equal(again.weights, once.weights) and not torch.equal(once.weights, first.weights)
    assert again.outer.keys() == once.outer.keys()
    assert all(torch.equal(again.outer[key], once.outer[key]) for key in once.outer)
    local = torch.randn(_size(method, 5), generator=draws)
    if method.takes == "weights":
        assert torch.equal(method.merge(once, again, 5, local, None), local)
    assert own.vectors.keys() == method.begin(first).vectors.keys()


def _size(method: Method, round: int) -> int:
    return sum(each.stop - each.start for each in method.fragment(round))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "noloco"])
def test_all_peers_agree_bit_for_bit(name: str) -> None:
    """Each with a method of its own, what it decoded itself, and another number of threads."""
    layout = Layout(
        (("layers.0.w", (256, 512)), ("layers.1.w", (256, 512)), ("layers.2.w", (999,)))
    )
    draws = torch.Generator().manual_seed(1)
    genesis = torch.randn(layout.count, generator=draws)
    methods = [build_method(settings(name), layout) for _ in range(3)]
    states = [Agreed(0, genesis.clone()) for _ in methods]
    owns = [method.begin(states[0]) for method in methods]
    for round in range(3):
        sent = []
        for index, method in enumerate(methods):
            local = torch.randn(_size(method, round), generator=draws)
            planes, owns[index] = method.outgoing(states[index], owns[index], round, local, 0.01)
            assert sum(map(len, planes)) <= method.most_bytes(round)
            sent.append(planes)
        for index, method in enumerate(methods):
            threads = torch.get_num_threads()
            torch.set_num_threads(1 + index)
            received = [
                Received(PEERS[i], method.decode(planes, round), 1.0 + i)
                for i, planes in enumerate(sent)
            ]
            states[index] = method.advance(states[index], received, 0.01)
            torch.set_num_threads(threads)
        for state in states[1:]:
            assert torch.equal(state.weights, states[0].weights)
            assert all(torch.equal(state.outer[key], states[0].outer[key]) for key in state.outer)
    assert not torch.equal(states[0].weights, genesis)


# Against the papers' own lines


def test_the_outer_step_is_torchs_nesterov() -> None:
    method = build_method(settings("diloco", codec="fp32"), LAYOUT)
    draws = torch.Generator().manual_seed(2)
    agreed = Agreed(0, torch.randn(LAYOUT.count, generator=draws))
    weights = agreed.weights.clone().requires_grad_()
    sgd = torch.optim.SGD([weights], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(5):
        change = torch.randn(LAYOUT.count, generator=draws)
        agreed = method.advance(agreed, [Received("ada", change, 7.0)], 0.0)
        weights.grad = change
        sgd.step()
    torch.testing.assert_close(agreed.weights, weights.detach(), rtol=1e-6, atol=1e-6)


def test_streaming_follows_its_papers_loop() -> None:
    """Two fragments, H 4, τ 1, α 0.25, two peers: the paper's algorithm, step by step."""
    some = plain("streaming", inner_steps=4, fragments=2, delay=1, mixing=0.25)
    method = build_method(replace(some, outer_learning_rate=0.5, outer_momentum=0.5), LAYOUT)
    found = rehearse(method, exact(2), 12)

    peers = list(exact(2).values())
    outer = torch.zeros(LAYOUT.count)
    momentum = torch.zeros(LAYOUT.count)
    waiting: tuple[int, Tensor] | None = None
    for step in range(12):
        for peer in peers:
            peer.train(step)
        if waiting is not None:
            fragment, change = waiting
            part = method.fragment(fragment)
            m = 0.5 * take(momentum, part) + change
            put(momentum, part, m)
            put(outer, part, take(outer, part) - 0.5 * (change + 0.5 * m))
            for peer in peers:
                own = 0.25 * take(peer.values, part) + 0.75 * take(outer, part)
                put(peer.values, part, own)
            waiting = None
        if (step + 1) % 2 == 0:
            fragment = ((step + 1) // 2 - 1) % 2
            part = method.fragment(fragment)
            changes = [take(outer, part) - take(peer.values, part) for peer in peers]
            waiting = fragment, torch.stack(changes).mean(0)
    for trainee, peer in zip(found.trainees.values(), peers, strict=True):
        torch.testing.assert_close(trainee.weights(), peer.values, rtol=0, atol=1e-6)


def test_demo_follows_its_release() -> None:
    """The release's update with scipy's transform: two peers, 32 coefficients of 4096."""
    layout = Layout((("w", (64, 128)),))
    method = build_method(settings("demo", codec="fp32", weight_decay=0.1), layout)
    peers = {name: Exact(layout, seed) for seed, name in enumerate(PEERS[:2])}
    found = rehearse(method, peers, 4)

    def blocks(values: np.ndarray) -> np.ndarray:
        return values.reshape(64, 2, 64).transpose(1, 0, 2)

    weights, deltas = np.zeros((64, 128)), [np.zeros((64, 128)) for _ in peers]
    others = [Exact(layout, seed) for seed in range(2)]
    for step in range(4):
        sent = np.zeros((2, 64, 64))
        for index, peer in enumerate(others):
            peer.load(torch.from_numpy(weights).float().reshape(-1))
            gradient = peer.gradient(step)[0].double().numpy().reshape(64, 128)
            deltas[index] = 0.999 * deltas[index] + 0.125 * gradient
            found_dct = scipy.fft.dctn(blocks(deltas[index]), axes=(1, 2), norm="ortho")
            sizes = np.abs(found_dct).reshape(2, -1)
            least = np.sort(sizes, axis=1)[:, -32, None, None]
            chosen = np.where(np.abs(found_dct) >= least, found_dct, 0.0)
            sent += chosen / 2
            back = scipy.fft.idctn(chosen, axes=(1, 2), norm="ortho")
            deltas[index] = deltas[index] - back.transpose(1, 0, 2).reshape(64, 128)
        update = scipy.fft.idctn(sent, axes=(1, 2), norm="ortho").transpose(1, 0, 2)
        assert np.abs(update).min() > 1e-7  # no sign hangs on rounding
        weights = weights * (1 - 0.125 * 0.1) - 0.125 * np.sign(update.reshape(64, 128))
    np.testing.assert_allclose(agreed_of(found).view(64, 128).numpy(), weights, atol=1e-6)


def test_noloco_follows_its_formula_and_draws_peers_together() -> None:
    method = build_method(settings("noloco", codec="fp32"), LAYOUT)
    draws = torch.Generator().manual_seed(5)
    slow = {peer: torch.randn(LAYOUT.count, generator=draws) for peer in PEERS[:2]}
    fast = {peer: torch.randn(LAYOUT.count, generator=draws) for peer in slow}
    states = {peer: Agreed(0, weights.clone()) for peer, weights in slow.items()}
    delta = dict.fromkeys(slow, torch.zeros(LAYOUT.count))
    for round in range(3):
        received = []
        for peer in slow:
            planes, _ = method.outgoing(states[peer], Own(), round, fast[peer], 0.0)
            received.append(Received(peer, method.decode(planes, round), 1.0))
        states = {peer: method.advance(states[peer], received, 0.0) for peer in slow}
        mean = sum(slow.values()) / 2
        change = sum(fast[peer] - slow[peer] for peer in slow) / 2
        delta = {
            peer: 0.5 * delta[peer] + 0.7 * change + 0.7 * (mean - slow[peer]) for peer in slow
        }
        slow = {peer: slow[peer] + delta[peer] for peer in slow}
        for peer, weights in slow.items():
            torch.testing.assert_close(states[peer].weights, weights, rtol=1e-5, atol=1e-5)

    trainees = {peer: Learner(seed) for seed, peer in enumerate(PEERS)}
    often = build_method(settings("noloco", inner_steps=2), trainees["ada"].layout)
    found = rehearse(often, trainees, 60)
    weights = torch.stack([agreed.weights for agreed in found.agreed.values()])
    apart = (weights - weights.mean(0)).norm(dim=1).max()
    assert 0 < apart < 0.2 * weights.mean(0).norm()


@pytest.mark.parametrize("size", range(1, 10))
def test_nolocos_pairs_are_mutual_and_change(size: int) -> None:
    method = build_method(settings("noloco"), LAYOUT)
    members = [f"peer{index}" for index in range(size)]
    seen = set[str]()
    for round in range(40):
        groups = {me: tuple(method.partners(round, members[::-1], me, 7)) for me in members}
        assert all(groups[other] == groups[me] for me in members for other in groups[me])
        assert all(me in group and len(group) in (min(size, 2), 3) for me, group in groups.items())
        seen.update(groups[members[0]])
    assert seen == set(members)


# What else there is to a method


def test_fragments_share_the_model_out() -> None:
    names = [f"layers.{layer}.{part}" for layer in range(7) for part in ("a", "b")]
    shapes = [*((name, (8, 8)) for name in names), ("embed", (100, 8)), ("norm", (8,))]
    layout = Layout(tuple(sorted(shapes)))
    parts = fragments(layout, 3)
    assert sorted(name for part in parts for name in part) == sorted(layout.slices)
    assert {"layers.0.a", "layers.3.b", "layers.6.a"} <= set(parts[0])
    assert "embed" in parts[1] and "norm" in parts[2]  # parts 1 and 2 have two layers each

    whole = torch.zeros(layout.count, dtype=torch.int)
    method = build_method(settings("streaming"), layout)
    for round in range(3):
        for each in method.fragment(round):
            whole[each] += 1
    assert bool((whole == 1).all())
    assert method.fragment(4) == method.fragment(1) and method.inner_steps == 10


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name: str) -> None:
    trainees = {peer: Learner(seed) for seed, peer in enumerate(PEERS[:2])}
    judge = Learner(99)
    options = {} if DEFAULTS[name].inner_steps == 1 else {"inner_steps": 6}
    method = build_method(settings(name, **options), judge.layout)
    before = judge.loss(0).item()
    found = Rehearsal(method, trainees, judge.weights(), rate=lambda step: 0.006 * (1 - step / 90))
    found.run(90)
    judge.load(agreed_of(found))
    assert judge.loss(0).item() < 0.7 * before
    assert found.bytes > 0

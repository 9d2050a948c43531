"""A whole swarm over the ring: rounds go on when a peer is gone, with the same weights for all."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.swarm.test_ring import until
from tests.swarm.toy_peer import Toy, begin_run, settings
from trainwright.swarm.identity import Identity
from trainwright.swarm.runs import find_run
from trainwright.swarm.transports.ring import open_ring
from trainwright.swarm.transports.transport import TransportError


@pytest.fixture
def ring(tmp_path):
    """Begins a run over a ring, and gives so many peers of it, with their transports."""
    transports = []

    def begun(count):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            url = f"ring://127.0.0.1:{sock.getsockname()[1]}"
        identities = [Identity.new() for _ in range(count)]
        transports.extend(open_ring(url, each.peer, tmp_path / each.peer) for each in identities)
        begin_run(transports[0], identities[0], settings("diloco"))
        until(lambda: all(find_run(each) for each in transports))
        toys = [
            Toy(transport, identity, tmp_path / identity.peer, seed=seed)
            for seed, (transport, identity) in enumerate(zip(transports, identities, strict=True))
        ]
        return toys, transports

    yield begun
    for transport in transports:
        transport.close()


def test_a_swarm_over_the_ring_agrees_and_outlives_a_peer(ring):
    toys, transports = ring(3)

    def run(toy: Toy) -> None:
        toy.start()
        toy.until(3)
        if toy is toys[2]:  # gone without a word
            transports[2].close()
            return
        toy.until(6)

    with ThreadPoolExecutor() as pool:
        list(pool.map(run, toys))
    survivors = toys[:2]
    for toy in survivors:
        assert [round for round, _ in toy.rounds] == list(range(6))
        toy.close()
    assert toys[0].rounds[:3] == [(0, True), (1, True), (2, True)]
    assert torch.equal(toys[0].weights, toys[1].weights)


def test_who_is_first_at_the_end_stays_until_the_other_has_its_contribution(ring):
    (first, other), (_, link) = ring(2)
    get, slow = link.get, threading.Event()

    def held_back(peer, key, limit):
        if key == "rounds/1/contribution" and peer != link.me and not slow.is_set():
            raise TransportError("a slow link")
        return get(peer, key, limit)

    link.get = held_back
    with ThreadPoolExecutor() as pool:
        for toy in (first, other):
            toy.start()
        rest = pool.submit(other.until, 2)
        first.until(2)
        assert first.peer.needed and not other.peer.needed and not rest.done()
        slow.set()
        until(lambda: not first.peer.needed)
        first.close()
        first.peer._driver.shelves.transport.close()
        rest.result()
    assert torch.equal(first.weights, other.weights)
    other.close()

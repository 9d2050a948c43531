"""A whole swarm over the ring: rounds go on when a peer is gone, with the same weights for all."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import torch

from tests.swarm.test_ring import until
from tests.swarm.toy_peer import Toy, begin_run, settings
from trainwright.swarm.identity import Identity
from trainwright.swarm.runs import find_run
from trainwright.swarm.transports.ring import open_ring


def test_a_swarm_over_the_ring_agrees_and_outlives_a_peer(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"ring://127.0.0.1:{sock.getsockname()[1]}"
    identities = [Identity.new() for _ in range(3)]
    transports = [open_ring(url, each.peer, tmp_path / each.peer) for each in identities]
    begin_run(transports[0], identities[0], settings("diloco"))
    until(lambda: all(find_run(each) for each in transports))
    toys = [
        Toy(transport, identity, tmp_path / identity.peer, seed=seed)
        for seed, (transport, identity) in enumerate(zip(transports, identities, strict=True))
    ]

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
    for transport in transports:
        transport.close()

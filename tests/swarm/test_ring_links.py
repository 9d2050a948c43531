"""The ring over slow links, one of which is cut without a word to either end, and mended."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import pytest

from benchmarks.emulated_links.star import missing, star
from tests.swarm.ring_peer import RingPeer
from tests.swarm.test_ring import IDS, until

pytestmark = [pytest.mark.prove, pytest.mark.skipif(bool(missing()), reason=missing())]


def test_contributions_go_round_and_a_silent_link_stops_nobody_else(tmp_path):
    size, electorate = 200_000, sorted(IDS[:4])
    contributions = {me: os.urandom(size).hex() for me in IDS[:4]}
    with star(peers=4, mbit=10, delay_ms=20, loss=0) as net, ExitStack() as stack:
        print(net.measured(1.0))
        url = f"ring://secret@{net.address(0)}:7000"
        peers = [
            RingPeer(url, me, tmp_path / me, start=partial(net.run, place))
            for place, me in enumerate(IDS[:4])
        ]
        for each in peers:
            stack.callback(each.kill)
            each.ask("put", "card", "")
        until(lambda: all(each.ask("measured") == [3, 3, 3, 3] for each in peers))
        until(lambda: len({tuple(each.ask("ring")) for each in peers}) == 1)

        before = [net.moved(place)[0] for place in range(4)]
        for each in peers:
            each.ask("put", "contribution", contributions[each.me])
        until(lambda: all(len(each.ask("keys", me, "")) == 2 for each in peers for me in IDS[:4]))

        def all_of_them(each: RingPeer) -> bool:
            found = {me: each.ask("get", me, "contribution", size) for me in contributions}
            return found == contributions

        with ThreadPoolExecutor() as pool:
            assert all(pool.map(all_of_them, peers))
        sent = [net.moved(place)[0] - was for place, was in enumerate(before)]
        # In a ring of four each passes three on, of the others' and its own; frames, and TCP's and
        # IP's headers and acknowledgements, come on top.
        assert all(3 * size < bytes < 1.3 * 3 * size for bytes in sent), sent

        net.cut(3)
        *others, away = peers
        said = others[0].ask("settle", "rounds/1", "agreed without it", electorate)
        assert said == "agreed without it"
        others[1].ask("put", "newer", "00" * size)
        until(lambda: all(away.me not in each.ask("ring") for each in others))
        until(lambda: others[0].ask("get", others[1].me, "newer", size) == "00" * size)
        assert away.ask("ring") == [away.me]

        net.mend(3)
        until(lambda: away.ask("get", others[1].me, "newer", size) == "00" * size)
        assert away.ask("settle", "rounds/1", "too late", electorate) == "agreed without it"
        until(lambda: len(others[0].ask("ring")) == 4)

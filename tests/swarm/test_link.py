"""A link is measured over a store of known speed, by a clock that only that store moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainwright.swarm.link import Link, measure_link
from trainwright.swarm.transports.folder import Folder
from trainwright.swarm.transports.store import Store
from trainwright.swarm.transports.transport import TransportError


class Slow(Folder):
    """A folder whose calls take a known time: of a delay, a rate each way, and TCP's slow start."""

    def __init__(self, root: Path, up: float, down: float, delay: float) -> None:
        super().__init__(root)
        self.up, self.down, self.delay, self.now, self.moved = up, down, delay, 0.0, 0

    def write(self, path: str, data: bytes) -> None:
        self._pass(len(data), self.up)
        super().write(path, data)

    def read(self, path: str, limit: int) -> bytes | None:
        data = super().read(path, limit)
        self._pass(len(data or b""), self.down)
        return data

    def _pass(self, size: int, rate: float) -> None:
        self.moved += size
        self.now += self.delay + size / rate
        window = 14_600
        while window < size and window < rate * self.delay:  # a round trip for each doubling
            self.now += self.delay
            window *= 2


@pytest.mark.parametrize(
    ("up", "down", "delay"),
    [(1.25e6, 1.25e6, 0.08), (1.25e5, 1.25e6, 0.3), (1.25e7, 5e7, 0.04), (2e9, 2e9, 1e-4)],
)
def test_the_measured_link_is_the_link(
    tmp_path: Path, up: float, down: float, delay: float
) -> None:
    backing = Slow(tmp_path, up, down, delay)
    link = measure_link(Store(backing, "ada"), clock=lambda: backing.now)
    assert link is not None
    assert link.call == pytest.approx(delay, rel=0.05)
    assert link.up == pytest.approx(up, rel=0.15)
    assert (0.85 if up == down else 0.2) * down < link.down < 1.15 * down
    assert backing.now < 12  # seconds that a user waits
    assert Store(backing, "ada").keys("ada", "") == []


def test_a_store_that_is_away_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TransportError):
        measure_link(Store(Folder(tmp_path / "away"), "ada"))


def test_rings_have_no_link_of_their_own() -> None:
    assert measure_link(object()) is None  # type: ignore[arg-type]


def test_a_link_reads_well() -> None:
    assert str(Link(1.25e6, 2.5e7, 0.0812)) == "10 Mbit/s up, 200 Mbit/s down, 81 ms a call"

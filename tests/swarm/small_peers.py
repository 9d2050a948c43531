"""Peers that really learn, in milliseconds: a small network that guesses the next character."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.swarm_liars import Court
from trainwright.recipe.swarm import Trust
from trainwright.swarm.identity import Identity
from trainwright.swarm.layout import Layout
from trainwright.swarm.methods.build import build_method
from trainwright.swarm.rehearsal import Rehearsal
from trainwright.swarm.scores import Evaluate
from trainwright.swarm.settings import DEFAULTS, Settings

CONTEXT = 6


class SmallPeer:
    """A peer of `swarm.rehearsal` on a text (int64 [characters]). Batches are drawn by its seed."""

    def __init__(self, text: Tensor, seed: int, batch: int = 64, rate: float = 3e-3) -> None:
        self.text, self.batch, self.rate = text, batch, rate
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Embedding(128, 12),
            nn.Flatten(),
            nn.Linear(12 * CONTEXT, 48),
            nn.GELU(),
            nn.Linear(48, 128),
        )
        self.layout = Layout.of(dict(self.model.named_parameters()))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), rate)
        self.draws = torch.Generator().manual_seed(seed)
        self.seen = list[Tensor]()  # where the batches since the last look were

    def load(self, weights: Tensor) -> None:
        parts = self.layout.unflatten(weights)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(parts[name])

    def weights(self) -> Tensor:
        return self.layout.flatten(dict(self.model.named_parameters()))

    def train(self, step: int) -> int:
        self._loss(self._batch()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.batch

    def gradient(self, step: int) -> tuple[Tensor, int]:
        self._loss(self._batch()).backward()
        parts = {name: each.grad for name, each in self.model.named_parameters()}
        values = self.layout.flatten(
            {name: each for name, each in parts.items() if each is not None}
        )
        self.optimizer.zero_grad()
        return values, self.batch

    def loss(self, weights: Tensor, places: Tensor) -> float:
        """Of those weights at those places of this peer's text; its own weights stay."""
        own = self.weights()
        self.load(weights)
        with torch.no_grad():
            found = float(self._loss(places))
        self.load(own)
        return found

    def _batch(self) -> Tensor:
        places = torch.randint(len(self.text) - CONTEXT, (self.batch,), generator=self.draws)
        self.seen.append(places)
        return places

    def _loss(self, places: Tensor) -> Tensor:
        rows = self.text[places[:, None] + torch.arange(CONTEXT + 1)]
        return nn.functional.cross_entropy(self.model(rows[:, :-1]), rows[:, -1])


@cache
def read_text(*files: Path) -> Tensor:
    """The characters of files, one after the other, those beyond ASCII left out."""
    text = "".join(each.read_text(errors="ignore") for each in files)
    return torch.frombuffer(bytearray(text.encode("ascii", "ignore")), dtype=torch.uint8).long()


LIBRARY = Path(sysconfig.get_paths()["stdlib"])
PYTHON = tuple(sorted(LIBRARY.glob("*.py"))[:8])
TABLES = tuple(sorted((LIBRARY / "encodings").glob("cp*.py"))[:8])
DILOCO = replace(DEFAULTS["diloco"], codec="fp32")


@dataclass(frozen=True)
class Told:
    """A run: the held-out loss of what was agreed, the court, and the peers' names in order."""

    loss: float
    court: Court
    names: tuple[str, ...]


def rehearse(
    texts: Sequence[tuple[Path, ...]],
    rounds: int,
    *,
    lie: str | None = None,
    rules: Trust | None = None,
    inner_steps: int = 10,
    batches: Sequence[int] = (),
    hot: Callable[[int, int], bool] = lambda round, index: False,
    settings: Settings = DILOCO,
) -> Told:
    """Peers with those texts, of which the last tells the lie; `batches` are examples a step.

    `hot(round, index)`: whether a peer's learning rate is far too high in that round.
    """
    identities = [Identity.from_seed(bytes([index]) * 32) for index in range(len(texts))]
    peers = {
        identity.peer: SmallPeer(read_text(*text), index, dict(enumerate(batches)).get(index, 64))
        for index, (identity, text) in enumerate(zip(identities, texts, strict=True))
    }
    names = tuple(peers)
    first = peers[names[0]]
    places = torch.arange(0, len(first.text) - CONTEXT - 1, 211)[:500]
    method = build_method(replace(settings, inner_steps=inner_steps), first.layout)

    def evaluate(round: int) -> Evaluate:
        return lambda weights, peer: (
            first.loss(weights, places)
            if peer is None
            else peers[peer].loss(weights, torch.cat(peers[peer].seen[-3:]))
        )

    court = Court(method, {identities[-1]: lie} if lie else {}, evaluate, rules or Trust())
    rehearsal = Rehearsal(method, peers, first.weights(), rate=lambda step: first.rate, judge=court)
    court.rehearsal = rehearsal
    for round in range(rounds):
        for index, peer in enumerate(peers.values()):
            peer.optimizer.param_groups[0]["lr"] = peer.rate * (30 if hot(round, index) else 1)
        rehearsal.run((round + 1) * inner_steps)
    return Told(first.loss(rehearsal.agreed[names[0]].weights, places), court, names)

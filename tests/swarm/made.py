"""A run made up for tests: two peers, a layout, and a message of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from trainwright.comm.codecs.build import build_codec
from trainwright.recipe.load import load_recipe
from trainwright.recipe.schema import Recipe
from trainwright.recipe.swarm import CodecName
from trainwright.swarm.agreed_hash import agreed_hash, write_snapshot
from trainwright.swarm.checks import contribution_body
from trainwright.swarm.events import Rules
from trainwright.swarm.identity import Identity
from trainwright.swarm.layout import Layout
from trainwright.swarm.manifest import Manifest
from trainwright.swarm.message import write_message
from trainwright.swarm.methods.method import Agreed, Method
from trainwright.swarm.settings import Settings

ALICE, BOB = Identity.from_seed(bytes(32)), Identity.from_seed(b"\1" * 32)
RUN = "00112233445566778899aabbccddeeff"
BASE = "ab" * 16
LAYOUT = Layout((("embed", (96, 64)), ("norm", (64,)), ("out", (64, 96))))
RECIPE = """
name: ours
model: {family: llama, preset: 4m}
data: {sources: [python-stdlib]}
training: {steps: 100}
swarm: {method: sparseloco, inner_steps: 10}
"""


SETTINGS = Settings("sparseloco", 10, "top-k", 1 / 64, 0.7, 0.9, 0.95, 2, 1, 0.5, "plain", 0.1)


class OneVector:
    """As much of a method as reads contributions: all weights, in one codec."""

    def __init__(self, codec: CodecName = "top-k") -> None:
        self.codec = build_codec(codec, density=1 / 64)

    def decode(self, planes: Sequence, round: int) -> Tensor:
        return self.codec.decode(planes, LAYOUT.count)

    def most_bytes(self, round: int) -> int:
        return self.codec.most_bytes(LAYOUT.count)


def method(codec: CodecName = "top-k") -> Method:
    return cast(Method, OneVector(codec))


def recipe(text: str = RECIPE) -> Recipe:
    return load_recipe("recipe.yaml", text=text)


def manifest(starter: Identity = ALICE, **changes) -> Manifest:
    made = Manifest.of(recipe(), LAYOUT, SETTINGS, Rules(), BASE, starter.peer)
    return Manifest(**{**vars(made), **changes})


def agreed(round: int = 3) -> Agreed:
    generator = torch.Generator().manual_seed(round)
    weights = torch.randn(LAYOUT.count, generator=generator)
    return Agreed(round, weights, {"momentum": torch.randn(LAYOUT.count, generator=generator)})


LEDGER = {"ratings": {ALICE.peer: [25.0, 8.333]}, "strikes": {}}


def change(seed: int = 0, count: int = LAYOUT.count) -> Tensor:
    return 1e-3 * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def contribution(
    by: Identity = ALICE, codec: CodecName = "top-k", round: int = 3, planes=None, **changes
) -> bytes:
    """A contribution's message; `changes` are of its body."""
    if planes is None:
        planes = OneVector(codec).codec.encode(change(round))
    body = contribution_body(BASE, 40_000, 10, 5.25) | changes
    return write_message("contribution", RUN, round, body, planes, by)


def messages() -> dict[str, bytes]:
    """One of every kind, each of about what a small run has."""
    entries = [[ALICE.peer, "0" * 64], [BOB.peer, "1" * 64]]
    card = {"base": BASE, "sequence": 7, "name": "Zoë's machine", "loss": 5.25, "active": True}
    return {
        "card": write_message("card", RUN, 3, card, [], ALICE),
        "contribution": contribution(),
        "decision": write_message(
            "decision", RUN, 3, {"entries": entries, "reports": []}, [], ALICE
        ),
        "snapshot": write_snapshot(agreed(), LEDGER, RUN, ALICE),
        "manifest": manifest().write(ALICE),
    }


SNAPSHOT_HASH = agreed_hash(agreed(), LEDGER)

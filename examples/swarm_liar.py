"""A peer of a swarm that does not train: it sends noise, and claims a full round's work.

For demonstrations and tests of what honest peers do about it: `python swarm_liar.py RUN FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from trainwright.swarm.identity import Identity
from trainwright.swarm.layout import take
from trainwright.swarm.peer import Peer
from trainwright.swarm.runs import find_run
from trainwright.swarm.transports.open import open_transport
from trainwright.training.swarm_peer import method_of, terms_of


def main() -> None:
    """Lie until the run is over, or until nobody listens."""
    url, folder = sys.argv[1], Path(sys.argv[2])
    identity = Identity.kept_at(folder / "key.pem")
    transport = open_transport(url, identity, folder)
    manifest = find_run(transport)
    assert manifest is not None, "no run here"
    recipe = manifest.recipe()
    method = method_of(manifest.settings, recipe, manifest.layout)
    peer = Peer(
        transport,
        identity,
        manifest,
        method,
        recipe.swarm,
        folder,
        **terms_of(recipe, manifest.settings, method, recipe.training.steps),
        name="mallory",
    )
    agreed = peer.start()
    while peer.round < recipe.training.steps // manifest.settings.inner_steps:
        weights = agreed.weights + 1e-3 * torch.randn(method.layout.count)
        part = take(weights, method.fragment(peer.round))
        peer.offer(part, tokens=8 * 128 * 15, steps=15, loss=2.0)
        outcome = peer.outcome(wait=60.0)
        if outcome is None:
            break
        agreed = outcome.after
    peer.leave()
    peer.close()
    transport.close()


if __name__ == "__main__":
    main()

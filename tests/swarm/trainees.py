"""What methods are tried on: peers of a few weights, exact ones and ones that learn."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.swarm.layout import Layout


class Exact:
    """SGD at rate 1 on gradients of few bits: no sum of them is ever rounded in fp32.

    So identities that hold in real numbers must hold bit for bit. `moved` is the sum of all steps.
    """

    def __init__(self, layout: Layout, seed: int, tokens: int = 1) -> None:
        self.layout, self.seed, self.tokens = layout, seed, tokens
        self.values = torch.zeros(layout.count)
        self.moved = torch.zeros(layout.count)

    def load(self, weights: Tensor) -> None:
        self.values = weights.clone()

    def weights(self) -> Tensor:
        return self.values.clone()

    def train(self, step: int) -> int:
        gradient, tokens = self.gradient(step)
        self.values = self.values - gradient
        self.moved = self.moved + gradient
        return tokens

    def gradient(self, step: int) -> tuple[Tensor, int]:
        """Multiples of 1/64 below 1, never 0, that depend on weights, step and peer."""
        noise = torch.Generator().manual_seed(1000 * self.seed + step)
        target = torch.randn(self.layout.count, generator=noise)
        return (torch.tanh(self.values - target) * 31).round().mul(2).add(1).div(64), self.tokens


class Learner:
    """A small network under AdamW, each peer with data of its own."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(0)
        # Names like a decoder's, so that fragments find layers.
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.model = nn.ModuleDict({"embed": nn.Linear(8, 16), "layers": self.layers})
        self.model["head"] = nn.Linear(16, 1)
        self.named = dict(self.model.named_parameters())
        self.layout = Layout.of(self.named)
        self.optimizer = torch.optim.AdamW(self.named.values(), 1e-2)
        self.seed = seed

    def load(self, weights: Tensor) -> None:
        parts = self.layout.unflatten(weights)
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(parts[name])

    def weights(self) -> Tensor:
        return self.layout.flatten(self.named)

    def train(self, step: int) -> int:
        self.loss(step).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return 32

    def gradient(self, step: int) -> tuple[Tensor, int]:
        found = torch.autograd.grad(self.loss(step), list(self.named.values()))
        return self.layout.flatten(dict(zip(self.named, found, strict=True))), 32

    def loss(self, step: int) -> Tensor:
        """Of a batch that depends on the step and the peer."""
        draws = torch.Generator().manual_seed(1000 * self.seed + step)
        inputs = torch.randn(32, 8, generator=draws)
        hidden = self.model["embed"](inputs)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        wanted = inputs[:, :1] * inputs[:, 1:2] + inputs[:, 2:3]
        return (self.model["head"](hidden) - wanted).square().mean()

    def save(self) -> bytes:
        """All that a checkpoint of this peer's training has."""
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict()], file)
        return file.getvalue()

    def restore(self, data: bytes) -> None:
        model, optimizer = torch.load(io.BytesIO(data))
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)


def pickled(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it comes back from a disk."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=False)
    return found

"""What runs on the ranks of multi-process checkpoint tests: a tiny model, spread in several ways.

Its sizes divide by nothing, so shards are uneven and some are empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainwright.checkpoint.state import load_training_state, model_state, training_tensors
from trainwright.checkpoint.store import CheckpointStore
from trainwright.optim.muon import Muon

SEED = 5


class Tiny(nn.Module):
    """Embedding, two blocks with dropout, and a head tied to the embedding."""

    def __init__(self, width: int = 6, hidden: int = 10, vocabulary: int = 17) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, hidden) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("counts", torch.arange(3.0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)
        self.scale = nn.Parameter(torch.ones(3))  # fewer elements than some worlds have ranks
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(x))) * self.scale.sum())


def build(layout: str, seed: int = SEED) -> nn.Module:
    """`Tiny`, the same for a seed however it is spread: plain, ddp, fsdp or hsdp."""
    torch.manual_seed(seed)
    model = Tiny()
    size = dist.get_world_size() if dist.is_initialized() else 1
    if layout == "ddp":
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_average)
    if layout in ("fsdp", "hsdp"):
        shape, names = ((size,), ("shard",)) if layout == "fsdp" else ((2, size // 2), ("r", "s"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def _average(parameter: Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def build_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "layers." in name]
    rest = [p for name, p in named if not (p.ndim == 2 and "layers." in name)]
    return [
        Muon(matrices, lr=0.01, dtype=torch.float32),
        torch.optim.AdamW(rest, lr=0.01, fused=True),
    ]


def train(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], first: int, last: int
) -> None:
    """Steps first…last-1; a step's batch follows from its number, dropout from the generators."""
    for step in range(first, last):
        ids = torch.randint(0, 17, (2, 5), generator=torch.Generator().manual_seed(step))
        logits = model(ids)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def whole(tensors: dict) -> dict[str, np.ndarray]:
    """Global values, as arrays."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        .detach()
        .numpy()
        .copy()
        for name, tensor in tensors.items()
    }


def trained_and_saved(
    layout: str, root: Path, steps: int, asynchronous: bool
) -> dict[str, np.ndarray]:
    """Train, save as step `steps`, and return all that was saved of model and optimizers."""
    model = build(layout)
    optimizers = build_optimizers(model)
    train(model, optimizers, 0, steps)
    tensors = training_tensors(model, optimizers)
    with CheckpointStore(root) as store:
        store.save(steps, tensors, {"layout": layout}, asynchronous=asynchronous)
    return whole({name: t for name, t in tensors.items() if not name.startswith("rng")})


def loaded(layout: str, root: Path, step: int) -> dict[str, np.ndarray]:
    """Load a step into a model of other weights and fresh optimizers; model and optimizers."""
    model = build(layout, seed=SEED + 1)
    optimizers = build_optimizers(model)
    load_training_state(CheckpointStore(root), step, model, optimizers)
    tensors = training_tensors(model, optimizers)
    return whole({name: t for name, t in tensors.items() if not name.startswith("rng")})


def trained_through(layout: str, steps: int) -> dict[str, np.ndarray]:
    """The model after `steps` steps without a break."""
    model = build(layout)
    optimizers = build_optimizers(model)
    torch.manual_seed(SEED)
    train(model, optimizers, 0, steps)
    return whole(model_state(model))


def trained_with_a_break(layout: str, root: Path, steps: int) -> dict[str, np.ndarray]:
    """The same with all of it forgotten, loaded and gone on with at half the way."""
    model = build(layout)
    optimizers = build_optimizers(model)
    torch.manual_seed(SEED)
    train(model, optimizers, 0, steps // 2)
    with CheckpointStore(root) as store:
        store.save(steps // 2, training_tensors(model, optimizers), {})
        train(model, optimizers, steps // 2, steps // 2 + 3)  # must not leak into what was saved
    model = build(layout, seed=SEED + 1)
    optimizers = build_optimizers(model)
    torch.rand(99)
    load_training_state(CheckpointStore(root), steps // 2, model, optimizers)
    train(model, optimizers, steps // 2, steps)
    return whole(model_state(model))

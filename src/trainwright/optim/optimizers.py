"""From the recipe's `optimizer:` to optimizers over a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from trainwright.errors import UserError
from trainwright.optim.muon import Muon
from trainwright.recipe.schema import Optimizer as OptimizerSection

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def build_optimizers(
    parameters: NamedParameters,
    section: OptimizerSection,
    *,
    muon_dtype: torch.dtype,
    replicas: dist.ProcessGroup | None = None,
) -> list[torch.optim.Optimizer]:
    """Optimizers that together update every parameter that requires a gradient.

    Vectors (norms, biases) get no weight decay. Under `muon`, the matrices inside the blocks
    (names with `.layers.`) are Muon's; embeddings, head and vectors stay with AdamW. `replicas`
    are the workers that hold the same whole parameters, if any.
    """
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    if section.name != "muon":
        return [_adamw([p for _, p in trained], section)]
    matrices = [p for name, p in trained if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in trained if not (p.ndim == 2 and ".layers." in name)]
    muon = Muon(
        matrices,
        lr=section.learning_rate,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        dtype=muon_dtype,
        replicas=replicas,
    )
    return [muon, _adamw(rest, section)]


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], value: float) -> None:
    """Set the learning rate of every parameter group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):  # torchao keeps it in a tensor
                group["lr"].fill_(value)
            else:
                group["lr"] = value


def _adamw(parameters: list[nn.Parameter], section: OptimizerSection) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if section.name == "adamw-8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise UserError(
                "optimizer.name: adamw-8bit needs the package torchao",
                fix="pip install 'trainwright[quant]', or choose optimizer.name: adamw",
            ) from error
        return AdamW8bit(groups, lr=section.learning_rate, betas=section.betas, eps=section.eps)
    return torch.optim.AdamW(
        groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=True
    )

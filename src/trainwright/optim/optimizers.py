"""From the recipe's `optimizer:` to optimizers over a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from trainwright.errors import Mistake, UserError
from trainwright.optim.muon import Muon
from trainwright.recipe.schema import Optimizer as OptimizerSection


def build_optimizers(
    parameters: Iterable[nn.Parameter],
    section: OptimizerSection,
    *,
    in_blocks: Iterable[nn.Parameter] = (),
    muon_dtype: torch.dtype,
    replicas: dist.ProcessGroup | None = None,
) -> list[torch.optim.Optimizer]:
    """Optimizers that together update every parameter that requires a gradient.

    Vectors (norms, biases) get no weight decay. Under `muon`, the matrices inside the blocks
    (those of `in_blocks`) are Muon's; embeddings, head and vectors stay with AdamW. `replicas`
    are the workers that hold the same whole parameters, if any. Raises UserError for `muon` where
    there is no such matrix, and for `adamw-8bit` without torchao.
    """
    trained = [p for p in parameters if p.requires_grad]
    if section.name != "muon":
        return [_adamw(trained, section)]
    inside = {id(p) for p in in_blocks if p.ndim == 2}
    matrices = [p for p in trained if id(p) in inside]
    rest = [p for p in trained if id(p) not in inside]
    if not matrices:
        raise UserError(
            Mistake(
                "muon updates the matrices of a model's blocks, and this model has none to train",
                fix="write `optimizer: adamw`",
                key="optimizer.name",
            )
        )
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

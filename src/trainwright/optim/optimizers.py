"""From the recipe's `optimizer:` to optimizers over a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from trainwright.errors import Mistake, UserError
from trainwright.optim.muon import Muon, Whole
from trainwright.optim.offload import OffloadedOptimizer, on_host, whole_on_host
from trainwright.optim.paged import PagedAdamW
from trainwright.recipe.schema import Optimizer as OptimizerSection

NO_FACTORS: Mapping[nn.Parameter, float] = {}


def build_optimizers(
    parameters: Iterable[nn.Parameter],
    section: OptimizerSection,
    *,
    in_blocks: Iterable[nn.Parameter] = (),
    muon_dtype: torch.dtype,
    replicas: dist.ProcessGroup | None = None,
    whole: Whole | None = None,
    offload: bool = False,
    factors: Mapping[nn.Parameter, float] = NO_FACTORS,
) -> list[torch.optim.Optimizer]:
    """Optimizers that together update every parameter that requires a gradient.

    Vectors (norms, biases) get no weight decay. Under `muon`, the matrices inside the blocks
    (those of `in_blocks`, stacks of experts among them) are Muon's; embeddings, head and vectors
    stay with AdamW. `replicas` are the workers that hold the same parameters, if any, and `whole`
    knows those that are parts of larger matrices. With `offload`, states and updates are on the
    host. `factors` multiply the learning rate of parameters that they name (LoRA+), for AdamW.
    Raises UserError for `muon` where there is no such matrix, and for 8-bit and paged states
    without the packages that make them.
    """
    trained = [p for p in parameters if p.requires_grad]
    if offload:
        copies = on_host(trained)
        inside = {id(p) for p in in_blocks}
        inner = build_optimizers(
            copies.values(),
            section,
            in_blocks=[copy for p, copy in copies.items() if id(p) in inside],
            muon_dtype=muon_dtype,
            replicas=replicas,
            whole=None if whole is None else whole_on_host(whole, copies),
            factors={copies[p]: factor for p, factor in factors.items()},
        )
        return [OffloadedOptimizer(optimizer, copies) for optimizer in inner]
    if section.name != "muon":
        return [_adamw(trained, section, factors)]
    inside = {id(p) for p in in_blocks if p.ndim in (2, 3)}
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
        whole=whole,
    )
    return [muon, *([_adamw(rest, section, factors)] if rest else [])]


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], value: float) -> None:
    """Set the learning rate of every parameter group, times its factor where it has one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            own = value * group.get("factor", 1.0)
            if isinstance(group["lr"], torch.Tensor):  # torchao keeps it in a tensor
                group["lr"].fill_(own)
            else:
                group["lr"] = own


def _adamw(
    parameters: list[nn.Parameter],
    section: OptimizerSection,
    factors: Mapping[nn.Parameter, float],
) -> torch.optim.Optimizer:
    # Fused kernels take DTensors of one mesh, or plain tensors: experts have a mesh of their own.
    by_kind: dict[tuple, list[nn.Parameter]] = {}
    for p in parameters:
        mesh = p.device_mesh if isinstance(p, DTensor) else None
        by_kind.setdefault((p.ndim < 2, mesh, factors.get(p, 1.0)), []).append(p)
    groups = [
        {
            "params": members,
            "weight_decay": 0.0 if vectors else section.weight_decay,
            "factor": factor,
        }
        for (vectors, _, factor), members in by_kind.items()
    ]
    if section.is_paged:
        bits = 8 if section.name == "paged-adamw-8bit" else 32
        rate, betas, eps = section.learning_rate, section.betas, section.eps
        return PagedAdamW(groups, rate, betas, eps, bits=bits)
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

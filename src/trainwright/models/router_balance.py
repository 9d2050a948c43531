"""Keeping experts evenly loaded: losses on the router, biases against the load, and the figures.

Every router observes its own choices. Its losses join the backward pass where its weights do, so
that they need no way to the objective: through pipelines, micro-batches and recomputation alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainwright.kernels.recomputing import is_recomputing


class RouterBalance:
    """What one router's choices cost and count.

    Losses, as sums like every objective's (their mean over tokens is what a coefficient weighs):
    - `balance_loss` (Fedus et al. 2021, arXiv:2101.03961, eq. 4): for each row of the batch
      tokens · E · Σᵢ fᵢ Pᵢ, with fᵢ the row's picks of expert i and Pᵢ the sum of its shares of
      the router's probability, both divided by the row's tokens.
    - `z_loss` (Zoph et al. 2022, arXiv:2202.08906, eq. 5): Σ over tokens of log²Σ exp(logits).

    `scale`, set for each step, is what the step multiplies the objective's loss sum by: the loss
    scale over the weight of the global batch. 0, as outside of training, leaves the losses out.
    `columns` joins the workers that have other columns of the same rows, `copies` counts those
    that see the same tokens, each of which contributes its share.
    """

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.balance_loss = self.z_loss = 0.0
        self.scale = 0.0
        self.columns: dist.ProcessGroup | None = None
        self.copies = 1
        self.load: Tensor | None = None  # int64 [experts]: picks since they were last taken
        self.cost: Tensor | None = None  # the balance loss's sum, without its coefficient
        self.tokens = 0

    @torch.compiler.disable
    def observe(self, logits: Tensor, shares: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """`weights` with the losses attached to their gradient; counts what was chosen.

        logits and shares [batch, sequence, experts] in fp32; chosen and weights [batch, sequence,
        per_token].
        """
        if not torch.is_grad_enabled():
            return weights
        picks = _count_by_row(chosen, self.experts)
        counted = not is_recomputing()
        if counted:
            self._count("load", picks.sum(0))
            self.tokens += chosen.shape[0] * chosen.shape[1]
        loss = None
        if self.balance_loss:
            tokens = chosen.shape[1]
            if self.columns is not None:
                dist.all_reduce(picks, group=self.columns)
                tokens *= dist.get_world_size(self.columns)
            cost = (picks * shares.sum(1)).sum() * (self.experts / tokens)
            if counted:
                self._count("cost", cost.detach())
            loss = cost * self.balance_loss
        if self.z_loss:
            spread = torch.logsumexp(logits, -1).square().sum() * self.z_loss
            loss = spread if loss is None else loss + spread
        if loss is None or not self.scale:
            return weights
        return _Attach.apply(weights, loss * (self.scale / self.copies))

    def _count(self, name: str, value: Tensor) -> None:
        known = getattr(self, name)
        setattr(self, name, value if known is None else known + value)


class _Attach(torch.autograd.Function):
    """The first argument as it is; the backward pass starts one of the second as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        [loss] = ctx.saved_tensors
        return gradients[0], torch.ones_like(loss)


def _count_by_row(chosen: Tensor, experts: int) -> Tensor:
    """How often each row [batch, …] picks each expert: int64 [batch, experts]."""
    picks = chosen.flatten(1)
    counts = torch.zeros(len(picks), experts, dtype=torch.int64, device=picks.device)
    return counts.scatter_add_(1, picks, torch.ones_like(picks))


@dataclass(frozen=True)
class RouterLoads:
    """How often each expert was picked in one step, over the whole global batch.

    `routers` are those of this worker's layers; loads int64 [routers, experts]; costs [routers],
    the balance losses without coefficient, a token, NaN where there is no such loss.
    """

    routers: Sequence[nn.Module]
    loads: Tensor
    costs: Tensor


def balances(parts: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, RouterBalance]]:
    """The routers of `parts`, this worker's stages, each with its balance."""
    for part in parts:
        for module in part.modules():
            balance = getattr(module, "balance", None)
            if isinstance(balance, RouterBalance):
                yield module, balance


def set_router_losses(
    parts: Iterable[nn.Module],
    *,
    balance_loss: float,
    z_loss: float,
    columns: dist.ProcessGroup | None = None,
    copies: int = 1,
) -> None:
    """Give every router its losses' coefficients, once the model is spread.

    `columns` is the group of context parallelism, `copies` the degree of tensor parallelism.
    """
    for _, balance in balances(parts):
        balance.balance_loss, balance.z_loss = balance_loss, z_loss
        balance.columns, balance.copies = columns, copies


def set_router_scale(parts: Iterable[nn.Module], scale: float) -> None:
    """What the coming step multiplies its loss sums by; 0 leaves the routers' losses out."""
    for _, balance in balances(parts):
        balance.scale = scale


def take_router_loads(
    parts: Iterable[nn.Module], group: dist.ProcessGroup | None = None
) -> RouterLoads:
    """The step's loads, summed over `group`: all workers that have other tokens.

    The routers begin to count anew. One all-reduce where there are experts and a group.
    """
    parts = list(parts)
    found = list(balances(parts))
    # Where the router computes; its weights may rest on the host.
    devices = [balance.load.device for _, balance in found if balance.load is not None]
    device = devices[0] if devices else next(parts[0].parameters()).device
    if not found:
        nothing = torch.zeros(0, 0, dtype=torch.int64, device=device)
        return RouterLoads((), nothing, nothing.new_zeros(0, dtype=torch.float64))
    rows = []
    for _, balance in found:
        load = balance.load
        cost = torch.full((1,), torch.nan, device=device) if balance.balance_loss else None
        if balance.cost is not None:
            cost = balance.cost.reshape(1)
        figures = [
            torch.zeros(balance.experts, device=device) if load is None else load,
            torch.zeros(1, device=device) if cost is None else cost,
            torch.full((1,), balance.tokens, device=device),
        ]
        rows.append(torch.cat([each.to(torch.float64) for each in figures]))
        balance.load, balance.cost, balance.tokens = None, None, 0
    table = torch.stack(rows)  # counts are exact in fp64 up to 2⁵³
    if group is not None:
        dist.all_reduce(table, group=group)
    has_loss = torch.tensor([bool(balance.balance_loss) for _, balance in found], device=device)
    costs = torch.where(has_loss, table[:, -2] / table[:, -1].clamp(min=1), torch.nan)
    return RouterLoads([router for router, _ in found], table[:, :-2].to(torch.int64), costs)


@torch.no_grad()
def update_router_biases(loads: RouterLoads, rate: float) -> None:
    """Move the correction biases against the step's loads; call it after the optimizer's step.

    Auxiliary-loss-free balancing (Wang et al. 2024, arXiv:2408.15664): up by `rate` for experts
    picked less often than the mean, down for those picked more often. Routers without biases stay.
    """
    for router, load in zip(loads.routers, loads.loads.to(torch.float64), strict=True):
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is not None:
            bias += rate * torch.sign(load.mean() - load).to(bias.dtype)


def router_metrics(loads: RouterLoads, stages: dist.ProcessGroup | None = None) -> dict[str, float]:
    """A step's figures over all layers; empty for a model without experts.

    `expert_load_worst`: the busiest expert's load over the mean load, in the layer where that is
    largest; `expert_load_mean`: the same ratio averaged over layers; `tokens_dropped`: 0, as there
    is no capacity; `balance_loss`: a token's, averaged over layers, without its coefficient, where
    there is one. `stages` joins the workers that have other layers; every one of them calls.
    """
    counts = loads.loads.to(torch.float64)
    ratios = counts.amax(1) / counts.mean(1).clamp(min=1e-9) if len(counts) else counts.new_zeros(0)
    has_loss = ~loads.costs.isnan()
    sums = torch.stack(
        [
            torch.tensor(float(len(ratios)), dtype=torch.float64, device=counts.device),
            ratios.sum(),
            has_loss.sum().to(torch.float64),
            loads.costs[has_loss].sum(),
        ]
    )
    worst = ratios.max() if len(ratios) else counts.new_zeros(())
    if stages is not None:
        dist.all_reduce(sums, group=stages)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=stages)
    layers, total, costed, cost = sums.tolist()
    if not layers:
        return {}
    metrics = {
        "expert_load_worst": float(worst),
        "expert_load_mean": total / layers,
        "tokens_dropped": 0.0,
    }
    if costed:
        metrics["balance_loss"] = cost / costed
    return metrics

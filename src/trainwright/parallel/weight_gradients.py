"""Weight gradients that wait: the split backward pass of zero-bubble schedules.

A backward pass has two results: the gradient of a stage's input, which the stage before waits for,
and those of its weights, which nobody waits for until the optimizer. Here the products that make
the latter are put into a queue while the former is computed, and run when the schedule says so
(Qi et al. 2023, "Zero Bubble Pipeline Parallelism").

Only `nn.Linear` is split: that is where nearly all of the work is. Norms, embeddings, experts and
the output head have their weight gradients with the input's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainwright.models.adapter_spec import BESIDE


class WeightQueue:
    """Products that are still to be run, of one backward pass through one stage."""

    def __init__(self) -> None:
        self._waiting: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, linear: nn.Linear, x: Tensor, gradient: Tensor) -> None:
        """Keep what a layer saw, [tokens, in], and its output's gradient, [tokens, out]."""
        self._waiting.append((linear, x, gradient))

    @torch.no_grad()
    def run(self) -> None:
        """Add the weights' gradients to `.grad`, as a backward pass would, and forget the inputs.

        They go to the parameters that the layers have now: under FSDP these are the gathered ones,
        which must not have been given back since. Hooks on gradients do not see them arrive.
        """
        while self._waiting:
            linear, x, gradient = self._waiting.pop()
            if linear.weight.requires_grad:
                _accumulate(linear.weight, gradient.t() @ x)
            if linear.bias is not None and linear.bias.requires_grad:
                _accumulate(linear.bias, gradient.sum(0))


_open: WeightQueue | None = None  # where backward passes put their products now


@contextmanager
def deferred() -> Iterator[WeightQueue]:
    """Backward passes within put the split layers' weight gradients into the queue given."""
    global _open
    previous, _open = _open, WeightQueue()
    try:
        yield _open
    finally:
        _open = previous


def defer_weight_gradients(module: nn.Module) -> None:
    """Make every `nn.Linear` in `module` able to wait; without `deferred` nothing changes.

    The forward is replaced on the instance, so that names stay what they are. What a subclass
    computes is its own, as is what a layer does that an adapter replaces whole; both are left
    alone. Raises ValueError where a forward was replaced already:
    what else changes a layer comes after this, around it.
    """
    for name, linear in module.named_modules():
        if type(linear) is not nn.Linear or hasattr(linear, BESIDE):
            continue
        if "forward" in vars(linear):
            raise ValueError(f"{name} has a forward of its own, which would be lost")
        linear.forward = partial(_forward, linear)  # type: ignore[method-assign]


def _forward(linear: nn.Linear, x: Tensor) -> Tensor:
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x = x.to(dtype)
    else:
        dtype = linear.weight.dtype
    return _SplitLinear.apply(x, linear.weight, linear.bias, linear, dtype)


class _SplitLinear(torch.autograd.Function):
    """A linear layer whose weight gradient may come later.

    Weights are narrowed here instead of by autocast, whose copies would be held for every
    micro-batch that is under way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        linear: nn.Linear,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.linear = linear
        narrow = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight.to(dtype), narrow)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
        with torch.autocast(gradient.device.type, enabled=False):
            to_input = gradient @ weight.to(gradient.dtype) if of_input else None
            if not (of_weight or of_bias):
                return to_input, None, None, None, None
            rows, seen = gradient.flatten(0, -2), x.flatten(0, -2)
            if _open is not None:
                _open.add(ctx.linear, seen, rows)
                return to_input, None, None, None, None
            to_weight = (rows.t() @ seen).to(weight.dtype) if of_weight else None
            to_bias = rows.sum(0).to(weight.dtype) if of_bias else None
        return to_input, to_weight, to_bias, None, None


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad += gradient

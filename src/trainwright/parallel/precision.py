"""Precision policies: fp32 weights and states throughout, products in fp32, bf16 or fp16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

from trainwright.planner.plan import Plan

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Where replicated fp32 weights are narrowed for products; nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, COMPUTE_DTYPES[precision])


def sharded_policy(precision: str) -> MixedPrecisionPolicy:
    """The same for sharded weights: gathered in the narrow type, gradients reduced in fp32."""
    if precision == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=COMPUTE_DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def offload_policy(plan: Plan, device: torch.device) -> OffloadPolicy:
    """Where shards rest between their uses: on the host if the plan offloads parameters."""
    if plan.offload != "parameters":
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=device.type == "cuda")


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018): ×2 after 2,000 steps, ÷2 on Inf.

    Other precisions keep a scale of 1, and every step of theirs counts.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, precision: str) -> None:
        self.dynamic = precision == "fp16"
        self.value = 65536.0 if self.dynamic else 1.0
        self.good_steps = 0

    def update(self, finite: bool) -> None:
        """Adjust after a step whose gradients were finite, or were not."""
        if not self.dynamic:
            return
        if not finite:
            self.value, self.good_steps = self.value / 2, 0
            return
        self.good_steps += 1
        if self.good_steps == self.GROWTH_INTERVAL:
            self.value, self.good_steps = self.value * 2, 0

    @property
    def exhausted(self) -> bool:
        """Whether no scale can help: the gradients overflow even unscaled."""
        return self.value < 1.0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": self.value, "good_steps": self.good_steps}

    def restore(self, state: dict[str, float]) -> None:
        """Take up `state()` again."""
        self.value, self.good_steps = float(state["value"]), int(state["good_steps"])


def is_finite(*values: Tensor) -> bool:
    """Whether all scalars are finite, with one wait for the device."""
    return bool(torch.isfinite(torch.stack([value.detach().float() for value in values])).all())

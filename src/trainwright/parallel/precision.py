"""Precision policies: fp32 weights and states, products in fp32, bf16, fp16 or float8."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

from trainwright.errors import Mistake, UserError
from trainwright.planner.plan import Plan

# What products run in; under float8 this is what they read and write, and others run in.
COMPUTE_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float8": torch.bfloat16,
}
_FLOAT8_CAPABILITY = (8, 9)  # Ada; Hopper is (9, 0)
_FLOAT8_MULTIPLE = 16  # what the kernels ask of every side of a matrix


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


def convert_to_float8(
    blocks: Iterable[nn.Module], device: torch.device, *, cuts: int = 1, emulate: bool = False
) -> None:
    """Make the blocks' linear layers multiply in float8, forward and backward, by torchao.

    Each tensor is scaled by its largest magnitude as it is used (Micikevicius et al. 2022, "FP8
    formats for deep learning": e4m3 forward, e5m2 for gradients). Sides that are no multiple of
    16, routers (whose choices small errors change) and stacks of experts stay in bf16. Parameters
    keep their names. To be called first, before anything replaces a layer's forward, for matrices
    that will then be cut in `cuts`. `emulate` computes the same numbers anywhere, slowly. Raises
    UserError where `device` cannot or torchao is missing.
    """
    if not emulate and not has_float8(device):
        raise UserError(
            Mistake(
                f"precision float8 needs a GPU of compute capability 8.9 or above, and {device} is "
                "none",
                fix="write `precision: bf16`",
                key="training.precision",
            )
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError(
            Mistake(
                "precision float8 needs the package torchao",
                fix="pip install 'trainwright[quant]', or write `precision: bf16`",
                key="training.precision",
            )
        ) from error
    for block in blocks:
        convert_to_float8_training(
            block,
            module_filter_fn=partial(_runs_in_float8, _FLOAT8_MULTIPLE * cuts),
            config=Float8LinearConfig(emulate=emulate),
        )


def has_float8(device: torch.device) -> bool:
    """Whether the device multiplies float8 matrices."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= _FLOAT8_CAPABILITY


def _runs_in_float8(multiple: int, module: nn.Module, name: str) -> bool:
    if not isinstance(module, nn.Linear) or name.endswith(("gate", "router")):
        return False
    return all(side % multiple == 0 for side in module.weight.shape)


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

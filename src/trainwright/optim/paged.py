"""AdamW whose state is paged: unified memory, which CUDA moves to the host where the GPU is full.

Dettmers et al. 2023, "QLoRA" (arXiv:2305.14314), section 3. Memory and kernels are bitsandbytes',
the state's names and its layout torch's and torchao's, so that checkpoints are those of the
optimizers without pages. On a CPU there is nothing to page, and the state is plain.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trainwright.comm.local import local
from trainwright.errors import Mistake, UserError
from trainwright.optim.offload import as_part_of

# As bitsandbytes has them: what is smaller is not quantised, and lies on the device.
_BLOCK, _LEAST_QUANTISED, _LEAST_PAGED = 256, 4096, 100_000


class PagedAdamW(torch.optim.Optimizer):
    """AdamW with moments of 32 or 8 `bits` in paged memory, over the own parts of parameters.

    8-bit moments are scaled by blocks of 256 elements (Dettmers et al. 2022, arXiv:2110.02861).
    Raises UserError without bitsandbytes, or with 8 bits without torchao.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bits: int = 32,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        try:
            import bitsandbytes.functional as kernels

            if bits == 8:
                import torchao.optim  # noqa: F401
        except ImportError as error:
            name = "paged-adamw" if bits == 32 else "paged-adamw-8bit"
            what = f"`{name}` needs the package {(error.name or '').partition('.')[0]}"
            fix = "`pip install 'trainwright[quant]'`, or write `name: adamw`"
            raise UserError(Mistake(what, fix, key="optimizer.name")) from error
        self.kernels: Any = kernels
        self.bits = bits

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        paged = False
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = self._moment(parameter, signed=True)
                    state["exp_avg_sq"] = self._moment(parameter, signed=False)
                state["step"] += 1
                paged |= self._update(parameter, state, group)
        if paged:  # kernels are still at work in memory that the host may read
            torch.cuda.synchronize()

    def _update(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> bool:
        """Bring a parameter and its state a step on; whether the state is paged."""
        own = local(parameter)
        assert parameter.grad is not None
        if not own.numel():  # fewer rows than workers; a kernel cannot be launched on nothing
            return False
        weight, gradient = own.contiguous(), local(parameter.grad).contiguous()
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        eps, rate, decay = group["eps"], group["lr"], group["weight_decay"]
        first: Any = local(state["exp_avg"])
        second: Any = local(state["exp_avg_sq"])
        quantised = self._is_quantised(own)
        values = [first.codes, second.codes] if quantised else [first, second]
        paged = [value for value in values if getattr(value, "is_paged", False)]
        for value in paged:
            self.kernels.prefetch_tensor(value)
        if quantised:
            tables = (first.qmap, second.qmap, first.scale, second.scale)
            self.kernels.optimizer_update_8bit_blockwise(
                *("adam", gradient, weight, *values, beta1, beta2, 0.0, 0.0, eps, step, rate),
                *(*tables, decay),
            )
        else:
            self.kernels.optimizer_update_32bit(
                *("adam", gradient, weight, first, beta1, eps, step, rate, second, beta2),
                weight_decay=decay,
            )
        if weight is not own:
            own.copy_(weight)
        return bool(paged)

    def _is_quantised(self, own: Tensor) -> bool:
        return self.bits == 8 and own.numel() >= _LEAST_QUANTISED and own.numel() % _BLOCK == 0

    def _moment(self, parameter: Tensor, *, signed: bool) -> Tensor:
        """Zeros for a parameter's moment, the same part of a whole as the parameter."""
        own = local(parameter)
        if not self._is_quantised(own):
            return as_part_of(parameter, self._zeros(own, torch.float32))
        from torchao.optim.subclass_8bit import OptimState8bit

        codes, scale = self._zeros(own, torch.uint8), own.new_zeros(own.numel() // _BLOCK)
        table = self.kernels.create_dynamic_map(signed=signed).to(own.device)
        return as_part_of(parameter, OptimState8bit(codes, scale, table, signed, own.dtype))

    def _zeros(self, own: Tensor, dtype: torch.dtype) -> Tensor:
        if own.device.type != "cuda" or own.numel() < _LEAST_PAGED:
            return torch.zeros_like(own, dtype=dtype)
        pages = self.kernels.get_paged(*own.shape, dtype=dtype, device=own.device)
        self.kernels.fill(pages, 0)
        return pages

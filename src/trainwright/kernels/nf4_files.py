"""NF4 tensors as bitsandbytes stores them, beside the weight's own name.

`weight` holds the bytes [bytes, 1]; `weight.absmax` the scales, `weight.quant_map` the 16 levels;
`weight.nested_absmax` and `weight.nested_quant_map` the groups and the 256 levels of scales that
are quantised too; `weight.quant_state.bitsandbytes__nf4` is JSON: shape, blocks, type, offset.
transformers reads and writes these, and so does PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainwright.kernels.nf4 import BLOCK, GROUP, LEVELS, NF4, dequantise_scales, scale_levels

STATE = "quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)


def to_bitsandbytes(weight: NF4, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a weight called `name` ("model.layers.0.mlp.up_proj.weight"), by their names.

    dtype is what the weight is unpacked to: that of the tensor it was made from.
    """
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": _dtype_name(dtype),
        "shape": list(weight.shape),
    }
    tensors = {"absmax": weight.scales, "quant_map": _levels(weight.scales.device)}
    if weight.groups is not None and weight.offset is not None:
        state |= {
            "nested_blocksize": GROUP,
            "nested_dtype": "float32",
            "nested_offset": weight.offset.item(),
        }
        tensors["nested_absmax"] = weight.groups
        tensors["nested_quant_map"] = scale_levels(weight.scales.device).clone()
    text = bytearray(json.dumps(state).encode())
    tensors[STATE] = torch.frombuffer(text, dtype=torch.uint8)
    parts = {f"{name}.{part}": tensor for part, tensor in tensors.items()}
    return {name: weight.packed.view(-1, 1), **parts}


def from_bitsandbytes(tensors: Mapping[str, Tensor], name: str) -> tuple[NF4, torch.dtype]:
    """The weight called `name` among `tensors`, and the type that it was made from.

    Raises ValueError, to be read after the name, for what is missing or no NF4 in blocks of 64.
    """
    missing = [part for part in (STATE, "absmax", "quant_map") if f"{name}.{part}" not in tensors]
    if missing or name not in tensors:
        raise ValueError(f"lacks {', '.join(missing) or 'its bytes'}")
    state = _read_state(tensors[f"{name}.{STATE}"])
    packed, scales = tensors[name], tensors[f"{name}.absmax"]
    if not torch.equal(tensors[f"{name}.quant_map"].cpu(), _levels(torch.device("cpu"))):
        raise ValueError("has other levels than NF4's")
    shape = tuple(state["shape"])
    values = int(torch.Size(shape).numel())
    if packed.dtype != torch.uint8:  # bytes kept as another type, as FSDP's first version needs
        packed = packed.contiguous().view(torch.uint8)
    if packed.numel() != -(-values // 2) or scales.numel() != -(-values // BLOCK):
        raise ValueError(f"has {packed.numel()} bytes and {scales.numel()} scales for {shape}")
    dtype = getattr(torch, state["dtype"])
    packed = packed.reshape(-1)
    if "nested_offset" not in state:
        return NF4(packed, scales.float(), shape), dtype
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=scales.device)
    groups = tensors.get(f"{name}.nested_absmax")
    levels = tensors.get(f"{name}.nested_quant_map")
    if groups is None or levels is None or state["nested_blocksize"] != GROUP:
        raise ValueError(f"has scales that are not quantised in groups of {GROUP}")
    if torch.equal(levels, scale_levels(levels.device)):
        return NF4(packed, scales, shape, groups, offset), dtype
    # Old versions changed the lowest level as they ran: such scales are kept plain, and exact.
    return NF4(packed, dequantise_scales(scales, groups, offset, levels), shape), dtype


def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_state(tensor: Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(tensor.cpu().tolist()))
        kind, block, shape, dtype = (
            state[key] for key in ("quant_type", "blocksize", "shape", "dtype")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"has a {STATE} that cannot be read: {error!r}") from error
    if kind != "nf4" or block != BLOCK:
        raise ValueError(f"is {kind} in blocks of {block}; only nf4 in blocks of {BLOCK} is read")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"stands for values of type {dtype}")
    if not isinstance(shape, list) or not all(isinstance(side, int) for side in shape):
        raise ValueError(f"has the shape {shape}")
    return state

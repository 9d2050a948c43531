"""NF4: weights as 4-bit NormalFloats (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

Bytes, scales and values are bitsandbytes' own, bit for bit, so that either reads what the other
wrote. A tensor is cut into blocks of 64 values in the order in which they lie. Each block is
divided by its largest magnitude, the scale, and every value becomes the nearest of 16 levels; of
two that are equally near the lower one. Two make a byte, the first in its high half: 4.5 bits a
value. Scales may be quantised once more, to 8 bits: 4.127 bits a value.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from trainwright.kernels.frozen_linear import frozen_linear

BLOCK = 64  # values that share a scale
GROUP = 256  # scales that share a scale of their own, where they are quantised too

# Quantiles of the normal distribution, with 0 and both ends among them (the paper's appendix E).
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_GRID = 65536  # positions to which scales are rounded before their levels are looked up
_CELLS = 256  # [-1, 1] cut so finely that no two midpoints between levels share a cell
_SMALLEST = 1e-38  # what a scale of 0 is taken for where values are divided by it
_CHUNK = 1 << 20  # values at a time: temporaries stay in a CPU's caches


@dataclass(frozen=True)
class NF4:
    """A tensor in NF4.

    packed uint8 [⌈values / 2⌉]. scales of the blocks: fp32 [⌈values / 64⌉], or, quantised again,
    uint8 numbers of `scale_levels`, which stand for level · group + offset with groups fp32
    [⌈scales / 256⌉] and offset fp32 [].
    """

    packed: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    groups: Tensor | None = None
    offset: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """What its tensors take."""
        tensors = (self.packed, self.scales, self.groups, self.offset)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def quantise(weight: Tensor, *, double: bool = True) -> NF4:
    """A tensor of any shape in fp32, bf16 or fp16 to NF4; `double` quantises the scales too.

    Raises ValueError for values that are not finite and for an empty tensor.
    """
    flat = weight.detach().reshape(-1)
    values = flat.numel()
    if values == 0:
        raise ValueError("is empty")
    packed = torch.empty(-(-values // 2), dtype=torch.uint8, device=flat.device)
    scales = torch.empty(-(-values // BLOCK), dtype=torch.float32, device=flat.device)
    whole = values - values % BLOCK
    for start in range(0, whole, _CHUNK):
        stop = min(start + _CHUNK, whole)
        blocks = flat[start:stop].view(-1, BLOCK).float()
        scale = scales[start // BLOCK : stop // BLOCK]
        torch.amax(blocks.abs(), 1, out=scale)
        _require_finite(scale)
        scaled = blocks * (1.0 / scale.clamp(min=_SMALLEST)).unsqueeze(1)
        packed[start // 2 : stop // 2] = _pack(scaled.view(-1))
    if whole < values:
        # bitsandbytes divides the last, shorter block, and multiplies the others by 1 / scale.
        rest = flat[whole:].float()
        scales[-1] = rest.abs().amax().clamp(min=_SMALLEST)
        _require_finite(scales[-1])
        packed[whole // 2 :] = _pack(rest / scales[-1])
    if not double:
        return NF4(packed, scales, tuple(weight.shape))
    offset = scales.mean()
    codes, groups = quantise_in_groups(scales - offset)
    return NF4(packed, codes, tuple(weight.shape), groups, offset)


def dequantise(weight: NF4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that `weight` stands for: level · scale in fp32, rounded to `dtype`."""
    flat = _unpack(
        weight.packed, weight.scales, weight.groups, weight.offset, math.prod(weight.shape), dtype
    )
    return flat.view(weight.shape)


def dequantise_reference(weight: NF4, dtype: torch.dtype = torch.float32) -> Tensor:
    """`dequantise` as the format reads, one nibble after the other."""
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], 1).view(-1)
    values = math.prod(weight.shape)
    levels = torch.tensor(LEVELS, device=codes.device)[codes[:values].long()]
    scales = plain_scales(weight).repeat_interleave(BLOCK)[:values]
    return (levels * scales).to(dtype).view(weight.shape)


def linear(x: Tensor, weight: NF4, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias for a weight [out, in], by `frozen_linear`."""
    parts = (weight.packed, weight.scales, weight.groups, weight.offset)
    return frozen_linear(x, bias, partial(_matrix, weight.shape), *parts)


def _matrix(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    packed: Tensor,
    scales: Tensor,
    groups: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, None]:
    return dequantise(NF4(packed, scales, shape, groups, offset), dtype), None


def plain_scales(weight: NF4) -> Tensor:
    """The scales of the blocks in fp32 [⌈values / 64⌉]."""
    if weight.groups is None or weight.offset is None:
        return weight.scales
    return dequantise_scales(weight.scales, weight.groups, weight.offset)


def dequantise_scales(
    scales: Tensor, groups: Tensor, offset: Tensor, levels: Tensor | None = None
) -> Tensor:
    """Quantised scales in fp32: level · group + offset; levels default to `scale_levels`."""
    levels = scale_levels(scales.device) if levels is None else levels
    count = scales.numel()
    chosen = F.pad(levels.index_select(0, scales.int()), (0, -count % GROUP))
    return (chosen.view(-1, GROUP) * groups.unsqueeze(1)).view(-1)[:count] + offset


def can_cut(shape: tuple[int, ...], rows: slice, columns: slice) -> bool:
    """Whether that part of a matrix of that shape consists of whole blocks."""
    places = [rows.start * shape[1], rows.stop * shape[1]]
    if columns != slice(0, shape[1]):
        places = [shape[1], columns.start, columns.stop]
    return all(place % BLOCK == 0 for place in places)


def cut(weight: NF4, rows: slice, columns: slice) -> NF4:
    """A part of a matrix, with the values that it has in the whole, and plain fp32 scales.

    Raises ValueError where the part would cut a block.
    """
    if not can_cut(weight.shape, rows, columns):
        raise ValueError(f"rows {rows} and columns {columns} of {weight.shape} cut a block of 64")
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    packed, scales = weight.packed, plain_scales(weight)
    if columns == slice(0, weight.shape[1]):
        start, stop = rows.start * shape[1], rows.stop * shape[1]
        packed, scales = packed[start // 2 : stop // 2], scales[start // BLOCK : stop // BLOCK]
    else:
        first, last = columns.start, columns.stop
        packed = packed.view(weight.shape[0], -1)[rows, first // 2 : last // 2].reshape(-1)
        scales = scales.view(weight.shape[0], -1)[rows, first // BLOCK : last // BLOCK].reshape(-1)
    return NF4(packed.contiguous(), scales.contiguous(), shape)


@cache
def scale_levels(device: torch.device | None = None) -> Tensor:
    """The 256 levels of a scale, ascending in fp32: ± fractions of seven powers of ten, 0 and 1.

    The larger the power, the more fractions: 2, 4, … (Dettmers 2015, arXiv:1511.04561, "dynamic
    tree quantisation").
    """
    positive = []
    for power in range(7):
        edges = torch.linspace(0.1, 1.0, 2**power + 1, device="cpu")
        positive.append((edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (power - 6))
    levels = torch.cat(positive)
    ends = torch.tensor([0.0, 1.0], device="cpu")
    return torch.cat([-levels, ends, levels]).sort().values.to(device)


def quantise_in_groups(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values in groups of 256, as the nearest of `scale_levels` times a group's magnitude.

    values fp32 [values] to codes uint8 [values] and groups fp32 [⌈values / 256⌉]. As bitsandbytes
    does on a CPU, they are rounded to a grid first, finer than most levels lie.
    """
    count = values.numel()
    groups = F.pad(values, (0, -count % GROUP)).view(-1, GROUP)
    largest = groups.abs().amax(1)
    # Where all are 0 so is what they are multiplied by later; the level does not matter.
    scaled = (groups * (1.0 / largest).unsqueeze(1)).nan_to_num(nan=-1.0).clamp(-1.0, 1.0)
    places = ((scaled + 1.0) * 0.5 * (_GRID - 1) + 0.5).int().view(-1)[:count]
    return _nearest_on_grid(places.device).index_select(0, places), largest


@cache
def _nearest_on_grid(device: torch.device) -> Tensor:
    """The number of the level nearest to each of 65,536 places from -1 to 1; uint8."""
    places = torch.arange(_GRID, device="cpu").float() / (_GRID - 1) * 2.0 - 1.0
    levels = scale_levels()
    upper = torch.searchsorted(levels, places).clamp(max=len(levels) - 1)
    lower = (upper - 1).clamp(min=0)
    is_lower = (places - levels[lower]).abs() <= (levels[upper] - places).abs()
    return torch.where(is_lower, lower, upper).to(torch.uint8).to(device)


def _require_finite(scales: Tensor) -> None:
    if not bool(scales.isfinite().all()):
        raise ValueError("holds values that are not finite")


def _pack(scaled: Tensor) -> Tensor:
    """The nearest levels of values in [-1, 1], two to a byte; an odd number is filled up by 0.

    A value's cell among 257 says the level if it lies below the only midpoint that can be in the
    cell: one comparison instead of a search, in a tenth of its time.
    """
    scaled = F.pad(scaled, (0, scaled.numel() % 2))
    lowest, midpoint = _cells(scaled.device)
    cells = ((scaled + 1.0) * (_CELLS / 2) + 0.5).int()
    codes = lowest.index_select(0, cells)
    codes += scaled > midpoint.index_select(0, cells)
    return (codes[::2] << 4) | codes[1::2]


# Tables are made on the CPU by name: models are often built where the default device is "meta".
@cache
def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each cell the lowest level, uint8, and the midpoint above which the next one begins."""
    levels = torch.tensor(LEVELS, device="cpu")
    midpoints = (levels[:-1] + levels[1:]) / 2
    # A little below where the cell begins, for a value's cell is computed with rounding.
    begin = (torch.arange(_CELLS + 1, device="cpu") - 0.5) * (2 / _CELLS) - 1.0 - 1e-6
    lowest = torch.searchsorted(midpoints, begin)
    above = F.pad(midpoints, (0, 1), value=torch.inf)[lowest]
    return lowest.to(torch.uint8).to(device), above.to(device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two fp32 levels of each byte as one int64: looked up at once, ten times as fast."""
    byte = torch.arange(256, device="cpu")
    levels = torch.tensor(LEVELS, device="cpu")
    pairs = torch.stack([levels[byte >> 4], levels[byte & 15]], 1)
    return pairs.view(torch.int64).view(-1).to(device)


@torch.library.custom_op("trainwright::nf4_unpack", mutates_args=())
def _unpack(
    packed: Tensor,
    scales: Tensor,
    groups: Tensor | None,
    offset: Tensor | None,
    values: int,
    dtype: torch.dtype,
) -> Tensor:
    plain = plain_scales(NF4(packed, scales, (values,), groups, offset))
    if values % BLOCK == 0 and has_bitsandbytes(packed.device.type):
        return unpack_by_bitsandbytes(packed, plain, values, dtype)
    return unpack_by_table(packed, plain, values, dtype)


@_unpack.register_fake
def _like_unpacked(
    packed: Tensor,
    scales: Tensor,
    groups: Tensor | None,
    offset: Tensor | None,
    values: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(values, dtype=dtype)


def unpack_by_table(packed: Tensor, scales: Tensor, values: int, dtype: torch.dtype) -> Tensor:
    """What `packed` stands for with fp32 `scales`, [values], on any device."""
    packed = packed.view(-1)
    result = torch.empty(values, dtype=dtype, device=packed.device)
    table, whole = _pairs(packed.device), values - values % BLOCK
    for start in range(0, whole, _CHUNK):
        stop = min(start + _CHUNK, whole)
        levels = table.index_select(0, packed[start // 2 : stop // 2].int()).view(torch.float32)
        scale = scales[start // BLOCK : stop // BLOCK].unsqueeze(1)
        torch.mul(levels.view(-1, BLOCK), scale, out=result[start:stop].view(-1, BLOCK))
    if whole < values:
        levels = table.index_select(0, packed[whole // 2 :].int()).view(torch.float32)
        result[whole:] = levels[: values - whole] * scales[-1]
    return result


def unpack_by_bitsandbytes(
    packed: Tensor, scales: Tensor, values: int, dtype: torch.dtype
) -> Tensor:
    """`unpack_by_table` of whole blocks by bitsandbytes' kernels.

    A block a row: its CPU kernel takes the wrong scales where a row ends within a block.
    """
    shape = [values // BLOCK, BLOCK]
    unpacked = torch.ops.bitsandbytes.dequantize_4bit(
        packed.view(-1, 1), scales, BLOCK, "nf4", shape, dtype
    )
    return unpacked.view(-1)


@cache
def has_bitsandbytes(kind: str) -> bool:
    """Whether bitsandbytes is here with faster kernels for devices of that kind.

    Those for a CPU are, with AVX-512: a fifth of the table's time. Others unpack value by value.
    """
    if kind not in ("cpu", "cuda"):
        return False
    if kind == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    # It warns of a kernel of its own, for generation, that it looks for on the hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes.cextension import BNBNativeLibrary, lib
    except Exception:  # it looks for libraries as it is imported, and raises whatever that raises
        return False
    return isinstance(lib, BNBNativeLibrary) and (kind == "cpu" or lib.compiled_with_cuda)

"""Between vectors and planes: what every codec checks and how it cuts a vector into blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainwright.comm.codecs.codec import BrokenPlanes, Plane, Planes

Floats = NDArray[np.float32]


def finite_vector(values: Tensor) -> Floats:
    """The values as numpy sees them; no copy where they lie in one piece.

    Raises ValueError unless they are fp32 [count] on the CPU, all finite.
    """
    if values.dtype != torch.float32 or values.dim() != 1 or values.device.type != "cpu":
        raise ValueError(
            f"a codec writes fp32 vectors on the CPU, not {values.dtype} {list(values.shape)} on "
            f"{values.device}"
        )
    found: Floats = values.detach().contiguous().numpy()
    if not np.isfinite(found).all():
        raise ValueError("a codec writes finite values only, and some are not")
    return found


def sized(planes: Sequence[Plane], **sizes: int) -> Planes:
    """The planes, if they are as many and of as many bytes as `sizes` says. Raises BrokenPlanes."""
    if len(planes) != len(sizes):
        raise BrokenPlanes(f"{len(planes)} planes instead of {len(sizes)}")
    for plane, (name, size) in zip(planes, sizes.items(), strict=True):
        check_bytes(plane, name)
        if plane.size != size:
            raise BrokenPlanes(f"{name} of {plane.size} bytes instead of {size}")
    return [np.ascontiguousarray(plane) for plane in planes]


def check_bytes(plane: Plane, name: str) -> None:
    """Raise BrokenPlanes unless the plane is a row of bytes."""
    if plane.dtype != np.uint8 or plane.ndim != 1:
        raise BrokenPlanes(f"{name} is no row of bytes")


def check_finite(values: Floats, name: str) -> None:
    """Raise BrokenPlanes unless all are finite."""
    if not np.isfinite(values).all():
        raise BrokenPlanes(f"{name} that are not finite")


def blocks(values: NDArray, size: int) -> NDArray:
    """[⌈count / size⌉, size]: the values in rows, the last one filled up with zeros.

    A view where nothing has to be filled up.
    """
    missing = -len(values) % size
    if missing:
        values = np.concatenate([values, np.zeros(missing, values.dtype)])
    return values.reshape(-1, size)


def block_count(count: int, size: int) -> int:
    """How many rows `blocks` makes."""
    return -(-count // size)

"""What each codec costs and keeps: bytes a value, the error that it leaves, and its speed.

Two vectors: normal values, and heavy-tailed ones (Student's t of 3 degrees) in tensors whose sizes
differ up to a hundredfold, which is nearer to what training makes. Bytes are those of all planes,
encoded from the second, beside how many times less than fp32 that is. The error is ‖x − x̂‖ / ‖x‖.
Speeds are of fp32 bytes and a processor's time, the best of some repeats on one thread.

    OMP_NUM_THREADS=1 python benchmarks/swarm_codecs.py [--values 4194304] [--repeats 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from trainwright.comm.codecs.build import build_codec
from trainwright.comm.codecs.codec import Codec
from trainwright.comm.codecs.dct import DctTopK
from trainwright.recipe.swarm import CodecName

DENSITY = 64 / 4096  # SparseLoCo's
DCT_DENSITY = 32 / 4096  # DeMo's release
WIDTH = 1024  # columns of the matrices that are transformed
HEADER = (
    "| codec | bytes a value | less than fp32 | error, normal | error, heavy-tailed "
    "| encode MB/s | decode MB/s |\n|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Measure every codec and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", type=int, default=1 << 22)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    count = arguments.values // WIDTH * WIDTH
    normal, heavy = normal_values(count), heavy_tailed_values(count)
    print(f"{count:,} values, {torch.get_num_threads()} thread(s), density {DENSITY:.3%}")
    print(HEADER)
    for name, codec in codecs(count):
        size = sum(plane.size for plane in codec.encode(heavy))
        planes = codec.encode(normal)
        encode = best_seconds(arguments.repeats, partial(codec.encode, normal))
        decode = best_seconds(arguments.repeats, partial(codec.decode, planes, count))
        megabytes = 4 * count / 1e6
        print(
            f"| {name} | {size / count:.4f} | {4 * count / size:.1f} | {error(codec, normal):.4f} "
            f"| {error(codec, heavy):.4f} | {megabytes / encode:.0f} | {megabytes / decode:.0f} |"
        )


def codecs(count: int) -> list[tuple[str, Codec]]:
    """All that recipes can name, and those of DeMo and DisTrO on one matrix."""
    found = [(name, build_codec(name, density=DENSITY)) for name in get_args(CodecName)]
    shapes = [(count // WIDTH, WIDTH)]
    kinds: tuple[CodecName, ...] = ("bf16", "1bit")
    for values in kinds:
        codec = DctTopK(shapes, density=DCT_DENSITY, values=build_codec(values, density=1))
        found.append((f"DCT, 32 of 4096 in {values}", codec))
    return found


def normal_values(count: int) -> Tensor:
    """fp32 [count]."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal(count, np.float32))


def heavy_tailed_values(count: int) -> Tensor:
    """fp32 [count] in 64 parts, each of its own size between 1e-4 and 1e-2."""
    rng = np.random.default_rng(1)
    sizes = np.repeat(10 ** rng.uniform(-4, -2, 64), -(-count // 64))[:count]
    return torch.from_numpy((rng.standard_t(3, count) * sizes).astype(np.float32))


def error(codec: Codec, values: Tensor) -> float:
    """‖x − x̂‖ / ‖x‖."""
    return float((codec.decode(codec.encode(values), len(values)) - values).norm() / values.norm())


def best_seconds(repeats: int, call: Callable[[], Any]) -> float:
    """Of so many calls."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    main()

"""What every codec promises, whatever it does to values."""

from __future__ import annotations

import pytest
import torch

from tests.comm.codecs.vectors import NAMES, SIZES, every_codec, vectors
from trainwright.comm.codecs.build import build_codec
from trainwright.comm.codecs.codec import Codec

BY_NAME = pytest.mark.parametrize("codec", every_codec(), ids=lambda codec: codec.name)

# Bytes of a million values, from the formats' descriptions: scales and tables are bf16.
BYTES = {
    "fp32": 4 << 20,
    "bf16": 2 << 20,
    "int8": (1 << 20) + 2 * 8192,
    "e3m0": (1 << 19) + 2 * 8192,
    "2bit": (1 << 18) + 2 * 4 * 1024,
    "1bit": (1 << 17) + 2 * 2 * 1024,
    "top-k-12bit": 256 * 64 * 14 // 8 + 2 * 4,
}


@BY_NAME
def test_values_come_back_finite_in_no_more_bytes_than_announced(codec: Codec) -> None:
    for size in SIZES:
        for kind, values in vectors(size):
            planes = codec.encode(values)
            decoded = codec.decode(planes, size)
            assert decoded.dtype == torch.float32 and decoded.shape == (size,)
            assert torch.isfinite(decoded).all(), kind
            assert sum(plane.size for plane in planes) <= codec.most_bytes(size), kind
            if kind == "zero":
                assert not decoded.any()
            wide = torch.stack([values, values], dim=1)[:, 0]  # not in one piece
            again = codec.encode(wide)
            assert [each.tobytes() for each in again] == [each.tobytes() for each in planes]


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_those_of_the_format(name: str) -> None:
    values = torch.linspace(-1, 1, 1 << 20)
    codec = build_codec(name, density=1 / 64)  # type: ignore[arg-type]
    assert sum(plane.size for plane in codec.encode(values)) == BYTES[name]
    assert codec.most_bytes(1 << 20) == BYTES[name]


@BY_NAME
@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([1.0, float("nan")]),
        torch.tensor([float("-inf"), 2.0]),
        torch.ones(3, dtype=torch.float64),
        torch.ones(2, 2),
        torch.ones(4, device="meta"),
    ],
    ids=["nan", "infinite", "fp64", "matrix", "elsewhere"],
)
def test_what_is_no_finite_fp32_vector_is_refused(codec: Codec, values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="a codec writes"):
        codec.encode(values)


def test_every_name_of_the_recipe_has_its_codec() -> None:
    for name in NAMES:
        assert build_codec(name, density=0.1).name == name

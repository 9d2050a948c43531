"""NF4 against bitsandbytes, bit for bit, and its product against that of the unpacked weight."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from trainwright.kernels import nf4
from trainwright.kernels.nf4_files import STATE, from_bitsandbytes, to_bitsandbytes

bnb = pytest.importorskip("bitsandbytes")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Whole blocks of rows; rows that cut blocks; sizes that end within a block or a byte.
SHAPES = [(512, 1024), (33, 64), (64, 172), (10, 80), (3, 63), (9, 7), (1, 130), (1, 1), (65,)]


def random_weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values whose rows differ in spread, so that scales do."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return (
        values * torch.rand(shape[0], generator=generator)[(...,) + (None,) * (len(shape) - 1)]
    ).to(dtype)


def check_equal(weight: Tensor, double: bool) -> None:
    """What we make of a weight and what bitsandbytes makes of it, down to the bits."""
    packed, state = bnb.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=double
    )
    ours = nf4.quantise(weight, double=double)
    assert torch.equal(ours.packed, packed.view(-1))
    assert ours.scales.dtype == state.absmax.dtype and torch.equal(ours.scales, state.absmax)
    if double:
        assert torch.equal(ours.groups, state.state2.absmax)
        assert torch.equal(ours.offset, state.offset)
    else:
        assert ours.groups is None and ours.offset is None

    # As one row: bitsandbytes' CPU kernel takes wrong scales where rows end within blocks.
    state.shape = torch.Size((1, weight.numel()))
    with torch.compiler.set_stance("force_eager"):  # it compiles what its kernels do not take
        expected = bnb.functional.dequantize_4bit(packed, state).view(weight.shape)
    scales, values = nf4.plain_scales(ours), weight.numel()
    for unpacked in (
        nf4.unpack_by_table(ours.packed, scales, values, weight.dtype).view(weight.shape),
        nf4.dequantise_reference(ours, weight.dtype),
        nf4.dequantise(ours, weight.dtype),
    ):
        assert unpacked.dtype == weight.dtype and torch.equal(unpacked, expected)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_bitsandbytes(
    shape: tuple[int, ...], dtype: torch.dtype, double: bool
) -> None:
    check_equal(random_weight(*shape, dtype=dtype), double)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["stories260K_hf", "digit_llama"])
def test_bits_of_trained_weights(name: str, shared: Path) -> None:
    tensors = load_file(shared / "weights" / name / "model.safetensors")
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2}
    assert len(matrices) >= 30
    for tensor in matrices.values():
        check_equal(tensor, double=True)
        check_equal(tensor.bfloat16(), double=False)


def test_between_two_levels_the_lower_one_is_taken() -> None:
    """At the midpoints themselves, and next to them on both sides."""
    levels = torch.tensor(nf4.LEVELS)
    middle = (levels[:-1] + levels[1:]) / 2
    below, above = (middle.nextafter(torch.tensor(end)) for end in (-2.0, 2.0))
    block = torch.cat([torch.tensor([1.0]), middle, below, above, torch.zeros(18)])
    assert block.numel() == 64
    ours = nf4.quantise(block, double=False)
    codes = torch.stack([ours.packed >> 4, ours.packed & 15], 1).view(-1)
    assert codes[1:16].tolist() == codes[16:31].tolist() == list(range(15))
    assert codes[31:46].tolist() == list(range(1, 16))
    check_equal(block, double=False)
    check_equal(block * 0.37, double=False)  # the scale rounds: some fall on the other side
    for factor in torch.rand(30).tolist():  # a shorter block is divided
        check_equal(torch.cat([block, block[:47]]) * factor, double=False)


def test_zeros_and_equal_scales() -> None:
    check_equal(torch.zeros(3, 130), double=True)
    check_equal(torch.ones(40, 64), double=True)  # every scale equals their mean
    weight = torch.zeros(4, 64)
    weight[1, 3] = -2.0
    check_equal(weight, double=False)
    assert nf4.dequantise(nf4.quantise(weight, double=False)).tolist() == weight.tolist()


def test_scales_are_rounded_as_bitsandbytes_rounds_them() -> None:
    """At all places, and next to them, where the level that is nearest changes."""
    code = bnb.functional.create_dynamic_map()
    places = torch.arange(65536).float() / 65535 * 2 - 1
    nearest = (places.unsqueeze(1) - code).abs().argmin(1)
    changes = (places[:-1] + 1 / 65535)[nearest[1:] != nearest[:-1]]
    groups = torch.rand(400, 1, generator=torch.Generator().manual_seed(0)) * 3
    edges = F.pad(changes, (0, 256 - len(changes)), value=1.0) * groups
    for values in (edges, *(edges.nextafter(torch.tensor(end)) for end in (-9.0, 9.0))):
        expected, state = bnb.functional.quantize_blockwise(values.flatten(), blocksize=256)
        codes, largest = nf4.quantise_in_groups(values.flatten())
        assert torch.equal(codes, expected) and torch.equal(largest, state.absmax)


def test_scales_have_the_levels_of_the_dynamic_map() -> None:
    assert torch.equal(nf4.scale_levels(), bnb.functional.create_dynamic_map())
    assert torch.equal(torch.tensor(nf4.LEVELS), bnb.functional.get_4bit_type("nf4", "cpu"))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 129])
def test_what_is_not_finite_is_refused(bad: float, place: int) -> None:
    weight = torch.randn(130)
    weight[place] = bad
    with pytest.raises(ValueError, match="not finite"):
        nf4.quantise(weight)


def test_nothing_has_no_scale() -> None:
    with pytest.raises(ValueError, match="is empty"):
        nf4.quantise(torch.empty(0, 64))


def test_bytes_of_a_value() -> None:
    """4.5 bits with plain scales and 4.127 with quantised ones (QLoRA, section 3)."""
    weight = random_weight(1024, 1024)
    for double, bits in ((False, 4.5), (True, 4.127)):
        assert nf4.quantise(weight, double=double).nbytes * 8 / 2**20 == pytest.approx(bits, 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_and_its_gradients_are_the_unpacked_weights(dtype: torch.dtype) -> None:
    packed = nf4.quantise(random_weight(72, 48, dtype=dtype))
    x, bias = torch.randn(2, 5, 48).to(dtype), torch.randn(72).to(dtype)
    upstream = torch.randn(2, 5, 72).to(dtype)

    def results(linear: Any, weight: Any) -> list[Tensor]:
        own_x, own_bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
        y = linear(own_x, weight, own_bias)
        return [y, *torch.autograd.grad(y, (own_x, own_bias), upstream)]

    expected = results(F.linear, nf4.dequantise(packed, dtype))
    tolerance = 0.0 if dtype == torch.float32 else 2e-2  # of sums of ten in the narrow types
    for got, want in zip(results(nf4.linear, packed), expected, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=max(tolerance, 1e-6), rtol=tolerance)


def test_under_autocast_the_product_is_narrow_and_gradients_are_the_inputs() -> None:
    packed = nf4.quantise(random_weight(72, 64))
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = nf4.linear(x, packed)
        expected = F.linear(x, nf4.dequantise(packed))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    [got] = torch.autograd.grad(y.float().square().sum(), x)
    [want] = torch.autograd.grad(expected.float().square().sum(), x)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_only_packed_tensors_wait_for_the_backward_pass() -> None:
    packed = nf4.quantise(random_weight(256, 128))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nf4.linear(torch.randn(2, 128, requires_grad=True), packed)
    assert sum(tensor.nbytes for tensor in kept) == packed.nbytes


def test_frozen_inputs_get_no_gradient() -> None:
    packed, bias = nf4.quantise(random_weight(64, 64)), torch.randn(64, requires_grad=True)
    nf4.linear(torch.randn(3, 64), packed, bias).sum().backward()
    assert bias.grad is not None and bias.grad.tolist() == [3.0] * 64


def test_dynamo_traces_the_product_whole() -> None:
    packed, x = nf4.quantise(random_weight(64, 64)), torch.randn(2, 64, requires_grad=True)
    compiled = torch.compile(nf4.linear, backend="aot_eager", fullgraph=True)
    y = compiled(x, packed)
    assert torch.equal(y, nf4.linear(x, packed))
    assert torch.equal(
        *(torch.autograd.grad(f(x, packed).sum(), x)[0] for f in (compiled, nf4.linear))
    )


@pytest.mark.parametrize("double", [True, False])
def test_parts_have_the_values_of_the_whole(double: bool) -> None:
    packed = nf4.quantise(random_weight(48, 192), double=double)
    whole = nf4.dequantise(packed)
    for rows, columns in (
        (slice(16, 32), slice(0, 192)),
        (slice(0, 48), slice(64, 192)),
        (slice(5, 6), slice(128, 192)),
    ):
        part = nf4.cut(packed, rows, columns)
        assert torch.equal(nf4.dequantise(part), whole[rows, columns])
        assert part.packed.numel() * 2 == whole[rows, columns].numel()


def test_parts_of_blocks_are_refused() -> None:
    packed = nf4.quantise(random_weight(48, 96))
    assert torch.equal(
        nf4.dequantise(nf4.cut(packed, slice(2, 4), slice(0, 96))), nf4.dequantise(packed)[2:4]
    )
    for rows, columns in ((slice(0, 3), slice(0, 96)), (slice(0, 48), slice(0, 64))):
        with pytest.raises(ValueError, match="cut a block"):
            nf4.cut(packed, rows, columns)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_of_bitsandbytes_unpacks_the_same(dtype: torch.dtype) -> None:
    """Of rows that end within blocks too; whatever the processor, and so that CUDA's is called."""
    packed = nf4.quantise(random_weight(12, 80))
    got = nf4.unpack_by_bitsandbytes(packed.packed, nf4.plain_scales(packed), 960, dtype)
    assert torch.equal(got.view(12, 80), nf4.dequantise_reference(packed, dtype))


def test_kernels_are_looked_for_and_the_table_serves_without_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not nf4.has_bitsandbytes("mps")
    nf4.has_bitsandbytes.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert nf4.has_bitsandbytes("cpu")
    nf4.has_bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", None)  # as if it were not here
    assert not nf4.has_bitsandbytes("cpu")
    packed = nf4.quantise(random_weight(12, 80))
    assert torch.equal(nf4.dequantise(packed), nf4.dequantise_reference(packed))
    nf4.has_bitsandbytes.cache_clear()


def stored_by_bitsandbytes(weight: Tensor, double: bool) -> dict[str, Tensor]:
    """A layer's `weight…` tensors as it saves them."""
    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, quant_type="nf4", compress_statistics=double
    )
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=double, module=layer
    )
    return layer.to("cpu").state_dict()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_we_store_is_what_bitsandbytes_stores(dtype: torch.dtype, double: bool) -> None:
    weight = random_weight(40, 80, dtype=dtype)
    theirs = stored_by_bitsandbytes(weight, double)
    packed = nf4.quantise(weight, double=double)
    ours = to_bitsandbytes(packed, "weight", dtype)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name

    for stored in (ours, theirs):
        read, of = from_bitsandbytes(stored, "weight")
        assert of == dtype
        assert torch.equal(nf4.dequantise(read), nf4.dequantise(packed))


def test_bytes_kept_as_another_type_and_scales_of_an_old_version_are_read() -> None:
    """`quant_storage=bfloat16`, for FSDP's first version; and a lowest level of -1."""
    weight = random_weight(64, 64)
    packed = nf4.quantise(weight)
    stored = to_bitsandbytes(packed, "w", torch.float32)
    as_bf16 = stored | {"w": stored["w"].view(-1).view(torch.bfloat16).view(-1, 1)}
    assert torch.equal(nf4.dequantise(from_bitsandbytes(as_bf16, "w")[0]), nf4.dequantise(packed))

    old = {name: tensor.clone() for name, tensor in stored.items()}
    old["w.nested_quant_map"][0] = -1.0
    old["w.absmax"][5] = 0
    read, _ = from_bitsandbytes(old, "w")
    expected = nf4.plain_scales(packed).clone()
    assert packed.groups is not None and packed.offset is not None
    expected[5] = -packed.groups[0] + packed.offset
    assert torch.equal(nf4.plain_scales(read), expected)


def changed_state(stored: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    state = json.loads(bytes(stored[f"w.{STATE}"].tolist())) | changes
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return stored | {f"w.{STATE}": text}


def test_what_is_no_nf4_is_refused() -> None:
    stored = to_bitsandbytes(nf4.quantise(random_weight(64, 64)), "w", torch.float32)
    without = {name: tensor for name, tensor in stored.items() if name != "w.absmax"}
    other_levels = stored | {"w.quant_map": stored["w.quant_map"] + 1e-3}
    broken = stored | {f"w.{STATE}": stored[f"w.{STATE}"][:-3]}
    refused = {
        "lacks absmax": without,
        "other levels": other_levels,
        "cannot be read": broken,
        "is fp4": changed_state(stored, quant_type="fp4"),
        "blocks of 128": changed_state(stored, blocksize=128),
        "type float8": changed_state(stored, dtype="float8"),
        "the shape": changed_state(stored, shape="64"),
        "2048 bytes and 64 scales": changed_state(stored, shape=[64, 65]),
        "groups of 256": changed_state(stored, nested_blocksize=64),
    }
    for reason, tensors in refused.items():
        with pytest.raises(ValueError, match=reason):
            from_bitsandbytes(tensors, "w")

"""Every path of attention against token-by-token arithmetic."""

from __future__ import annotations

import pytest
import torch

from trainwright.kernels import cpu_attention
from trainwright.kernels.attention import (
    BlockMask,
    _block_mask,
    attention,
    attention_mask,
    attention_reference,
)

# Documents of a row, and -1 for padding: inside, before and after.
PACKED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2], [-1, -1, 5, 5, 5, 5, 7, 7, -1, -1]])
SCALE = 0.3


@pytest.fixture(params=["torch", "blocked"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernel a CPU takes, whatever the one that the tests run on would; blocks of 4."""
    monkeypatch.setattr(cpu_attention, "MEASURED_KIND", request.param == "blocked")
    monkeypatch.setattr(cpu_attention, "QUERIES", 4)
    if request.param == "torch":
        monkeypatch.setattr("trainwright.kernels.attention.takes", lambda q, k, v: False)
    return request.param


def inputs(
    queries: int = 10,
    keys: int = 10,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, queries, 6), (2, kv_heads, keys, 6), (2, kv_heads, keys, 6)]
    return tuple(
        (2 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for shape in shapes
    )


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 10, 99])
@pytest.mark.parametrize("segments", [None, PACKED])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_matches_the_reference_forward_and_backward(
    kv_heads: int, segments: torch.Tensor | None, window: int | None, softcap: float | None
) -> None:
    q, k, v = inputs(kv_heads=kv_heads)
    mask = attention_mask(
        segments, queries=10, keys=10, window=window, softcap=softcap, device=q.device
    )
    result = attention(q, k, v, mask=mask, scale=SCALE, softcap=softcap)
    expected = attention_reference(
        q, k, v, segments=segments, window=window, scale=SCALE, softcap=softcap
    )
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)
    upstream = torch.randn_like(result)
    gradients = torch.autograd.grad(result, (q, k, v), upstream)
    wanted = torch.autograd.grad(expected, (q, k, v), upstream)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("segments", [None, PACKED])
@pytest.mark.parametrize("queries", [1, 3])
def test_the_newest_tokens_see_the_cached_ones(
    queries: int, segments: torch.Tensor | None, window: int | None, softcap: float | None
) -> None:
    q, k, v = inputs(queries=queries)
    mask = attention_mask(
        segments, queries=queries, keys=10, window=window, softcap=softcap, device=q.device
    )
    result = attention(q, k, v, mask=mask, scale=SCALE, softcap=softcap)
    expected = attention_reference(
        q, k, v, segments=segments, window=window, scale=SCALE, softcap=softcap
    )
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)


def test_plain_causal_rows_need_no_mask() -> None:
    device = torch.device("cpu")
    assert attention_mask(None, queries=8, keys=8, device=device) is None
    assert attention_mask(None, queries=8, keys=8, window=8, device=device) is None
    assert attention_mask(None, queries=1, keys=8, device=device) is None
    assert attention_mask(None, queries=8, keys=8, window=7, device=device) is not None
    assert attention_mask(None, queries=3, keys=8, device=device) is not None


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_rows_of_padding_stay_finite(softcap: float | None) -> None:
    q, k, v = inputs(dtype=torch.bfloat16)
    padding = torch.full((2, 10), -1)
    mask = attention_mask(padding, queries=10, keys=10, window=3, softcap=softcap, device=q.device)
    result = attention(q, k, v, mask=mask, scale=SCALE, softcap=softcap)
    gradients = torch.autograd.grad(result.float().sum(), (q, k, v))
    assert all(torch.isfinite(tensor).all() for tensor in (result, *gradients))


@pytest.mark.usefixtures("kernel")
def test_one_document_does_not_feel_another() -> None:
    q, k, v = inputs()
    mask = attention_mask(PACKED, queries=10, keys=10, device=q.device)
    result = attention(q, k, v, mask=mask, scale=SCALE)
    (gradient,) = torch.autograd.grad(result[:, :, 3:7][0].sum(), v, retain_graph=True)
    outside = [0, 1, 2, 7, 8, 9]
    assert gradient[0, :, 3:7].abs().min() > 0
    assert (gradient[0, :, outside] == 0).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("segments", [None, PACKED])
def test_block_masks_see_the_same(
    segments: torch.Tensor | None, window: int | None, softcap: float | None
) -> None:
    """The path of CUDA devices; its forward pass also runs, uncompiled, without one."""
    if BlockMask is None:
        pytest.skip("this torch has no flex attention")
    q, k, v = (tensor.detach() for tensor in inputs())
    mask = _block_mask(segments, 10, window, q.device)
    result = attention(q, k, v, mask=mask, scale=SCALE, softcap=softcap)
    expected = attention_reference(
        q, k, v, segments=segments, window=window, scale=SCALE, softcap=softcap
    )
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("heads", [2, 16])
def test_blocks_read_nothing_before_a_document(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a group share their blocks, so only what none of them sees is left out."""
    monkeypatch.setattr(cpu_attention, "QUERIES", 4)
    monkeypatch.setattr(cpu_attention, "HEADS", heads)
    monkeypatch.setattr(cpu_attention, "GRAIN", 2)
    monkeypatch.setattr(cpu_attention, "MEASURED_KIND", True)
    segments = torch.tensor([[0] * 8 + [1] * 4, [0] * 5 + [1] * 7])
    q, k, v = (torch.randn(2, 2, 12, 6) for _ in range(3))
    mask = attention_mask(segments, queries=12, keys=12, device=q.device)
    seen = [
        (block.start, keys.start)
        for group in cpu_attention._groups(q, k, v, mask, SCALE, None)
        for block, keys, *_ in group.blocks()
    ]
    apart = [(0, 0), (4, 0), (8, 8), (0, 0), (4, 0), (8, 4)]
    assert seen == (apart if heads == 2 else [(0, 0), (4, 0), (8, 4)])


def test_documents_of_all_lengths_make_few_shapes() -> None:
    """oneDNN keeps a kernel for each shape, up to a thousand: memory grew by 12 MB a step."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 512, 4) for _ in range(3))
    shapes = set()
    for _ in range(40):
        cuts = torch.rand(512, generator=generator) < 0.02
        segments = cuts.cumsum(0).unsqueeze(0)
        mask = attention_mask(segments, queries=512, keys=512, device=q.device)
        for group in cpu_attention._groups(q, k, v, mask, SCALE, None):
            shapes |= {(b.stop - b.start, k.stop - k.start) for b, k, *_ in group.blocks()}
    assert len(shapes) <= 512 // cpu_attention.GRAIN


@pytest.mark.parametrize("segments", [None, PACKED])
def test_blocks_in_bf16_are_as_exact_as_the_fused_kernel(segments: torch.Tensor | None) -> None:
    """Scores are not rounded to bf16: at these sizes a rounded score would be off by 0.1."""
    q, k, v = (tensor.detach() for tensor in inputs())
    q, k, v = (5 * q).bfloat16(), (5 * k).bfloat16(), v.bfloat16()
    mask = attention_mask(segments, queries=10, keys=10, device=q.device)
    with torch.autocast("cpu", torch.bfloat16):
        result = cpu_attention.blocked_attention(q, k, v, mask=mask, scale=SCALE)
    exact = attention_reference(q.double(), k.double(), v.double(), segments=segments, scale=SCALE)
    assert result.dtype == torch.bfloat16
    assert (result - exact).norm() <= 2**-8 * exact.norm()


def test_blocks_are_one_operation_to_the_compiler() -> None:
    """With the strides and gradients that torch.library checks."""
    q, k, v = inputs()
    for mask in (None, attention_mask(PACKED, queries=10, keys=10, device=q.device)):
        torch.library.opcheck(
            torch.ops.trainwright.blocked_attention.default, (q, k, v, mask, SCALE, 1.5)
        )

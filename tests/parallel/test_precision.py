"""Dynamic loss scaling against its rule, and float8 layers against bf16 ones."""

from __future__ import annotations

import pytest
import torch

from trainwright.errors import UserError
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.models.weights import initialise, new_model
from trainwright.parallel.precision import (
    LossScale,
    autocast,
    convert_to_float8,
    has_float8,
    is_finite,
)


def test_fp16_halves_on_overflow_and_doubles_after_two_thousand_good_steps():
    scale = LossScale("fp16")
    assert scale.value == 65536
    scale.update(finite=False)
    assert scale.value == 32768
    for _ in range(1999):
        scale.update(finite=True)
    assert scale.value == 32768
    scale.update(finite=True)
    assert scale.value == 65536


def test_an_overflow_starts_the_count_anew():
    scale = LossScale("fp16")
    for _ in range(1999):
        scale.update(finite=True)
    scale.update(finite=False)
    scale.update(finite=True)
    assert scale.value == 32768


def test_other_precisions_are_never_scaled():
    for precision in ("fp32", "bf16"):
        scale = LossScale(precision)
        scale.update(finite=False)
        assert scale.value == 1.0
        assert not scale.dynamic


def test_no_scale_helps_below_one():
    scale = LossScale("fp16")
    for _ in range(17):
        assert not scale.exhausted
        scale.update(finite=False)
    assert scale.exhausted


def test_a_saved_scale_goes_on_where_it_was():
    scale = LossScale("fp16")
    for _ in range(10):
        scale.update(finite=True)
    again = LossScale("fp16")
    again.restore(scale.state())
    for _ in range(1990):
        again.update(finite=True)
    assert again.value == 131072


def test_finiteness_is_seen_in_any_place():
    good = torch.tensor(1.0)
    assert is_finite(good, good)
    assert not is_finite(good, torch.tensor(float("nan")))
    assert not is_finite(torch.tensor(float("-inf")), good)


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def narrow_results(convert: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[str]]:
    """Logits, gradients, and the layers that run in float8, under bf16 autocast."""
    model = new_model(decoder_config(new_hf_config("llama", SIZES, 64)))
    initialise(model, 1)
    if convert:
        convert_to_float8(model.blocks, torch.device("cpu"), emulate=True)
    ids = torch.arange(128).reshape(2, 64) % 64
    with autocast("float8", torch.device("cpu")):
        logits = model(ids)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    wide = [name for name, m in model.named_modules() if type(m).__name__ == "Float8Linear"]
    return logits.detach(), gradients, wide


def test_float8_layers_compute_nearly_what_bf16_layers_do():
    pytest.importorskip("torchao")
    logits, gradients, none = narrow_results(convert=False)
    close, others, converted = narrow_results(convert=True)
    assert not none and len(converted) == 2 * 7  # all of a block, and nothing outside
    assert not torch.equal(close, logits)
    assert (close - logits).norm() < 0.06 * logits.norm()
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() < 0.15 * gradient.norm(), name


def test_float8_passes_over_routers_and_sides_that_kernels_cannot_take():
    pytest.importorskip("torchao")

    def converted(**options) -> list[str]:
        block = torch.nn.ModuleDict(
            {
                "up": torch.nn.Linear(32, 64, device="meta"),
                "odd": torch.nn.Linear(32, 40, device="meta"),
                "gate": torch.nn.Linear(32, 16, device="meta"),
            }
        )
        names = [name for name, _ in block.named_parameters()]
        convert_to_float8([block], torch.device("cpu"), emulate=True, **options)
        assert [name for name, _ in block.named_parameters()] == names
        return [name for name, m in block.items() if type(m) is not torch.nn.Linear]

    assert converted() == ["up"]
    assert converted(cuts=2) == ["up"]
    assert converted(cuts=4) == []


def test_float8_without_such_a_gpu_is_refused():
    with pytest.raises(UserError, match="capability") as refused:
        convert_to_float8([], torch.device("cpu"))
    assert refused.value.mistakes[0].key == "training.precision"
    assert not has_float8(torch.device("cpu"))

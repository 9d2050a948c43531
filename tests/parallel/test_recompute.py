"""Recompute: the same gradients from fewer kept activations, and the same parameter names."""

from __future__ import annotations

import pytest
import torch

from tests.training.runs import small_recipe
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.models.weights import initialise, new_model
from trainwright.parallel.recompute import recompute_block


def build(tmp_path, policy: str):
    recipe = small_recipe(tmp_path)
    model = new_model(decoder_config(new_hf_config("llama", recipe.model.config, 64)))
    initialise(model, 1)
    if policy != "none":
        for block in model.blocks:
            recompute_block(block, policy)
    return model


def kept_and_gradients(model) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that autograd holds between forward and backward, and the gradients."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(128).reshape(2, 64) % 64
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids).square().mean()
    loss.backward()
    return sum(kept.values()), {n: p.grad for n, p in model.named_parameters()}


def test_selective_keeps_less_than_none_and_full_less_than_selective(tmp_path):
    kept, gradients = {}, {}
    for policy in ("none", "selective", "full"):
        kept[policy], gradients[policy] = kept_and_gradients(build(tmp_path, policy))
    assert kept["full"] < kept["none"] / 2
    assert gradients["none"].keys() == gradients["full"].keys() == gradients["selective"].keys()
    for policy in ("selective", "full"):
        for name, gradient in gradients["none"].items():
            torch.testing.assert_close(gradients[policy][name], gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_full_repeats_the_matrix_products_and_selective_keeps_them(tmp_path, policy):
    """Of a block's seven projections `full` runs six again: nothing waits for the last one's
    output. `selective` runs none."""
    from torch.utils.flop_counter import FlopCounterMode

    def products(model) -> int:
        counter = FlopCounterMode(display=False)
        with counter:
            model(torch.arange(64)[None] % 64).square().mean().backward()
        return counter.get_flop_counts()["Global"][torch.ops.aten.mm]

    plain = products(build(tmp_path, "none"))
    config = build(tmp_path, "none").config
    widths = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    block = 2 * 64 * (widths + 2 * config.hidden_size * config.intermediate_size)
    expected = plain + (block * config.num_layers if policy == "full" else 0)
    assert products(build(tmp_path, policy)) == expected


def test_without_gradients_nothing_is_repeated(tmp_path):
    model = build(tmp_path, "full")
    calls = []
    model.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(torch.arange(8)[None])
    assert len(calls) == 1

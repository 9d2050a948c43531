"""Which optimizer updates which parameter, the 8-bit one, and clipping."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainwright.errors import UserError
from trainwright.optim.clip import clip_factor, scale_gradients
from trainwright.optim.muon import Muon
from trainwright.optim.optimizers import build_optimizers, set_learning_rate
from trainwright.recipe.schema import Optimizer


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (64, 32),
        "model.layers.0.mlp.up_proj.weight": (64, 32),
        "model.layers.0.input_layernorm.weight": (32,),
        "model.norm.weight": (32,),
        "lm_head.weight": (64, 32),
    }
    return {
        name: nn.Parameter(torch.randn(*shape, generator=generator))
        for name, shape in shapes.items()
    }


def build(named: dict[str, nn.Parameter], name: str) -> list[torch.optim.Optimizer]:
    section = Optimizer(name=name, learning_rate=1e-2, weight_decay=0.1)
    in_blocks = [p for key, p in named.items() if ".layers." in key]
    return build_optimizers(named.values(), section, in_blocks=in_blocks, muon_dtype=torch.float32)


def test_adamw_decays_matrices_only_and_equals_torch_adamw():
    named = parameters()
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in named.items()}
    (optimizer,) = build(named, "adamw")
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in twins.values() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in twins.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        foreach=False,
        fused=False,
    )
    for seed in range(3):
        for mine, theirs in zip(named.values(), twins.values(), strict=True):
            gradient = torch.randn(mine.shape, generator=torch.Generator().manual_seed(seed))
            mine.grad, theirs.grad = gradient, gradient.clone()
        optimizer.step()
        reference.step()
    for name, parameter in named.items():
        torch.testing.assert_close(parameter, twins[name], rtol=1e-6, atol=1e-7, msg=name)


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    named = parameters()
    muon, adamw = build(named, "muon")
    assert isinstance(muon, Muon)
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    assert taken == {id(named["model.layers.0.mlp.up_proj.weight"])}
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert rest == {id(p) for p in named.values()} - taken


def test_muon_without_a_matrix_in_a_block_is_refused():
    named = {"model.embed_tokens.weight": parameters()["model.embed_tokens.weight"]}
    with pytest.raises(UserError, match="adamw"):
        build(named, "muon")


def test_frozen_parameters_are_left_out():
    named = parameters()
    named["lm_head.weight"].requires_grad_(False)
    (optimizer,) = build(named, "adamw")
    taken = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(named["lm_head.weight"]) not in taken


def test_eight_bit_adamw_follows_adamw_closely():
    pytest.importorskip("torchao")
    generator = torch.Generator().manual_seed(4)
    target = torch.randn(128, 64, generator=generator)
    finals = {}
    for name in ("adamw", "adamw-8bit"):
        weight = nn.Parameter(torch.zeros(128, 64))
        (optimizer,) = build({"model.layers.0.w": weight}, name)
        for _ in range(20):
            weight.grad = weight.detach() - target
            optimizer.step()
        finals[name] = weight.detach()
    moved = finals["adamw"].norm()
    assert moved > 1
    assert (finals["adamw"] - finals["adamw-8bit"]).norm() < 0.05 * moved


def test_the_learning_rate_reaches_every_group():
    optimizers = build(parameters(), "muon")
    set_learning_rate(optimizers, 0.123)
    assert {group["lr"] for o in optimizers for group in o.param_groups} == {0.123}


def test_clipping_scales_to_the_limit_and_leaves_small_gradients_alone():
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))
    first.grad, second.grad = torch.tensor([3.0, 0, 0]), torch.full((2, 2), 2.0)
    norm = torch.nn.utils.get_total_norm([first.grad, second.grad])
    assert norm.item() == pytest.approx(5.0)  # sqrt(9 + 4·4)
    scale_gradients([first, second], clip_factor(norm, 1.0))
    scaled = torch.nn.utils.get_total_norm([first.grad, second.grad])
    assert scaled.item() == pytest.approx(1.0, rel=1e-5)
    assert clip_factor(torch.tensor(0.5), 1.0).item() == 1.0
    assert clip_factor(torch.tensor(50.0), None).item() == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_on_the_host_are_scaled_by_a_factor_on_the_device():
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), 4.0)
    scale_gradients([parameter], torch.tensor(0.25, device="cuda"))
    assert parameter.grad.tolist() == [1.0, 1.0, 1.0]

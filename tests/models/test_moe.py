"""Experts in one process: their files, their initial values, their losses, loads and biases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from tests.models.cases import by_our_names, hf_config, randomise, reference_model, tokens
from trainwright.models.decoder import Decoder
from trainwright.models.disk_names import names_on_disk
from trainwright.models.families import decoder_config
from trainwright.models.moe import SparseMLP
from trainwright.models.router_balance import (
    balances,
    router_metrics,
    set_router_losses,
    set_router_scale,
    take_router_loads,
    update_router_biases,
)
from trainwright.models.weights import (
    initialise,
    load_model,
    load_weights,
    new_model,
    save_model,
)
from trainwright.parallel.recompute import recompute_block
from trainwright.parallel.tensor import cut_parameter

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek", "deepseek-yarn"]


def decoder_of(name: str) -> Decoder:
    model = new_model(decoder_config(hf_config(name)))
    initialise(model, 0)
    randomise(model)
    return model


# Files


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_models_load_everywhere_and_keep_every_bit(
    name: str, shard_bytes: int, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = decoder_of(name)
    save_model(model, tmp_path / "ours", shard_bytes=shard_bytes)
    again = load_model(tmp_path / "ours")
    assert isinstance(again, Decoder)
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", experts_implementation="eager"
    )
    row = tokens(1, 9)
    with torch.no_grad():
        assert (model(row) - theirs(row).logits).abs().max() < 2e-5
    # Theirs, saved again, has the same tensors under the same names as ours.
    theirs.save_pretrained(tmp_path / "theirs")
    assert tensors_in(tmp_path / "theirs") == tensors_in(tmp_path / "ours")


def tensors_in(directory: Path) -> dict[str, list[int]]:
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                found[name] = handle.get_slice(name).get_shape()
    return found


def test_names_are_those_of_published_checkpoints() -> None:
    """mistralai/Mixtral-8x7B-v0.1 and deepseek-ai/DeepSeek-V3, model.safetensors.index.json."""
    mixtral = decoder_config(hf_config("mixtral"))
    layer = "model.layers.1.block_sparse_moe"
    assert names_on_disk(mixtral, "model.layers.1.mlp.gate.weight") == [f"{layer}.gate.weight"]
    for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        assert names_on_disk(mixtral, f"model.layers.1.mlp.experts.{ours}") == [
            f"{layer}.experts.{expert}.{theirs}.weight" for expert in range(5)
        ]
    deepseek = decoder_config(hf_config("deepseek"))
    same = [
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
    ]
    assert all(names_on_disk(deepseek, name) == [name] for name in same)
    assert names_on_disk(deepseek, "model.layers.2.mlp.experts.up_proj")[11] == (
        "model.layers.2.mlp.experts.11.up_proj.weight"
    )


def test_biases_stay_fp32_and_layers_past_the_last_are_read_past(tmp_path: Path) -> None:
    model = decoder_of("deepseek")
    save_model(model, tmp_path)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "model.safetensors"
    extra = {"model.layers.4.eh_proj.weight": torch.zeros(3, 3)}
    save_file({**load_file(file), **extra}, file)
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    biases = {name: b for name, b in loaded.named_buffers() if name.endswith("correction_bias")}
    assert len(biases) == 3
    for name, bias in biases.items():
        assert torch.equal(bias, model.get_buffer(name))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded(tokens(1, 5)).isfinite().all()


def test_a_worker_reads_its_own_experts_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = decoder_of("qwen3_moe")
    save_model(whole, tmp_path, shard_bytes=30_000)
    part = new_model(whole.config, device="meta")
    stacked = [name for name, _ in part.named_parameters() if ".experts." in name]
    for name in stacked:
        cut_parameter(part, name, 0, "ep", 1, 4)  # experts 2 and 3 of 8
        cut_parameter(part, name, 2 if "down" in name else 1, "tp", 1, 3)  # a third of the channels
    part.to_empty(device="cpu")
    read = 0

    class Slices:
        def __init__(self, inner: Any) -> None:
            self.inner, self.get_shape = inner, inner.get_shape

        def __getitem__(self, slices: tuple[slice, ...]) -> Tensor:
            nonlocal read
            tensor = self.inner[slices]
            read += tensor.numel()
            return tensor

    @contextmanager
    def opened(*args: Any, **options: Any) -> Iterator[Any]:
        with safe_open(*args, **options) as handle:
            yield SimpleNamespace(get_slice=lambda name: Slices(handle.get_slice(name)))

    monkeypatch.setattr("trainwright.models.weights.safe_open", opened)
    load_weights(part, tmp_path)
    assert read == sum(parameter.numel() for parameter in part.parameters())
    for name in stacked:
        middle = slice(6, 12)
        box = (slice(2, 4), slice(None), middle) if "down" in name else (slice(2, 4), middle)
        assert torch.equal(part.get_parameter(name), whole.get_parameter(name)[box]), name


# Initial values


def test_an_experts_values_depend_on_its_number_alone() -> None:
    few, many = (
        new_model(decoder_config({**hf_config("mixtral"), "num_local_experts": count}))
        for count in (3, 5)
    )
    for model in (few, many):
        initialise(model, 4)
    name = "model.layers.2.mlp.experts.up_proj"
    ours, theirs = few.get_parameter(name), many.get_parameter(name)
    assert torch.equal(ours, theirs[:3])
    assert not torch.equal(theirs[0], theirs[1])
    assert not torch.equal(ours, few.get_parameter(name.replace("layers.2", "layers.1")))
    assert all(b.abs().max() == 0 for b in deepseek_biases(4))


def deepseek_biases(seed: int) -> list[Tensor]:
    model = new_model(decoder_config(hf_config("deepseek")))
    initialise(model, seed)
    return [b for name, b in model.named_buffers() if name.endswith("correction_bias")]


# Losses


def layer_of(name: str) -> SparseMLP:
    torch.manual_seed(0)
    layer = SparseMLP(decoder_config(hf_config(name)))
    randomise(layer)
    return layer


def gradients(layer: nn.Module, x: Tensor, **losses: float) -> tuple[Tensor, Tensor]:
    """The router's and the input's gradient where nothing but the router's losses has any."""
    scale = losses.pop("scale", 1.0)
    set_router_losses([layer], **{"balance_loss": 0.0, "z_loss": 0.0, **losses})
    set_router_scale([layer], scale)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    (layer(x) * 0).sum().backward()
    assert x.grad is not None
    return layer.gate.weight.grad.clone(), x.grad


def test_the_balance_loss_is_that_of_transformers() -> None:
    """For one row and one layer; a sum over tokens, where theirs is a mean."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layer, x = layer_of("mixtral"), torch.randn(1, 13, 48)
    ours, for_x = gradients(layer, x, balance_loss=0.7, scale=2.0)
    weight = layer.gate.weight.detach().clone().requires_grad_()
    wide = x.clone().requires_grad_()
    loss = load_balancing_loss_func((wide[0] @ weight.t(),), num_experts=5, top_k=2)
    (loss * 13 * 0.7 * 2.0).backward()
    assert ours.abs().max() > 0.01
    torch.testing.assert_close(ours, weight.grad)
    torch.testing.assert_close(for_x, wide.grad)
    metrics = router_metrics(take_router_loads([layer]))
    assert metrics["balance_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_rows_are_balanced_by_themselves() -> None:
    layer, x = layer_of("mixtral"), torch.randn(3, 7, 48)
    together, _ = gradients(layer, x, balance_loss=0.7)
    apart = sum(gradients(layer, x[row : row + 1], balance_loss=0.7)[0] for row in range(3))
    as_one_row, _ = gradients(layer, x.flatten(0, 1)[None], balance_loss=0.7)
    torch.testing.assert_close(together, apart)
    assert (together - as_one_row).abs().max() > 1e-3


def test_sigmoid_scores_are_balanced_by_their_shares() -> None:
    """DeepSeek-V3, arXiv:2412.19437, equations 17 to 20."""
    layer, x = layer_of("deepseek"), torch.randn(1, 11, 48)
    ours, _ = gradients(layer, x, balance_loss=0.5)
    weight = layer.gate.weight.detach().clone().requires_grad_()
    scores = torch.sigmoid(x[0] @ weight.t())
    with torch.no_grad():
        chosen, _ = layer.gate(x)
    counts = torch.bincount(chosen.flatten(), minlength=12)
    f = counts * 12 / (3 * 11)
    p = (scores / scores.sum(-1, keepdim=True)).mean(0)
    # Theirs has picks as shares of all picks: 3 of them a token.
    ((f * p).sum() * 0.5 * 11 * 3).backward()
    torch.testing.assert_close(ours, weight.grad)


def test_the_z_loss() -> None:
    """ST-MoE, arXiv:2202.08906, equation 5, as a sum over tokens."""
    layer, x = layer_of("qwen3_moe"), torch.randn(2, 6, 48)
    ours, for_x = gradients(layer, x, z_loss=0.3, scale=0.5)
    weight = layer.gate.weight.detach().clone().requires_grad_()
    wide = x.clone().requires_grad_()
    (torch.logsumexp(wide @ weight.t(), -1).square().sum() * 0.15).backward()
    torch.testing.assert_close(ours, weight.grad)
    torch.testing.assert_close(for_x, wide.grad)


def test_without_a_scale_there_are_no_losses() -> None:
    layer, x = layer_of("qwen3_moe"), torch.randn(2, 6, 48)
    assert gradients(layer, x, balance_loss=1.0, z_loss=1.0, scale=0.0)[0].abs().max() == 0


# Loads


@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_each_token_is_counted_once(policy: str) -> None:
    model = decoder_of("qwen2_moe")
    for block in model.blocks:
        recompute_block(block, policy)
    set_router_losses([model], balance_loss=0.1, z_loss=0.0)
    set_router_scale([model], 1.0)
    for row in (tokens(2, 9), tokens(1, 9, seed=2)):
        model(row).square().mean().backward()
    with torch.no_grad():
        model(tokens(1, 9))  # an evaluation counts nothing
    loads = take_router_loads([model])
    assert loads.loads.shape == (3, 6)
    assert loads.loads.sum(1).tolist() == [3 * 27] * 3
    assert take_router_loads([model]).loads.sum() == 0


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputed_gradients_are_the_same(policy: str) -> None:
    results = []
    for chosen in ("none", policy):
        model = decoder_of("deepseek")
        for block in model.blocks:
            recompute_block(block, chosen)
        set_router_losses([model], balance_loss=0.1, z_loss=0.1)
        set_router_scale([model], 0.3)
        model(tokens(2, 9)).square().mean().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


def test_biases_move_against_the_load() -> None:
    model = decoder_of("deepseek")
    before = [b.clone() for b in model.buffers()]
    model(tokens(2, 9)).sum().backward()
    loads = take_router_loads([model])
    update_router_biases(loads, 0.25)
    for old, new, load in zip(before, model.buffers(), loads.loads, strict=True):
        mean = load.double().mean()
        moved = torch.where(load < mean, 0.25, torch.where(load > mean, -0.25, 0.0))
        torch.testing.assert_close(new, old + moved)
    assert len(list(balances([model]))) == 3


def test_biases_even_the_load_out() -> None:
    """From a router that sends everything to the same experts to one that uses all."""
    layer = layer_of("deepseek")
    with torch.no_grad():
        layer.gate.e_score_correction_bias[:3] = 1.0
    x = torch.randn(1, 400, 48)
    worst = []
    for _ in range(60):
        layer(x)
        loads = take_router_loads([layer])
        worst.append(router_metrics(loads)["expert_load_worst"])
        update_router_biases(loads, 0.02)
    assert worst[0] > 3
    assert worst[-1] < 1.3


def test_metrics_of_known_loads() -> None:
    model = decoder_of("mixtral")
    for place, (_, balance) in enumerate(balances([model])):
        balance.load = torch.tensor([2 + 8 * place, 2, 2, 2, 2])
        balance.tokens = 5
    metrics = router_metrics(take_router_loads([model]))
    ratios = [max(2 + 8 * k, 2) / ((10 + 8 * k) / 5) for k in range(4)]
    assert metrics == pytest.approx(
        {
            "expert_load_worst": max(ratios),
            "expert_load_mean": sum(ratios) / 4,
            "tokens_dropped": 0.0,
        }
    )
    dense = new_model(decoder_config(hf_config("llama")))
    assert router_metrics(take_router_loads([dense])) == {}


def test_routing_and_its_groups() -> None:
    """Choices and weights are transformers', the correction bias included."""
    hf = hf_config("deepseek")
    reference = reference_model(hf)
    gate = reference.model.layers[2].mlp.gate
    layer = SparseMLP(decoder_config(hf))
    layer.load_state_dict(by_our_names(reference.model.layers[2].mlp.state_dict()))
    x = torch.randn(1, 50, 48)
    _, weights, chosen = gate(x)
    ours, ours_weights = layer.gate(x)
    for k in range(50):
        expected = dict(zip(chosen[k].tolist(), weights[k].tolist(), strict=True))
        got = dict(zip(ours[0, k].tolist(), ours_weights[0, k].tolist(), strict=True))
        assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("name", "policy"), [("qwen2_moe", "none"), ("deepseek", "full")])
def test_compiled_blocks(name: str, policy: str) -> None:
    """Equal gradients; tokens are counted once, although the compiler breaks the block up."""
    results: list[Any] = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = decoder_of(name)
        for block in model.blocks:
            recompute_block(block, policy)
            if compiled:
                block.compile(backend="aot_eager")
        set_router_losses([model], balance_loss=0.1, z_loss=0.1)
        set_router_scale([model], 0.3)
        model(tokens(2, 9)).square().mean().backward()
        loads = take_router_loads([model]).loads
        results.append((loads, [p.grad for p in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

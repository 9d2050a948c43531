"""Recompute: the same gradients from fewer kept activations, and the same parameter names."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainwright.kernels.recomputing import is_recomputing
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.models.weights import initialise, new_model
from trainwright.parallel import activation_offload
from trainwright.parallel.activation_offload import offloaded_activations
from trainwright.parallel.recompute import recompute_block

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
IDS = torch.arange(128).reshape(2, 64) % 64


def build(policy: str | float):
    model = new_model(decoder_config(new_hf_config("llama", SIZES, 64)))
    initialise(model, 1)
    for block in model.blocks:
        recompute_block(block, policy)
        if isinstance(policy, float):
            block.compile(backend="aot_eager")
    return model


def kept_and_gradients(model) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that are held between forward and backward, and the gradients."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def note(tensor: torch.Tensor) -> activation_offload.Kept:
        return activation_offload.Kept(pack(tensor))

    # What `selective` keeps is not autograd's, but goes through `keep`.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainwright.parallel.recompute.keep", note)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(IDS).square().mean()
    loss.backward()
    return sum(kept.values()), {n: p.grad for n, p in model.named_parameters()}


def assert_same(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_each_policy_keeps_less_than_the_one_before_and_gradients_are_the_same():
    kept, gradients = {}, {}
    for policy in ("none", "selective", "full"):
        kept[policy], gradients[policy] = kept_and_gradients(build(policy))
    assert kept["selective"] < 0.9 * kept["none"]
    assert kept["full"] < 0.5 * kept["selective"]
    for policy in ("selective", "full"):
        assert_same(gradients[policy], gradients["none"])


def test_a_budget_keeps_what_it_says():
    torch.compiler.reset()
    kept, gradients = {}, {}
    for budget in (1.0, 0.5, 0.0):
        kept[budget], gradients[budget] = kept_and_gradients(build(budget))
        assert_same(gradients[budget], gradients[1.0])
    full, expected = kept_and_gradients(build("full"))
    outside = full - 2 * IDS.numel() * 32 * 4  # all but the two blocks' inputs
    inner = {budget: size - outside for budget, size in kept.items()}
    assert inner[0.0] < 0.25 * inner[1.0]
    assert inner[0.0] < inner[0.5] <= 0.55 * inner[1.0]
    assert_same(gradients[1.0], expected)


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_compiled_blocks_recompute_too(policy):
    torch.compiler.reset()
    expected = kept_and_gradients(build("none"))
    model = build(policy)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    kept, gradients = kept_and_gradients(model)
    assert kept < 0.9 * expected[0]
    assert_same(gradients, expected[1])


def test_compiled_blocks_may_have_policies_of_their_own():
    """What is compiled for one policy must not be run for another."""
    config = decoder_config(new_hf_config("llama", {**SIZES, "num_hidden_layers": 6}, 64))
    kept, gradients = {}, {}
    for policies in (("none",) * 6, ("full", "selective", "none") * 2, ("full",) * 6):
        torch.compiler.reset()
        model = new_model(config)
        initialise(model, 1)
        for block, policy in zip(model.blocks, policies, strict=True):
            recompute_block(block, policy)
            block.compile(backend="aot_eager")
        kept[policies[:3]], gradients[policies[:3]] = kept_and_gradients(model)
    plain, mixed, full = kept
    assert 1.5 * kept[full] < kept[mixed] < 0.8 * kept[plain]
    assert_same(gradients[mixed], gradients[plain])


def test_blocks_may_have_budgets_of_their_own():
    torch.compiler.reset()
    kept = {}
    for name, budgets in {"both": (1.0, 1.0), "first": (0.0, 1.0), "none": (0.0, 0.0)}.items():
        model = build("none")
        for block, budget in zip(model.blocks, budgets, strict=True):
            recompute_block(block, budget)
            block.compile(backend="aot_eager")
        kept[name] = kept_and_gradients(model)[0]
    assert kept["none"] < kept["first"] < kept["both"]


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_full_repeats_the_matrix_products_and_selective_keeps_them(policy):
    """Of a block's seven projections `full` runs six again: nothing waits for the last one's
    output. `selective` runs none."""

    def products(model) -> int:
        counter = FlopCounterMode(display=False)
        with counter:
            model(IDS[:1]).square().mean().backward()
        return counter.get_flop_counts()["Global"][torch.ops.aten.mm]

    plain = products(build("none"))
    config = build("none").config
    widths = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    block = 2 * 64 * (widths + 2 * config.hidden_size * config.intermediate_size)
    expected = plain + (block * config.num_layers if policy == "full" else 0)
    assert products(build(policy)) == expected


@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_a_recomputation_knows_that_it_is_one(policy):
    model = build(policy)
    seen = []
    model.blocks[0].mlp.register_forward_pre_hook(lambda *_: seen.append(is_recomputing()))
    loss = model(IDS).square().mean()
    assert seen == [False]
    loss.backward()
    assert seen == ([False] if policy == "none" else [False, True])
    assert not is_recomputing()


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_a_backward_pass_in_two_halves_recomputes_for_both(policy):
    """As in zero-bubble schedules: gradients of inputs first, of weights later."""

    def halves(model) -> tuple[torch.Tensor, ...]:
        block = model.blocks[0]
        cos, sin = (torch.zeros(1, 64, 0) for _ in range(2))
        hidden = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
        hidden.requires_grad_()
        result = block(hidden, cos, sin).square().sum()
        (inputs,) = torch.autograd.grad(result, hidden, retain_graph=True)
        return inputs, *torch.autograd.grad(result, list(block.parameters()))

    for got, expected in zip(halves(build(policy)), halves(build("none")), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_without_gradients_nothing_is_repeated():
    model = build("full")
    calls = []
    model.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(IDS)
    assert len(calls) == 1


@pytest.mark.parametrize("policy", ["none", "full", "selective", 0.5])
def test_offloaded_activations_come_back_as_they_were(policy, monkeypatch):
    """Every activation takes the way to the host once, however often it is saved."""
    if isinstance(policy, float):
        torch.compiler.reset()
    monkeypatch.setattr(activation_offload, "SMALLEST", 0)
    gone: list[torch.Tensor] = []

    class Copied(activation_offload.Kept):
        """Stands in for a device's tensor on the host: the original may be freed."""

        def __init__(self, tensor: torch.Tensor) -> None:
            gone.append(tensor)
            super().__init__(tensor.clone())

    monkeypatch.setattr(
        activation_offload._Offload, "_put_away", lambda offload, tensor: Copied(tensor)
    )
    model = build(policy)
    with offloaded_activations(True):
        loss = model(IDS).square().mean()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert_same(gradients, kept_and_gradients(build("none"))[1])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert gone
    assert not any(tensor.untyped_storage().data_ptr() in weights for tensor in gone)
    places = [(t.data_ptr(), t.shape, t.stride()) for t in gone if t.numel()]
    assert len(set(places)) == len(places)


def test_selective_results_are_offloaded_too(monkeypatch):
    monkeypatch.setattr(activation_offload, "SMALLEST", 0)
    make = activation_offload._Offload

    def offloaded(policy: str) -> int:
        offload = make()
        monkeypatch.setattr(activation_offload, "_Offload", lambda: offload)
        with offloaded_activations(True):
            build(policy)(IDS)
        return len(offload.known)

    # Seven products and the attention of each of two blocks.
    assert offloaded("selective") >= offloaded("full") + 2 * 8


def test_where_offloading_is_not_wanted_nothing_goes():
    with offloaded_activations(False):
        assert activation_offload._active.offload is None
    with pytest.raises(ZeroDivisionError), offloaded_activations(True):
        _ = 1 / 0
    assert activation_offload._active.offload is None

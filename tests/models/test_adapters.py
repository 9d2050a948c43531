"""Adapters: their formulas, their first values, choosing among them, and parts of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.adapter_cases import adapted, base, logits, move
from tests.models.cases import hf_config, tokens
from trainwright.errors import UserError
from trainwright.kernels.dropout import dropout_reference, layer_keys, token_keys
from trainwright.models.adapted import Adapted, become, dropping
from trainwright.models.adapted_linear import AdaptedEmbedding, AdaptedLinear
from trainwright.models.adapter_init import (
    drawn_weights,
    initialise_adapter,
    principal_factors,
    saved_weights,
)
from trainwright.models.adapter_spec import TRAINED, AdapterSpec, LayerAdapter
from trainwright.models.adapters import (
    active,
    adapters_off,
    add_adapter,
    attach,
    find_places,
    set_active,
)
from trainwright.models.decoder import Decoder, Span
from trainwright.models.families import decoder_config
from trainwright.models.pieces import Piece
from trainwright.models.quantised import QuantisedLinear, quantise_model
from trainwright.models.quantised_spec import QuantisedSpec
from trainwright.models.weights import (
    initialise,
    load_model,
    load_weights,
    model_tensors,
    new_model,
    save_model,
)


def layer(kind: type[nn.Module] = nn.Linear, **adapter: Any) -> Any:
    """An adapted layer of 10 inputs and 6 outputs in float64, random throughout."""
    torch.manual_seed(4)
    plain = nn.Linear(10, 6) if kind is nn.Linear else nn.Embedding(10, 6)
    module = become(plain.double(), AdaptedLinear if kind is nn.Linear else AdaptedEmbedding, 2)
    module.add(TRAINED, LayerAdapter(3, 1.7, **adapter))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def dense(module: Any, name: str = TRAINED) -> Tensor:
    """The change of the weight [out, in] that an adapter makes, from its definition."""
    weight, (A, B) = module.weight, module.factors(name)
    weight = weight if isinstance(module, nn.Linear) else weight.t()
    update = module.adapters[name].scale * (B @ A)
    if not module.adapters[name].dora:
        return update
    total = weight + update
    magnitude = module.slot(name).lora_magnitude_vector
    return torch.diag(magnitude / total.norm(dim=1)) @ total - weight


@pytest.mark.parametrize("dora", [False, True])
def test_a_linear_layer_is_its_formula(dora: bool) -> None:
    module, x = layer(dora=dora), torch.randn(2, 5, 10, dtype=torch.float64)
    module.add("other", LayerAdapter(2, 0.3, dora=True))
    module.add("third", LayerAdapter(2, 0.9))
    for parameter in module.beside.parameters():
        nn.init.normal_(parameter)
    plain = x @ module.weight.t() + module.bias
    for names in ((TRAINED,), (TRAINED, "other"), (TRAINED, "third"), ("third", "other"), ()):
        module.active = names
        change = sum((dense(module, name) for name in names), torch.zeros(6, 10).double())
        assert torch.allclose(module(x), plain + x @ change.t(), rtol=1e-12)
        assert torch.allclose(module.unbiased(x) + module.bias, module(x), rtol=1e-12)


@pytest.mark.parametrize("dora", [False, True])
def test_an_embedding_is_its_formula(dora: bool) -> None:
    module, ids = layer(nn.Embedding, dora=dora), torch.randint(0, 10, (2, 5))
    change = dense(module)
    assert torch.allclose(module(ids), (module.weight + change.t())[ids], rtol=1e-12)


def test_magnitudes_lengths_take_no_part_in_the_backward_pass() -> None:
    module, x = layer(dora=True), torch.randn(7, 10, dtype=torch.float64)
    module(x).square().sum().backward()
    A, B, magnitude = (
        p.detach().clone().requires_grad_()
        for p in (*module.factors(TRAINED), module.lora_magnitude_vector)
    )
    total = module.weight.detach() + 1.7 * (B @ A)
    lengths = total.detach().norm(dim=1, keepdim=True)
    y = x @ (magnitude[:, None] / lengths * total).t() + module.bias.detach()
    y.square().sum().backward()
    for found, expected in zip(
        (*module.factors(TRAINED), module.lora_magnitude_vector), (A, B, magnitude), strict=True
    ):
        assert torch.allclose(found.grad, expected.grad, rtol=1e-10)


@pytest.mark.parametrize("case", ["llama-biases", "qwen2", "phi3"])
@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"init": "gaussian", "targets": ("embed_tokens", "o_proj")},
        {"dora": True},
        {"init": "pissa", "dora": True},
        {"init": "pissa", "pissa_iterations": 4},
        {"modules_to_save": ("embed_tokens", "norm")},
    ],
)
def test_training_starts_from_the_base(case: str, spec: dict[str, Any]) -> None:
    model, ids = base(case), tokens(2, 9)
    before = logits(model, ids)
    adapted(model, learnt=False, **spec)
    assert torch.allclose(logits(model, ids), before, atol=2e-5)
    move(model)
    assert (logits(model, ids) - before).abs().max() > 0.1
    with adapters_off(model):
        assert torch.allclose(logits(model, ids), before, atol=2e-5)
    assert active(model) == (TRAINED,)


def test_first_values_are_those_of_the_definitions() -> None:
    model = adapted(base("llama"), learnt=False, rank=16, alpha=16.0)
    values = dict(model.named_parameters())
    A = torch.stack([v for n, v in values.items() if n.endswith("q_proj.lora_A.weight")])
    bound = 48**-0.5
    assert A.abs().max() <= bound and A.abs().max() > 0.98 * bound
    assert A.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert len({v.sum().item() for v in A}) == len(A)  # layers differ
    assert all(not v.any() for n, v in values.items() if n.endswith("lora_B.weight"))
    spec = {"init": "gaussian", "rank": 16, "targets": ("q_proj", "embed_tokens")}
    values = dict(adapted(base("llama"), learnt=False, **spec).named_parameters())
    A = torch.stack([v for n, v in values.items() if n.endswith("q_proj.lora_A.weight")])
    assert A.std().item() == pytest.approx(1 / 16, rel=0.03)
    assert not values["model.embed_tokens.lora_embedding_A"].any()
    assert values["model.embed_tokens.lora_embedding_B"].std().item() == pytest.approx(1, rel=0.1)


def test_first_values_do_not_depend_on_the_layout() -> None:
    spec = {"dora": True, "init": "pissa", "rank": 3}
    config = decoder_config(hf_config("llama-biases"))
    whole, stage = new_model(config), new_model(config, span=Span(1, 3, False, False))
    for model in (whole, stage):
        initialise(model, 7)
        add_adapter(model, AdapterSpec(**spec))
    # A worker's part of one layer: half of its outputs.
    name, rows = "model.layers.1.self_attn.q_proj", slice(24, 48)
    layer = stage.get_submodule(name)
    for own in ("weight", "lora_B.weight", "start_B.weight", "lora_magnitude_vector"):
        owner, _, last = f"{name}.{own}".rpartition(".")
        parameter = stage.get_parameter(f"{name}.{own}")
        part = nn.Parameter(parameter.detach()[rows].clone(), requires_grad=parameter.requires_grad)
        setattr(stage.get_submodule(owner), last, part)
        offsets = (24,) + (0,) * (parameter.ndim - 1)
        stage.pieces[f"{name}.{own}"] = Piece(tuple(parameter.shape), offsets, ((0, "tp"),))
    layer.out_features = 24
    with pytest.raises(ValueError, match="pass `read`"):
        initialise_adapter(stage, 3)
    initialise_adapter(whole, 3)
    initialise_adapter(stage, 3, drawn_weights(stage, 7))
    expected = dict(whole.named_parameters())
    for own, parameter in stage.named_parameters():
        found = expected[own][rows] if own in stage.pieces else expected[own]
        assert torch.equal(parameter, found), own


def test_only_the_adapter_is_trained() -> None:
    model = adapted(base("llama"), modules_to_save=("lm_head",), targets=("q_proj",))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    expected = {f"{name}.lora_{letter}.weight" for name in layers for letter in "AB"}
    assert trained == expected | {"lm_head.weight"}


def test_adapters_add_up_and_are_chosen_among() -> None:
    model, ids = base("llama"), tokens(1, 8)
    before = model(ids)
    adapted(model, targets=("q_proj",))
    spec = AdapterSpec(rank=2, targets=("q_proj", "down_proj"))
    attach(model, "other", spec, find_places(model, spec), keep_originals=True)
    for name, parameter in model.named_parameters():
        if ".beside.other." in name:
            assert not parameter.requires_grad
            nn.init.normal_(parameter, std=0.1)
    assert active(model) == (TRAINED, "other")
    both = model(ids)
    set_active(model, ["other"])
    other = model(ids)
    set_active(model, [])
    assert torch.equal(model(ids), before)
    set_active(model, [TRAINED])
    trained = model(ids)
    q_proj = model.get_submodule("model.layers.0.self_attn.q_proj")
    with torch.no_grad():  # the sum of both, written into the weights of a plain model
        plain = base("llama")
        for name, module in model.named_modules():
            if isinstance(module, Adapted):
                weight = plain.get_parameter(f"{name}.weight")
                for own in module.adapters:
                    A, B = module.factors(own)
                    weight += module.adapters[own].scale * (B @ A)
    assert torch.allclose(both, plain(ids), atol=1e-5)
    assert len({round(x.sum().item(), 2) for x in (before, both, other, trained)}) == 4
    assert q_proj.active == (TRAINED,)
    with pytest.raises(UserError, match=r"there is no adapter nobody.*\n.*default, other"):
        set_active(model, ["nobody"])
    with pytest.raises(UserError, match="cannot be called 'other' again"):
        attach(model, "other", spec, find_places(model, spec), keep_originals=True)


def test_modules_trained_whole_need_their_originals_kept() -> None:
    model = base("llama")
    spec = AdapterSpec(targets=("q_proj",), modules_to_save=("lm_head",))
    add_adapter(model, spec)
    initialise_adapter(model, 1)
    with pytest.raises(ValueError, match="no copy 'original'"), adapters_off(model):
        pass


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"targets": ("q_prj",)}, r"adapter.targets: there is no layer 'q_prj'\n.*'q_proj'"),
        ({"modules_to_save": ("head",)}, r"adapter.train_also: there is no layer 'head'"),
        ({"targets": ("self_attn",)}, r"model.layers.0.self_attn is a Attention"),
        ({"targets": ("gate_proj",)}, r"mlp.experts.gate_proj is the matrices of many experts"),
        ({"targets": ("mlp.gate",)}, r"model.layers.1.mlp.gate is a Router"),
        ({"targets": r"nothing.*"}, r"no layer of this model is meant by 'nothing"),
    ],
)
def test_what_cannot_be_adapted_is_told(spec: dict[str, Any], told: str) -> None:
    model = base("qwen3_moe")
    with pytest.raises(UserError, match=told):
        add_adapter(model, AdapterSpec(**spec))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_spec_tells_all_its_mistakes_at_once() -> None:
    with pytest.raises(UserError) as caught:
        AdapterSpec(rank=0, alpha=-1.0, dropout=1.0, targets="(", rank_pattern={"x": 0})
    keys = [mistake.key for mistake in caught.value.mistakes]
    expected = ["rank", "rank_pattern.x", "alpha", "dropout", "targets"]
    assert keys == [f"adapter.{key}" for key in expected]


def test_all_linear_is_every_linear_layer_of_the_blocks() -> None:
    model = adapted(base("qwen2_moe"))
    found = {name for name, m in model.named_modules() if isinstance(m, Adapted)}
    blocks = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert found == {name for name, _ in blocks if name.startswith("model.layers.")}
    assert any("shared_expert_gate" in name for name in found)


def test_dropout_follows_the_tokens_and_their_keys() -> None:
    module = layer(dropout=0.4).float()
    module.place = 5
    x = torch.randn(2, 6, 10)
    keys = layer_keys(token_keys(1, 2, torch.arange(2), torch.arange(6)), 3)
    A, B = module.factors(TRAINED)
    with dropping(keys):
        found = module(x)
    kept = dropout_reference(x, keys, 5, 0.4)
    expected = x @ module.weight.t() + module.bias + 1.7 * kept @ A.t() @ B.t()
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, module(x), atol=1e-2)  # nothing is dropped outside
    model = adapted(base("llama"), dropout=0.4, targets=("q_proj", "down_proj", "lm_head"))
    places = {name: m.place for name, m in model.named_modules() if isinstance(m, Adapted)}
    assert places["model.layers.0.self_attn.q_proj"] == places["model.layers.3.self_attn.q_proj"]
    assert len({places[f"model.layers.1.{n}"] for n in ("self_attn.q_proj", "mlp.down_proj")}) == 2
    assert min(places.values()) >= 2  # a block drops at 0 and 1 itself
    head = model.get_submodule("lm_head")
    assert isinstance(head, Adapted) and head.adapters[TRAINED].dropout == 0


@pytest.mark.parametrize("dora", [False, True])
def test_parts_of_a_layer_make_the_whole(dora: bool) -> None:
    """What tensor parallelism does by hand: outputs cut, inputs cut, outputs picked."""
    whole, x = layer(dora=dora), torch.randn(3, 4, 10, dtype=torch.float64)
    expected = whole(x)

    def part(rows: slice, columns: slice) -> Any:
        own = layer(dora=dora)
        own.weight = nn.Parameter(whole.weight.detach()[rows, columns])
        own.bias = nn.Parameter(whole.bias.detach()[rows])
        own.lora_A.weight = nn.Parameter(whole.lora_A.weight.detach()[:, columns])
        own.lora_B.weight = nn.Parameter(whole.lora_B.weight.detach()[rows])
        if dora:
            magnitudes = whole.lora_magnitude_vector.detach()[rows]
            own.lora_magnitude_vector = nn.Parameter(magnitudes)
        return own

    every, halves = slice(None), (slice(0, 5), slice(5, 10))
    outputs = [part(rows, every)(x) for rows in (slice(0, 2), slice(2, 6))]
    assert torch.allclose(torch.cat(outputs, -1), expected)
    inputs = [part(every, columns) for columns in halves]
    squares = [own._lengths(*own.factors(TRAINED), 1.7).square() for own in inputs]
    for own in inputs:
        own.sum_squares = lambda mine: sum(squares)
    total = sum(own.unbiased(x[..., c]) for own, c in zip(inputs, halves, strict=True))
    assert torch.allclose(total + whole.bias, expected)
    whole.chosen = torch.tensor([4, 1, 2])
    assert torch.allclose(whole(x), expected[..., [4, 1, 2]])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("spec", [{}, {"dora": True}])
def test_over_a_quantised_base(kind: Any, spec: dict[str, Any], tmp_path: Path) -> None:
    model, plain, ids = base(), base(), tokens(2, 9)
    quantise_model(model, QuantisedSpec(kind))
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, QuantisedLinear):
                plain.get_parameter(f"{name}.weight").copy_(module.dequantised())
    before = model(ids)
    adapted(model, learnt=False, **spec)
    assert torch.allclose(model(ids), before, atol=2e-5)
    adapted(plain, learnt=False, **spec)
    for each in (model, plain):
        move(each)
    found, expected = model(ids), plain(ids)
    assert torch.allclose(found, expected, atol=2e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            other = gradients[name].grad
            assert torch.allclose(parameter.grad, other, atol=1e-4 * other.abs().max()), name
    model = base()
    save_model(model, tmp_path)
    quantise_model(model, QuantisedSpec(kind))
    add_adapter(model, AdapterSpec(init="pissa", rank=8))
    with pytest.raises(ValueError, match="quantised: pass `read`"):
        initialise_adapter(model, 1)
    initialise_adapter(model, 1, saved_weights(model, tmp_path))
    # The rest is smaller than the whole, and so is what rounding does to it.
    assert (model(ids) - base()(ids)).norm() < 0.9 * (before - base()(ids)).norm()


def test_principal_factors_are_the_best_of_their_rank() -> None:
    torch.manual_seed(2)
    weight = torch.randn(40, 30) @ torch.diag(0.7 ** torch.arange(30)) @ torch.randn(30, 30)
    values = torch.linalg.svdvals(weight.double())
    for iterations, tolerance in ((None, 1e-5), (4, 1e-3)):
        A, B = principal_factors(weight, 5, 0.3, iterations)
        error = (weight - 0.3 * B @ A).norm().item()
        assert error == pytest.approx(values[5:].norm().item(), rel=tolerance)  # Eckart, Young
        assert torch.allclose(A.norm(dim=1), B.norm(dim=0), rtol=1e-3)
    again = principal_factors(weight, 5, 0.3, 4)
    assert torch.equal(A, again[0])


def test_a_model_with_adapters_loads_and_exports_its_base(tmp_path: Path) -> None:
    model = base("qwen2")
    save_model(model, tmp_path)
    expected = {name: tensor.clone() for name, tensor in model_tensors(model).items()}
    adapted(model, modules_to_save=("norm",), init="pissa")
    assert model_tensors(model).keys() == expected.keys()
    fresh = load_model(tmp_path)
    assert isinstance(fresh, Decoder)
    add_adapter(fresh, AdapterSpec(targets=("embed_tokens", "q_proj")), keep_originals=True)
    load_weights(fresh, tmp_path)
    for name, tensor in model_tensors(fresh).items():
        assert torch.equal(tensor, expected[name])


def test_a_base_in_bf16_and_autocast() -> None:
    model, ids = base("llama"), tokens(2, 9)
    exact = adapted(model)(ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(ids), exact, atol=0.15)
    narrow = base("llama").bfloat16()
    add_adapter(narrow, AdapterSpec(rank=4, alpha=6.0))
    initialise_adapter(narrow, 3)
    move(narrow)
    types = {p.dtype for p in narrow.parameters() if p.requires_grad}
    assert types == {torch.float32}
    found = narrow(ids)
    assert torch.allclose(found, exact, atol=0.15)
    found.sum().backward()
    assert all(p.grad is not None for p in narrow.parameters() if p.requires_grad)

"""Adapters on disk and in the weights: written, read back, refused; merged and taken out again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.models.adapter_cases import adapted, base, logits, move
from tests.models.cases import hf_config, tokens
from trainwright.errors import UserError
from trainwright.models.adapter_files import (
    CONFIG,
    WEIGHTS,
    fill_adapter,
    load_adapter,
    read_adapter_spec,
    save_adapter,
)
from trainwright.models.adapter_init import saved_weights
from trainwright.models.adapter_merge import merge, unmerge
from trainwright.models.adapter_spec import AdapterSpec
from trainwright.models.adapters import adapters_off, add_adapter, set_active, specs
from trainwright.models.decoder import Span
from trainwright.models.families import decoder_config
from trainwright.models.quantised import quantise_model
from trainwright.models.quantised_spec import QuantisedSpec
from trainwright.models.weights import load_weights, model_tensors, new_model, save_model

Edit = Callable[[dict[str, Any]], None]


def saved(directory: Path, case: str = "llama", **spec: Any) -> None:
    save_adapter(adapted(base(case), **spec), directory, base_model="a/model")


def test_the_config_says_what_the_spec_says(tmp_path: Path) -> None:
    spec = AdapterSpec(
        rank=3,
        alpha=5.0,
        dropout=0.1,
        targets=("mlp.down_proj", "q_proj"),
        exclude=("layers.0.mlp.down_proj",),
        rslora=True,
        dora=True,
        modules_to_save=("model.norm",),
        layers_to_transform=(0, 2),
        layers_pattern=("layers",),
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.2.self_attn.q_proj": 1.5},
        ties=False,
    )
    model = base()
    add_adapter(model, spec)
    save_adapter(model, tmp_path, base_model="a/model")
    text = (tmp_path / CONFIG).read_text()
    config = json.loads(text)
    assert list(config) == sorted(config) and text.startswith('{\n  "alpha_pattern"')
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "a/model"
    assert read_adapter_spec(tmp_path) == spec
    keys = load_file(tmp_path / WEIGHTS).keys()
    layer = "base_model.model.model.layers.2.self_attn.q_proj"
    names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    assert {key for key in keys if key.startswith(layer)} == {f"{layer}.{n}" for n in names}


def test_all_linear_is_written_as_names_that_mean_the_same(tmp_path: Path) -> None:
    for case, names in (
        ("phi3", ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
        ("llama", [f"{n}_proj" for n in ("down", "gate", "k", "o", "q", "up", "v")]),
    ):
        saved(tmp_path, case)
        assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == names


def test_an_adapter_goes_on_where_it_was(tmp_path: Path) -> None:
    """A run's export, taken up again by all stages, each filling what falls to it."""
    model, ids = base("llama"), tokens(1, 7)
    save_model(model, tmp_path / "base")
    adapted(model, dora=True, modules_to_save=("lm_head",), targets=("q_proj", "embed_tokens"))
    save_adapter(model, tmp_path)
    expected = dict(model.named_parameters())
    config = decoder_config(hf_config("llama"))
    found = {}
    for span in (Span(0, 2, heads=False), Span(2, 4, embeds=False)):
        stage = new_model(config, device="meta", span=span)
        add_adapter(stage, read_adapter_spec(tmp_path), strict=False, keep_originals=True)
        stage.to_empty(device="cpu")
        load_weights(stage, tmp_path / "base")
        fill_adapter(stage, tmp_path)
        assert {p.requires_grad for n, p in stage.named_parameters() if ".lora_" in n} == {True}
        found |= dict(stage.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name]), name
    # Whole tensors that were gathered from the stages make the same files.
    save_adapter(stage, tmp_path / "again", tensors=found)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()
    assert logits(model, ids).shape == (1, 7, 97)


def test_pissa_is_written_so_that_it_fits_the_base(tmp_path: Path) -> None:
    model, ids = base(), tokens(2, 9)
    before = base()(ids)
    adapted(model, learnt=False, init="pissa", rslora=True, rank_pattern={"v_proj": 2})
    save_adapter(model, tmp_path / "start")
    move(model)
    save_adapter(model, tmp_path / "end")
    for name, expected in (("start", before), ("end", model(ids))):
        again = base()
        load_adapter(again, tmp_path / name, name=name)
        assert torch.allclose(again(ids), expected, atol=2e-5)
        spec = specs(again)[name]
        assert (spec.rank, spec.rank_pattern, spec.init) == (8, {"v_proj": 4}, "default")


REFUSED: dict[str, tuple[Edit, str]] = {
    "kind": (lambda c: c.update(peft_type="IA3"), "peft_type: is 'IA3'"),
    "bias": (lambda c: c.update(bias="lora_only"), "bias: is 'lora_only': biases were trained"),
    "start": (lambda c: c.update(init_lora_weights="olora"), "init_lora_weights: is 'olora'"),
    "fast-pissa": (
        lambda c: c.update(init_lora_weights="pissa_niter_4"),
        "init_lora_weights: is 'pissa_niter_4'",
    ),
    "experts": (
        lambda c: c.update(target_parameters=["mlp.experts.up"]),
        "target_parameters: adapts matrices of experts",
    ),
    "unknown": (lambda c: c.update(use_qalora=True), "use_qalora: does what is not known here"),
    "future": (lambda c: c.update(swirl=0.5), "swirl: does what is not known here: 0.5"),
    "rank": (lambda c: c.update(r="x"), "r: ranks are no whole numbers"),
    "another-rank": (lambda c: c.update(r=5), r"q_proj.lora_A.weight is \[4, 48\] in the file"),
    "fewer": (lambda c: c.update(target_modules=["q_proj"]), "4? tensors are in the file, and"),
    "more": (lambda c: c["target_modules"].append("k_proj"), "tensors are missing from the file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_compute_something_else_is_refused(name: str, tmp_path: Path) -> None:
    saved(tmp_path, targets=("q_proj", "o_proj"))
    config = json.loads((tmp_path / CONFIG).read_text())
    edit, told = REFUSED[name]
    edit(config)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    model = base("llama")
    before = model.state_dict().keys()
    with pytest.raises(UserError) as caught:
        load_adapter(model, tmp_path)
    assert re.search(told, str(caught.value))
    assert str(tmp_path) in str(caught.value) and "fix:" in str(caught.value)
    assert model.state_dict().keys() == before  # nothing was changed
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_several_unknown_keys_are_told_at_once(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config |= {"lora_bias": True, "alora_invocation_tokens": [3], "unknown_but_off": False}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        read_adapter_spec(tmp_path)
    keys = {mistake.key for mistake in caught.value.mistakes}
    assert keys == {"lora_bias", "alora_invocation_tokens"}


def test_broken_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no adapter_config.json"):
        load_adapter(base(), tmp_path)
    saved(tmp_path)
    weights = tmp_path / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter(base(), tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="only Python pickles"):
        load_adapter(base(), tmp_path)


def test_an_adapter_over_other_embeddings_is_refused(tmp_path: Path) -> None:
    """PEFT saves the base's embedding beside an adapter of it."""
    saved(tmp_path, targets=("embed_tokens",))
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    embedding = base("llama").get_parameter("model.embed_tokens.weight").detach()
    for tensor, fits in (
        (embedding, True),
        (embedding.bfloat16(), True),
        (embedding + 0.1, False),
        (embedding[:-1].clone(), False),
    ):
        save_file({**tensors, key: tensor}, tmp_path / WEIGHTS)
        if fits:
            load_adapter(base("llama"), tmp_path)
            continue
        with pytest.raises(UserError, match=r"over another model.embed_tokens.weight"):
            load_adapter(base("llama"), tmp_path)


def test_two_adapters_that_replace_the_same_module(tmp_path: Path) -> None:
    ids, model = tokens(1, 6), base("llama")
    expected = {}
    for seed, name in enumerate(("one", "two")):
        own = adapted(base("llama"), learnt=False, targets=("q_proj",), modules_to_save=("norm",))
        move(own, seed)
        save_adapter(own, tmp_path / name)
        expected[name] = own(ids)
    load_adapter(model, tmp_path / "one", name="one")
    load_adapter(model, tmp_path / "two", name="two")
    before = base("llama")(ids)
    for name in ("one", "two", "one"):
        set_active(model, [name])
        assert torch.allclose(model(ids), expected[name], atol=1e-6)
        with adapters_off(model):
            assert torch.equal(model(ids), before)
    with pytest.raises(UserError, match=r"one and two each have a model.norm of their own"):
        set_active(model, ["one", "two"])
    merge(model)
    assert torch.allclose(model(ids), expected["one"], atol=1e-5)


@pytest.mark.parametrize(
    ("case", "spec"),
    [
        ("llama-biases", {"dora": True}),
        ("phi3", {"rslora": True}),
        ("qwen2", {"targets": ("embed_tokens", "v_proj"), "dora": True}),
        ("llama", {"targets": ("lm_head", "q_proj"), "modules_to_save": ("embed_tokens",)}),
        ("llama", {"init": "pissa"}),
    ],
)
def test_merging_and_taking_out_again(case: str, spec: dict[str, Any]) -> None:
    ids, model = tokens(2, 9), adapted(base(case), **spec)
    expected = logits(model, ids)
    before = {name: tensor.clone() for name, tensor in model_tensors(model).items()}
    merge(model)
    # A plain model with the merged tensors, as an export is read.
    plain = base(case)
    missing, extra = plain.load_state_dict(model_tensors(model), strict=False)
    assert not missing and not extra
    assert torch.allclose(plain(ids), expected, atol=1e-5)
    assert torch.allclose(logits(model, ids), expected, atol=1e-5)
    with pytest.raises(ValueError, match="unmerge them first"), adapters_off(model):
        pass
    unmerge(model)
    for name, tensor in model_tensors(model).items():
        assert torch.allclose(tensor, before[name], atol=1e-6), name
    assert torch.allclose(logits(model, ids), expected, atol=1e-5)
    with pytest.raises(ValueError, match="no merged adapters"):
        unmerge(model)


def test_a_merged_weight_in_bf16_is_rounded_once() -> None:
    model = adapted(base("llama").bfloat16(), targets=("q_proj",))
    name = "model.layers.0.self_attn.q_proj"
    weight = model.get_parameter(f"{name}.weight").double()
    A, B = (model.get_parameter(f"{name}.lora_{letter}.weight").double() for letter in "AB")
    exact = weight + 1.5 * B @ A
    merge(model)
    found = model.get_parameter(f"{name}.weight")
    assert (found != exact.bfloat16()).float().mean() < 0.002  # fp32's own rounding at ties


@pytest.mark.parametrize("spec", [{}, {"dora": True, "modules_to_save": ("norm",)}])
def test_merging_over_a_quantised_base_gives_plain_layers(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    ids, model = tokens(2, 9), base()
    names = {name: type(module) for name, module in model.named_modules()}
    quantise_model(model, QuantisedSpec("nf4"))
    adapted(model, **spec)
    expected = model(ids)
    merge(model)
    assert torch.allclose(model(ids), expected, atol=2e-5)
    assert {name: type(module) for name, module in model.named_modules()} == names
    assert model.state_dict().keys() == base().state_dict().keys()
    save_model(model, tmp_path)
    with pytest.raises(ValueError, match="no merged adapters"):
        unmerge(model)


def test_a_tied_head_that_does_not_follow_cannot_be_merged(tmp_path: Path) -> None:
    ids = tokens(2, 9)
    for spec in ({"targets": ("embed_tokens",)}, {"modules_to_save": ("embed_tokens",)}):
        model = adapted(base("qwen2"), ties=False, **spec)
        head = logits(model, ids)
        with pytest.raises(UserError, match=r"the output head is the embedding's matrix"):
            merge(model)
        tied = adapted(base("qwen2"), **spec)
        assert (logits(tied, ids) - head).abs().max() > 0.01


def test_weights_as_they_were_come_from_the_directory(tmp_path: Path) -> None:
    model = base("qwen3_moe")
    save_model(model, tmp_path)
    read = saved_weights(model, tmp_path)
    adapted(model, targets=("q_proj",))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            weight = model.get_parameter(f"{name}.weight")
            assert torch.equal(read(f"{name}.weight"), weight)

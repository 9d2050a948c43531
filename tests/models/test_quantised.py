"""Models whose frozen linear layers are in 4 or 8 bits: put in place, filled, cut, sharded."""

from __future__ import annotations

import copy
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.models.cases import hf_config, randomise, reference_model, tokens
from tests.workers import run_on
from trainwright.errors import UserError
from trainwright.kernels import nf4
from trainwright.kernels.nf4_files import STATE, to_bitsandbytes
from trainwright.models.decoder import Decoder
from trainwright.models.fallback import FallbackModel
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.models.quantised import QuantisedLinear, quantise_model, quantised
from trainwright.models.quantised_files import initialise_quantised, load_quantised
from trainwright.models.quantised_spec import QuantisedSpec, can_cut, quantised_bytes
from trainwright.models.safetensors_files import SINGLE, save_weights
from trainwright.models.weights import initialise, load_model, model_tensors, new_model

SPECS = [QuantisedSpec(), QuantisedSpec(double_quant=False), QuantisedSpec("int8")]
NF4, PLAIN_NF4, INT8 = SPECS


def saved(directory: Path, name: str = "llama", shard_bytes: int = 10**9) -> Decoder:
    """A random model, and its directory."""
    model = new_model(decoder_config(hf_config(name)))
    randomise(model)
    save_weights(model_tensors(model), directory, shard_bytes=shard_bytes)
    return model


def filled(directory: Path, spec: QuantisedSpec, name: str = "llama") -> Decoder:
    """The directory's model, quantised as it is loaded."""
    model = new_model(decoder_config(hf_config(name)), device="meta")
    quantise_model(model, spec)
    model.to_empty(device="cpu")
    load_quantised(model, directory)
    return model.eval()


def layers_of(model: nn.Module) -> dict[str, QuantisedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}


def with_values_of(plain: Decoder, model: Decoder) -> Decoder:
    """`plain` with the values that `model`'s quantised layers stand for."""
    plain = copy.deepcopy(plain).eval()
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            plain.get_submodule(name).weight.copy_(layer.dequantised())
    return plain


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["llama-odd", "llama-biases", "phi3", "qwen2_moe", "deepseek"])
def test_a_model_computes_with_the_values_that_its_layers_stand_for(
    name: str, spec: QuantisedSpec
) -> None:
    model = new_model(decoder_config(hf_config(name)))
    randomise(model)
    plain = copy.deepcopy(model)
    names = quantise_model(model, spec)
    linear = {
        name
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(("lm_head", "shared_expert_gate"))
    }
    assert set(names) == set(layers_of(model)) == linear
    assert all(layer.weight.dtype != torch.float32 for layer in layers_of(model).values())
    row = tokens(2, 11)
    with torch.no_grad():
        expected = with_values_of(plain, model)(row)
        torch.testing.assert_close(model.eval()(row), expected, atol=2e-5, rtol=2e-5)
        assert (expected - plain(row)).abs().max() > 1e-3  # rounding did change the weights


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_quantised_as_it_is_loaded_is_what_is_quantised_in_place(
    spec: QuantisedSpec, shard_bytes: int, tmp_path: Path
) -> None:
    expected = saved(tmp_path, "qwen2_moe", shard_bytes)
    quantise_model(expected, spec)
    model = filled(tmp_path, spec, "qwen2_moe")
    wanted = expected.state_dict()
    got = model.state_dict()
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def test_new_weights_are_those_of_a_plain_model_quantised() -> None:
    config = decoder_config(hf_config("qwen2_moe"))
    expected, model = new_model(config), new_model(config, device="meta")
    initialise(expected, 3)
    quantise_model(expected, NF4)
    quantise_model(model, NF4)
    model.to_empty(device="cpu")
    initialise_quantised(model, 3)
    wanted = expected.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_no_more_than_one_weight_is_there_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)
    take, taken = QuantisedLinear.take, 0

    def watched(layer: QuantisedLinear, weight: Tensor) -> None:
        nonlocal taken
        taken += 1
        if taken == 4 * 7:  # the last: what was kept of all before would be here
            full = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == weight.shape]
            # What other tests left of tensors without memory is at no address.
            there = {t.data_ptr() for t in full if t.is_floating_point() and t.data_ptr()}
            assert there == {weight.data_ptr()}
        take(layer, weight)

    monkeypatch.setattr(QuantisedLinear, "take", watched)
    gc.collect()
    filled(tmp_path, NF4)
    assert taken == 4 * 7


def test_layers_are_skipped_by_name() -> None:
    model = new_model(decoder_config(hf_config("llama")), device="meta")
    spec = QuantisedSpec(skip=("down_proj", "layers.2.self_attn.q_proj", r"model\.layers\.3\..*"))
    names = quantise_model(model, spec)
    assert len(names) == 3 * 6 - 1
    assert "model.layers.2.self_attn.q_proj" not in names
    assert not any(name.endswith("down_proj") or ".3." in name for name in names)
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_in_place_too_a_weight_that_is_not_finite_is_named() -> None:
    model = new_model(decoder_config(hf_config("llama")))
    randomise(model)
    with torch.no_grad():
        model.model.layers["1"].mlp.up_proj.weight[3, 5] = torch.inf
    with pytest.raises(
        UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are not"
    ):
        quantise_model(model, NF4)


@pytest.mark.parametrize("family", ["gpt_neox", "granitemoe"])
def test_a_fallback_model_is_quantised_where_it_stands(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2}
    config = AutoConfig.for_model(
        family, vocab_size=97, num_attention_heads=4, max_position_embeddings=64, **sizes
    )
    inner = AutoModelForCausalLM.from_config(config).eval()
    randomise(inner)
    plain = FallbackModel(copy.deepcopy(inner))
    model = FallbackModel(inner)
    names = quantise_model(model, NF4)
    assert names and all("layers." in name for name in names)
    assert not any(name.endswith("router.layer") for name in names)
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            plain.get_submodule(name).weight.copy_(layer.dequantised())
        row = tokens(2, 9)
        torch.testing.assert_close(model(row), plain(row), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_flow_through_and_none_to_the_weight(spec: QuantisedSpec) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(72, 40)
    layer = quantised(linear, spec)
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad
    with torch.no_grad():
        linear.weight.copy_(layer.dequantised())
    results = []
    for module in (linear, layer):
        x = torch.randn(3, 72, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = module(x).square().sum()
        results.append([y, *torch.autograd.grad(y, (x, linear.bias))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_memory_is_what_the_formula_says(spec: QuantisedSpec) -> None:
    for out, inside in ((64, 172), (512, 1024), (3, 21)):
        layer = quantised(nn.Linear(inside, out, bias=False), spec)
        held = sum(tensor.nbytes for tensor in layer.state_dict().values())
        assert held == quantised_bytes((out, inside), spec.kind, spec.double_quant)
    # QLoRA, section 3: 0.5 bits a value for plain scales, 0.127 for quantised ones.
    assert quantised_bytes((4096, 4096), "nf4", False) * 8 / 2**24 == 4.5
    assert quantised_bytes((4096, 4096), "nf4") * 8 / 2**24 == pytest.approx(4.127, 1e-4)


@pytest.mark.parametrize("spec", SPECS)
def test_scales_survive_what_narrows_a_model(spec: QuantisedSpec) -> None:
    layer = quantised(nn.Linear(64, 96), spec)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(torch.bfloat16)
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16
    for name, tensor in layer.state_dict().items():
        if name != "bias":
            assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype
    other = QuantisedLinear(64, 96, kind=spec.kind, double_quant=spec.double_quant)
    other.load_state_dict({n: t for n, t in before.items() if n != "bias"})
    assert torch.equal(other.dequantised(), layer.dequantised())


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("spec", SPECS)
def test_parts_multiply_to_what_the_whole_does(spec: QuantisedSpec, dim: int) -> None:
    """Column-parallel parts side by side and row-parallel parts added up, as parts of parts."""
    torch.manual_seed(0)
    weight, x = torch.randn(64, 256), torch.randn(3, 256)
    whole = quantised(nn.Linear(256, 64, bias=False), spec)
    whole.take(weight)
    results = []
    for first in range(2):
        for second in range(2):
            options = {"kind": spec.kind, "double_quant": spec.double_quant, "device": "meta"}
            part = QuantisedLinear(256, 64, None, **options)
            part.cut(dim, first, 2)
            part.cut(dim, second, 2)
            part.to_empty(device="cpu")
            part.take(weight)
            rows, columns = part.rows, part.columns
            assert torch.equal(part.dequantised(), whole.dequantised()[rows, columns])
            held = sum(tensor.nbytes for tensor in part.state_dict().values())
            assert held == quantised_bytes(part.shape, spec.kind, double_quant=False)
            results.append(part(x[:, columns]))
    total = torch.cat(results, -1) if dim == 0 else torch.stack(results).sum(0)
    torch.testing.assert_close(total, whole(x), atol=2e-5, rtol=1e-5)


def test_parts_that_cut_a_block_are_refused() -> None:
    assert can_cut((64, 128), "nf4", 1, 2) and not can_cut((64, 128), "nf4", 1, 4)
    assert can_cut((8, 48), "nf4", 0, 2) and not can_cut((8, 48), "nf4", 0, 4)
    assert can_cut((8, 48), "int8", 1, 4) and not can_cut((8, 48), "int8", 1, 5)
    layer = QuantisedLinear(128, 64, None, device="meta")
    with pytest.raises(ValueError, match="whole blocks"):
        layer.cut(1, 0, 4)


def train_sharded(directory: str, narrow: bool) -> list[Tensor]:
    """Logits and an input's gradient of a quantised model whose blocks are sharded."""
    model = new_model(decoder_config(hf_config("llama")), device="meta")
    quantise_model(model, NF4)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if narrow else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device="cpu")
    load_quantised(model, directory)
    bytes_here = layers_of(model)["model.layers.0.mlp.up_proj"].weight.to_local().numel()
    assert bytes_here == 48 * 76 // 2 // dist.get_world_size()
    return results_of(model)


def results_of(model: Decoder) -> list[Tensor]:
    logits = model(tokens(2, 7))
    logits.square().mean().backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return [
        logits.detach(),
        gradient.float(),
        *(m.dequantised() for m in layers_of(model).values()),
    ]


@pytest.mark.parametrize("narrow", [False, True])
def test_shards_are_gathered_as_they_are(tmp_path: Path, narrow: bool) -> None:
    """Packed bytes are cut between two workers, whatever type other weights are narrowed to."""
    saved(tmp_path)
    model = filled(tmp_path, NF4)
    if narrow:
        model.to(torch.bfloat16)
    expected = results_of(model)
    tolerance = 3e-2 if narrow else 1e-5
    for found in run_on(2, train_sharded, str(tmp_path), narrow):
        for number, (got, want) in enumerate(zip(found, expected, strict=True)):
            exact = number >= 2
            limit = 0.0 if exact else tolerance * want.abs().max().item()
            assert (got - want).abs().max() <= limit


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        filled(directory, NF4)
    return str(caught.value)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / SINGLE
    whole = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({n: t for n, t in whole.items() if n != name}, file)
    assert name in refusal(tmp_path)
    save_file(whole | {name: torch.zeros(48, 75)}, file)
    assert f"{name} is [48, 75] in the files" in refusal(tmp_path)
    save_file(whole | {name: whole[name] / 0}, file)
    assert f"{name} holds values that are not finite" in refusal(tmp_path)

    stored = to_bitsandbytes(nf4.quantise(whole[name]), name, torch.float32)
    save_file(whole | stored, file)
    assert torch.equal(
        filled(tmp_path, NF4).model.layers["1"].mlp.down_proj.dequantised(),
        nf4.dequantise(nf4.quantise(whole[name])),
    )
    save_file({n: t for n, t in (whole | stored).items() if n != name}, file)
    assert name in refusal(tmp_path)
    save_file({n: t for n, t in (whole | stored).items() if n != f"{name}.absmax"}, file)
    assert f"{name} lacks absmax" in refusal(tmp_path)
    other = to_bitsandbytes(nf4.quantise(whole[name].t()), name, torch.float32)
    save_file(whole | other, file)
    assert f"{name} is [76, 48], not [48, 76]" in refusal(tmp_path)


@pytest.mark.parametrize("double", [True, False])
def test_what_transformers_saves_with_bitsandbytes_loads(double: bool, tmp_path: Path) -> None:
    """Into layers of any kind, with the values that it has, and with its logits."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # Rows of whole blocks: where rows end within them, its CPU kernel takes wrong scales.
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
    }
    hf = new_hf_config("llama", sizes, 97)
    reference_model(hf).save_pretrained(tmp_path / "full")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", quantization_config=config, attn_implementation="eager"
    )
    theirs.save_pretrained(tmp_path / "packed", max_shard_size="40KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1

    def loaded(folder: str, spec: QuantisedSpec) -> Decoder:
        model = new_model(decoder_config(hf), device="meta")
        quantise_model(model, spec)
        model.to_empty(device="cpu")
        load_quantised(model, tmp_path / folder)
        return model.eval()

    ours = loaded("packed", NF4)
    same = loaded("full", QuantisedSpec(double_quant=double)).state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, same[name]), name
    for name, layer in layers_of(loaded("packed", INT8)).items():
        close = layers_of(ours)[name].dequantised()
        step = close.abs().amax(1, keepdim=True) / 127
        assert ((layer.dequantised() - close).abs() <= 0.51 * step).all()

    row = tokens(2, 9)
    theirs.train()  # in evaluation its product runs in bf16
    torch.testing.assert_close(ours(row), theirs(row).logits.float(), atol=1e-5, rtol=1e-5)


def test_a_packed_weight_for_a_layer_that_is_skipped_is_refused(tmp_path: Path) -> None:
    model = saved(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    stored = to_bitsandbytes(nf4.quantise(model.get_parameter(name)), name, torch.float32)
    save_file(load_file(tmp_path / SINGLE) | stored, tmp_path / SINGLE)
    with pytest.raises(UserError) as caught:
        filled(tmp_path, QuantisedSpec(skip=("down_proj",)))
    assert f"{name} is [1824, 1] in the files, [48, 76] in the model" in str(caught.value)
    assert f"{name}.{STATE}" in str(caught.value)


@pytest.mark.shared
@torch.no_grad()
def test_a_trained_model_loses_little(shared: Any, tmp_path: Path) -> None:
    """Its own text: 8 bits change the loss by next to nothing, 4 bits by a few hundredths."""
    directory = shared / "weights" / "stories260K_hf"
    plain = load_model(directory)
    row = torch.randint(3, 512, (4, 1), generator=torch.Generator().manual_seed(0))
    for _ in range(60):  # what it finds most likely after a random token
        row = torch.cat([row, plain(row)[:, -1:].argmax(-1)], 1)

    def loss(model: nn.Module) -> float:
        logits = model(row[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten()).item()

    config = json.loads((directory / "config.json").read_text())
    shutil.copy(directory / SINGLE, tmp_path)
    losses = {}
    for spec in SPECS:
        model = new_model(decoder_config(config), device="meta")
        quantise_model(model, spec)
        model.to_empty(device="cpu")
        load_quantised(model, tmp_path)
        losses[spec] = loss(model.eval())
    start = loss(plain)
    assert abs(losses[INT8] - start) < 0.01
    assert abs(losses[NF4] - losses[PLAIN_NF4]) < 0.05
    assert 0 < losses[NF4] - start < 0.1

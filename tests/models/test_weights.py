"""Weights: initialised alike on any layout, streamed in, written back bit for bit, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.models.cases import CASES, by_our_names, hf_config, randomise, tokens
from tests.workers import run_on
from trainwright.errors import UserError
from trainwright.models.decoder import Decoder
from trainwright.models.families import decoder_config
from trainwright.models.safetensors_files import INDEX, SINGLE, save_weights
from trainwright.models.weights import (
    initialise,
    load_model,
    load_weights,
    model_tensors,
    new_model,
)


def saved(directory: Path, name: str = "llama", shard_bytes: int = 10**9) -> Decoder:
    """A random model, and its directory."""
    hf = hf_config(name)
    model = new_model(decoder_config(hf))
    randomise(model)
    save_weights(model_tensors(model), directory, shard_bytes=shard_bytes)
    (directory / "config.json").write_text(json.dumps(hf))
    return model


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(directory)
    return str(caught.value)


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
@pytest.mark.parametrize("name", ["llama-odd", "gemma2", "phi3"])
def test_save_load_save_is_bit_identical(name: str, shard_bytes: int, tmp_path: Path) -> None:
    model = saved(tmp_path / "one", name, shard_bytes)
    files = save_weights(
        model_tensors(load_model(tmp_path / "one")), tmp_path / "two", shard_bytes=shard_bytes
    )
    assert (len(files) > 1) == (shard_bytes < 10**9)
    assert all(file.stat().st_size <= shard_bytes + 20_000 for file in files)
    for file in (tmp_path / "two").iterdir():
        assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes()
    shutil.copy(tmp_path / "one" / "config.json", tmp_path / "two")
    with torch.no_grad():
        row = tokens(1, 9)
        assert torch.equal(load_model(tmp_path / "two")(row), model(row))


def test_the_dtype_is_fp32_unless_asked(tmp_path: Path) -> None:
    model = saved(tmp_path).bfloat16()
    save_weights(model_tensors(model), tmp_path)
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float32}
    narrow = load_model(tmp_path, dtype=torch.bfloat16)
    for one, other in zip(narrow.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_smaller_save_leaves_nothing_of_a_larger_one(tmp_path: Path) -> None:
    saved(tmp_path, shard_bytes=20_000)
    saved(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", SINGLE]
    load_model(tmp_path)


def test_transformers_reads_what_we_write(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = saved(tmp_path, "qwen3", shard_bytes=40_000).eval()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    row = tokens(2, 9)
    with torch.no_grad():
        assert (theirs(row).logits - model(row)).abs().max() <= 2e-5


def test_stop_tokens_come_from_the_generation_config(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": 5}))
    assert load_model(tmp_path).stop_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load_model(tmp_path).stop_token_ids == (7, 8)


# What is refused


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    saved(tmp_path, shard_bytes=40_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(tmp_path)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    content = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content[: len(content) // 2])
    assert str(tmp_path / SINGLE) in refusal(tmp_path)


def test_wrong_tensors_are_all_named(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    tensors["model.norm.scale"] = tensors.pop("model.norm.weight")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 4)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)  # old, harmless
    save_file(tensors, tmp_path / SINGLE)
    told = refusal(tmp_path)
    assert "missing from the files: model.norm.weight" in told
    assert "not in the model: model.norm.scale" in told
    assert "model.layers.1.mlp.up_proj.weight is [3, 4] in the files, [76, 48]" in told
    assert "inv_freq" not in told


def test_a_tied_models_second_name_is_read_past(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama-odd")
    tensors = load_file(tmp_path / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / SINGLE)
    assert model_tensors(load_model(tmp_path)).keys() == model_tensors(model).keys()


def test_pickles_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / "pytorch_model.bin")
    assert "save_pretrained" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda d: (d / SINGLE).unlink(), "there are no weights"),
        (lambda d: (d / "config.json").unlink(), "there is no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "cannot be read"),
        (lambda d: (d / "config.json").write_text("[]"), "not a JSON object"),
        (lambda d: (d / INDEX).write_text("{}"), "weight_map"),
    ],
)
def test_a_broken_directory_is_explained(tmp_path: Path, spoil: object, expected: str) -> None:
    saved(tmp_path)
    spoil(tmp_path)  # type: ignore[operator]
    told = refusal(tmp_path)
    assert expected in told
    assert str(tmp_path) in told


def test_a_config_mistake_names_the_file(tmp_path: Path) -> None:
    saved(tmp_path)
    hf = {**hf_config("llama"), "num_key_value_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert f"{tmp_path / 'config.json'}: num_key_value_heads" in refusal(tmp_path)


def test_names_that_cannot_be_found(tmp_path: Path) -> None:
    for name in ("./nowhere", str(tmp_path / "nowhere"), "someone/some-model", "no model"):
        with pytest.raises(UserError):
            load_model(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        load_model(tmp_path / "file")


# Initialisation


@pytest.mark.parametrize("name", CASES)
def test_values_follow_the_familys_rules(name: str) -> None:
    """As transformers' `_init_weights` leaves them, up to the numbers drawn."""
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = {**hf_config(name), "pad_token_id": 3, "initializer_range": 0.05}
    keys = {key: value for key, value in hf.items() if key not in ("model_type", "architectures")}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(hf["model_type"], **keys))
    model = new_model(decoder_config(hf))
    initialise(model, seed=1)
    expected = by_our_names(dict(theirs.named_parameters()))
    for parameter_name, parameter in model.named_parameters():
        wanted = expected[parameter_name]
        if wanted.std() == 0:
            assert torch.equal(parameter, wanted), parameter_name
        else:
            tolerance = max(0.1, 3 / (2 * wanted.numel()) ** 0.5)
            for tensor in (parameter, wanted):
                assert tensor.std().item() == pytest.approx(0.05, rel=tolerance), parameter_name
    assert (model.model.embed_tokens.weight[3] == 0).all()


def test_seeds_and_names_decide_the_values() -> None:
    def values(seed: int) -> dict[str, torch.Tensor]:
        model = new_model(decoder_config(hf_config("llama")))
        initialise(model, seed)
        return model_tensors(model)

    one, again, other = values(1), values(1), values(2)
    matrix = "model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one[matrix], other[matrix])
    assert not torch.equal(one[matrix], one[matrix.replace("layers.0", "layers.1")])


def shard_and_fill(directory: str | None, mesh_shape: tuple[int, ...]) -> dict:
    """On a worker: a sharded model, initialised or loaded, gathered again."""
    model = new_model(decoder_config(hf_config("llama-odd")), device="meta")
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    if directory is None:
        initialise(model, 7)
    else:
        load_weights(model, directory)
    return {name: p.full_tensor().detach().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("mesh_shape", [(3,), (2, 1), (1, 2)])
def test_any_layout_gives_the_same_values(mesh_shape: tuple[int, ...], tmp_path: Path) -> None:
    """Three workers do not divide the 97 rows of the embedding, nor the 20 of a key head."""
    workers = torch.tensor(mesh_shape).prod().item()
    whole = new_model(decoder_config(hf_config("llama-odd")))
    initialise(whole, 7)
    loaded = saved(tmp_path, "llama-odd", shard_bytes=30_000)
    for directory, expected in ((None, whole), (str(tmp_path), loaded)):
        for parts in run_on(workers, shard_and_fill, directory, mesh_shape):
            for name, tensor in model_tensors(expected).items():
                assert torch.equal(torch.from_numpy(parts[name]), tensor), name


def test_workers_read_their_own_slices_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing asks for a whole tensor but the parameter that holds the whole."""
    saved(tmp_path)
    read: list[int] = []

    class Counting:
        def __init__(self, part: object) -> None:
            self.part = part
            self.get_shape = part.get_shape  # type: ignore[attr-defined]

        def __getitem__(self, slices: tuple[slice, ...]) -> torch.Tensor:
            tensor = self.part[slices]  # type: ignore[index]
            read.append(tensor.numel())
            return tensor

    class Handle:
        def __init__(self, *args: object, **options: object) -> None:
            self.inner = safe_open(*args, **options)

        def __enter__(self) -> Handle:
            self.inner = self.inner.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.inner.__exit__(*error)

        def keys(self) -> list[str]:
            return self.inner.keys()

        def get_slice(self, name: str) -> Counting:
            return Counting(self.inner.get_slice(name))

    monkeypatch.setattr("trainwright.models.weights.safe_open", Handle)
    model = load_model(tmp_path)
    assert sum(read) == sum(parameter.numel() for parameter in model.parameters())

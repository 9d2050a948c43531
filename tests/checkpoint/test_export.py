"""Exports load in transformers, equal to what was trained, whoever saved the checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.workers import run_on
from trainwright.checkpoint.export import export_checkpoint
from trainwright.checkpoint.model_card import model_card
from trainwright.checkpoint.state import training_tensors
from trainwright.checkpoint.store import CheckpointStore
from trainwright.errors import UserError

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(tied: bool, seed: int = 3) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied))


def config(tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float64",  # of the model it was made from; must not survive
        "tie_word_embeddings": tied,
        **SHAPE,
    }


def save_llama(root: Path, tied: bool) -> None:
    model = llama(tied)
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # a state, but the same weights
    model(torch.tensor([[1, 5, 7]])).logits.sum().backward()
    optimizer.step()
    with CheckpointStore(root) as store:
        store.save(10, training_tensors(model, optimizer), {})


@pytest.fixture
def tokenizer_directory(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "one", "two"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "model.safetensors").touch()  # nothing of a tokenizer
    return tmp_path / "tokenizer"


def export(root: Path, destination: Path, tied: bool, **options: Any) -> Path:
    options = {"card": "a card", "hf_config": config(tied), **options}
    return export_checkpoint(root, 10, destination, **options)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_the_same_model(
    world_size: int, tied: bool, tmp_path: Path, tokenizer_directory: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if world_size == 1:
        save_llama(tmp_path / "checkpoints", tied)
    else:
        run_on(world_size, save_llama, tmp_path / "checkpoints", tied)
    export(
        tmp_path / "checkpoints",
        tmp_path / "export",
        tied,
        tokenizer_directory=tokenizer_directory,
        shard_bytes=20_000,
    )
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert {"config.json", "generation_config.json", "README.md", "tokenizer.json"} <= names
    shards = list((tmp_path / "export").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 22_000 for path in shards)

    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(report.values()), report
    expected = llama(tied)
    assert model.dtype == torch.float32
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    ids = torch.tensor([[1, 4, 9, 2]])
    assert torch.equal(model(ids).logits, expected.eval()(ids).logits)
    assert model.generation_config.eos_token_id == 2
    assert model.generation_config.pad_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer("two one").input_ids == [4, 3]
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize(
    "dtype, torch_dtype", [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")]
)
def test_dtype(dtype: str, torch_dtype: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_llama(tmp_path / "checkpoints", tied=True)
    export(tmp_path / "checkpoints", tmp_path / "export", tied=True, dtype=dtype)
    written = json.loads((tmp_path / "export" / "config.json").read_text())
    assert written["dtype"] == torch_dtype
    assert "torch_dtype" not in written and "transformers_version" in written
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    expected = llama(tied=True).to(getattr(torch, torch_dtype)).state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


def test_only_weights_and_the_head_once(tmp_path: Path) -> None:
    save_llama(tmp_path / "checkpoints", tied=True)
    export(tmp_path / "checkpoints", tmp_path / "export", tied=True)
    with safe_open(tmp_path / "export" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert names == set(llama(tied=True).state_dict()) - {"lm_head.weight"}


def test_an_export_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    save_llama(tmp_path / "checkpoints", tied=True)
    destination = tmp_path / "export"
    destination.mkdir()
    export(tmp_path / "checkpoints", destination, tied=True, shard_bytes=5_000)
    export(tmp_path / "checkpoints", destination, tied=True, card="a newer card")
    assert (destination / "README.md").read_text() == "a newer card"
    assert len(list(destination.glob("*.safetensors"))) == 1
    assert not (destination / "model.safetensors.index.json").exists()
    (destination / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds files that no export wrote: mine\.txt"):
        export(tmp_path / "checkpoints", destination, tied=True)
    assert (destination / "mine.txt").read_text() == "mine"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        export(tmp_path / "checkpoints", tmp_path / "file", tied=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "export", "file"}


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    save_llama(tmp_path / "checkpoints", tied=True)
    damaged = next((tmp_path / "checkpoints" / "step-00000010").glob("model-*"))
    raw = bytearray(damaged.read_bytes())
    raw[-1] ^= 1
    damaged.write_bytes(raw)
    with pytest.raises(UserError, match=f"{damaged} is not what was written"):
        export(tmp_path / "checkpoints", tmp_path / "export", tied=True)
    assert not (tmp_path / "export").exists()


def test_a_failed_export_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path / "checkpoints", tied=True)
    export(tmp_path / "checkpoints", tmp_path / "export", tied=True)

    real = os.rename

    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    def full_at_the_end(source: Path, target: Path) -> None:
        full() if source.name == ".export.tmp" else real(source, target)

    for call, fault in (("fsync", full), ("rename", full_at_the_end)):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fault)
            with pytest.raises(UserError, match=r"No space left on device \(it needs .* kB"):
                export(tmp_path / "checkpoints", tmp_path / "export", tied=True, card="never")
        assert (tmp_path / "export" / "README.md").read_text() == "a card"
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "export"}


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    save_llama(tmp_path / "checkpoints", tied=True)
    with pytest.raises(UserError, match="there is no tokenizer to export") as error:
        export(
            tmp_path / "checkpoints", tmp_path / "export", True, tokenizer_directory=tmp_path / "x"
        )
    assert error.value.mistakes[0].where == str(tmp_path / "x")


def test_model_card() -> None:
    recipe = "name: demo\nnotes: |\n  ```\n  fenced\n  ```\n"
    card = model_card(
        name="demo",
        recipe_yaml=recipe,
        metrics={"step": 1200, "loss": 1.234567, "precision": "bf16"},
        base_model="a/b: c",
    )
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["trainwright"],
        "base_model": "a/b: c",
    }
    assert "| step | 1,200 |\n| loss | 1.2346 |\n| precision | bf16 |\n" in body
    assert f"````yaml\n{recipe}````\n" in body

"""Training goes on from pretrained weights: our own families, and transformers' classes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen3Config, Qwen3ForCausalLM

import trainwright
from tests.training.runs import Recorder, small_recipe, train_here
from tests.workers import run_on
from trainwright.data.prepare import open_data
from trainwright.data.tokenizers import byte_tokenizer, save_tokenizer

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MODELS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, use_cache=False)),
}


@pytest.fixture(params=MODELS)
def pretrained(request, tmp_path) -> Path:
    """A model as transformers saves it, with a tokenizer."""
    torch.manual_seed(3)
    folder = tmp_path / request.param
    MODELS[request.param]().save_pretrained(folder)
    save_tokenizer(byte_tokenizer(), folder)
    return folder


def continued(folder: Path, model: Path, **sections):
    recipe = small_recipe(folder, **sections)
    values = recipe.model_dump(mode="json")
    values["model"] = {"path": str(model)}
    values["tokenizer"] = None
    return type(recipe).model_validate(values)


def train_continued(folder: str, model: str, sections: dict) -> Recorder:
    return train_here(continued(Path(folder), Path(model), **sections))


def test_the_first_loss_is_transformers_own(pretrained, tmp_path):
    from transformers import AutoModelForCausalLM

    recipe = continued(tmp_path, pretrained)
    recorder = train_here(recipe)
    batch = open_data(Path(recipe.run_directory)).train.batch(0)
    theirs = AutoModelForCausalLM.from_pretrained(pretrained)
    ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
    mask = torch.from_numpy(batch.segment_ids >= 0).long()
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=mask).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert recorder.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert recorder.losses[-1] < 0.9 * recorder.losses[0]


@pytest.mark.parametrize("layout", [{}, {"dp_shard": 2}], ids=["DDP", "FSDP"])
def test_two_workers_train_it_as_one_does(pretrained, tmp_path, layout):
    plain = train_continued(str(tmp_path), str(pretrained), {})
    sections = {
        "run_directory": str(tmp_path / "spread"),
        "parallel": {"workers": 2, "micro_batch": 4, **layout},
    }
    got, _ = run_on(2, train_continued, str(tmp_path), str(pretrained), sections)
    assert got.losses[0] == pytest.approx(plain.losses[0], rel=1e-6)
    assert got.losses == pytest.approx(plain.losses, rel=1e-5)


def test_the_trained_model_is_exported_and_opened_again(pretrained, tmp_path):
    recipe = continued(tmp_path, pretrained)
    train_here(recipe)
    exported = trainwright.export(recipe.run_directory)
    ids = torch.arange(20)[None] + 30
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        ours = trainwright.load_model(recipe.run_directory)(ids)
        assert (ours - theirs(ids).logits).abs().max() < 1e-4
        assert math.isfinite(ours.sum())
        before = AutoModelForCausalLM.from_pretrained(pretrained)(ids).logits
    assert (ours - before).abs().max() > 0.05

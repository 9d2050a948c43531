"""Reward models beside transformers' sequence classifiers of one label, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.cases import hf_config, randomise
from trainwright.errors import UserError
from trainwright.models.decoder import Decoder
from trainwright.models.directory import has_new_head
from trainwright.models.families import FAMILIES, decoder_config
from trainwright.models.scoring import CLASSIFIERS, with_head
from trainwright.models.weights import initialise, load_model, load_weights, new_model, save_model

# Tied and untied, windows, soft caps, scaled embeddings, scaled logits' kin, experts, latents.
CASES = ("llama", "llama-odd", "qwen2", "gemma2", "gemma3", "phi3", "olmo2", "mixtral", "deepseek")
PAD = 0
LENGTHS = (20, 13, 7)


def scored(name: str) -> dict[str, Any]:
    return with_head(hf_config(name), scores=True, pad_token_id=PAD)


def made(hf: dict[str, Any], seed: int = 0) -> Decoder:
    model = new_model(decoder_config(hf))
    randomise(model, seed)
    return model


def rows() -> Tensor:
    """Token ids [rows, 20], padded behind."""
    ids = torch.randint(1, 97, (len(LENGTHS), 20), generator=torch.Generator().manual_seed(4))
    for row, length in enumerate(LENGTHS):
        ids[row, length:] = PAD
    return ids


@torch.no_grad()
def our_scores(model: Any, ids: Tensor) -> Tensor:
    """Each row's score at its last token, the row alone."""
    alone = [model(ids[row : row + 1, :length])[0] for row, length in enumerate(LENGTHS)]
    return torch.stack([each[-1] for each in alone])


@torch.no_grad()
def their_scores(model: Any, ids: Tensor) -> Tensor:
    return model(ids, attention_mask=(ids != PAD).long()).logits[:, 0]


def load_theirs(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True, experts_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_a_saved_reward_model_scores_the_same_in_transformers_and_back(name, tmp_path):
    model = made(scored(name))
    assert not any("lm_head" in each for each, _ in model.named_parameters())
    save_model(model, tmp_path / "ours")
    theirs, ids = load_theirs(tmp_path / "ours"), rows()
    assert type(theirs).__name__ == CLASSIFIERS[theirs.config.model_type]
    wanted = their_scores(theirs, ids)
    torch.testing.assert_close(our_scores(model, ids), wanted, rtol=1e-5, atol=1e-5)
    assert wanted.std() > 1e-2

    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(0.9)
    theirs.save_pretrained(tmp_path / "theirs")
    again, wanted = load_model(tmp_path / "theirs"), their_scores(theirs, ids)
    torch.testing.assert_close(our_scores(again, ids), wanted, rtol=1e-5, atol=1e-5)


def test_a_language_model_s_body_gets_a_head_drawn_by_its_name(tmp_path):
    language = made(hf_config("llama"))
    save_model(language, tmp_path)
    config = decoder_config(scored("llama"))
    assert has_new_head(config, tmp_path)
    model, fresh = new_model(config), new_model(config)
    load_weights(model, tmp_path, seed=3)
    initialise(fresh, 3)
    values = dict(language.named_parameters())
    for name, parameter in model.named_parameters():
        wanted = fresh.score.weight if name == "score.weight" else values[name]
        assert torch.equal(parameter, wanted), name
    assert 0.5 < model.score.weight.std() / config.initializer_range < 2


def test_the_families_are_those_that_transformers_has_a_class_for():
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES,
    )

    assert {name: NAMES[name] for name in FAMILIES if name in NAMES} == CLASSIFIERS


def test_what_is_no_reward_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no class for reward models of the family granite"):
        with_head({"model_type": "granite"}, scores=True)
    with pytest.raises(UserError, match="writes no text"):
        with_head(scored("llama"), scores=False)
    save_model(made(scored("llama")), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {"0": "bad", "1": "good"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="2 labels"):
        load_model(tmp_path)


def test_a_classifier_of_no_family_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16, num_labels=1)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reward models of the family gpt2"):
        load_model(tmp_path)

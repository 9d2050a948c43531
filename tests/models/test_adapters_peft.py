"""Adapters beside PEFT's: the same logits both ways through its files, and the same gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.models.adapter_cases import adapted, logits, move
from tests.models.cases import decoder_like, hf_config, randomise, reference_model, tokens
from trainwright.models.adapter_files import load_adapter, save_adapter
from trainwright.models.adapter_merge import merge
from trainwright.models.adapter_spec import AdapterSpec
from trainwright.models.adapters import adapters_off, add_adapter, learning_rate_factors
from trainwright.models.decoder import Decoder
from trainwright.models.weights import load_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

ATTENTION = ("q_proj", "v_proj")
# name → (model, our spec over rank 4 and alpha 6)
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama-biases", {}),
    "lora-gemma": ("gemma2", {"targets": r".*layers\.[12]\..*proj", "exclude": r".*o_proj"}),
    "lora-latent": ("deepseek", {"targets": ("q_a_proj", "kv_b_proj")}),
    "rslora": ("qwen2", {"rslora": True, "init": "gaussian"}),
    "dora": ("llama-biases", {"dora": True}),
    "dora-fused": ("phi3", {"dora": True, "rslora": True}),
    "pissa": ("llama", {"init": "pissa"}),
    "pissa-rslora": ("phi3", {"init": "pissa", "rslora": True}),
    "pissa-dora": ("qwen2", {"init": "pissa", "dora": True}),
    "pissa-embedding": ("llama", {"init": "pissa", "targets": ("embed_tokens", "q_proj")}),
    "embedding": ("gemma2", {"targets": ("embed_tokens", "q_proj")}),
    "embedding-tied": ("qwen2", {"targets": ("embed_tokens", "q_proj")}),
    "embedding-dora": ("llama", {"targets": ("embed_tokens", "v_proj"), "dora": True}),
    "head": ("llama", {"targets": ("lm_head", "embed_tokens", "q_proj")}),
    "head-dora": ("llama", {"targets": ("lm_head", "q_proj"), "dora": True}),
    "saved": ("llama", {"modules_to_save": ("lm_head", "embed_tokens", "model.norm")}),
    "saved-tied": ("qwen2", {"modules_to_save": ("embed_tokens",)}),
    "patterns": (
        "phi3",
        {
            "rank_pattern": {"qkv_proj": 3, "layers.2.mlp.down_proj": 5},
            "alpha_pattern": {r"layers\.[01]\.mlp\..*": 2.0},
        },
    ),
    "layers": ("llama", {"targets": ATTENTION, "layers_to_transform": (0, 2)}),
}
# name → (model, PEFT's config over r 4 and lora_alpha 6)
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama-biases", {"target_modules": "all-linear", "lora_dropout": 0.1}),
    "rslora": ("qwen2", {"use_rslora": True, "target_modules": r".*layers\.1\..*proj"}),
    "dora": ("phi3", {"use_dora": True, "target_modules": "all-linear"}),
    "pissa": ("llama", {"init_lora_weights": "pissa", "target_modules": "all-linear"}),
    "pissa-patterns": (
        "phi3",
        {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "target_modules": ["qkv_proj", "o_proj"],
            "rank_pattern": {"qkv_proj": 3},
            "alpha_pattern": {"o_proj": 2},
        },
    ),
    "embedding-dora": (
        "gemma2",
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    ),
    "embedding-tied": (
        "qwen2",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "embedding-untied": ("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head", "embed_tokens", "q_proj"]}),
    "saved": (
        "llama",
        {"target_modules": list(ATTENTION), "modules_to_save": ["norm", "embed_tokens"]},
    ),
    "saved-tied": (
        "qwen2",
        {
            "target_modules": list(ATTENTION),
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "saved-untied": (
        "qwen2",
        {"target_modules": list(ATTENTION), "modules_to_save": ["embed_tokens"]},
    ),
    "layers": (
        "gemma3",
        {
            "target_modules": ["q_proj", "down_proj"],
            "exclude_modules": ["layers.3.mlp.down_proj"],
            "layers_to_transform": [1, 3],
            "layers_pattern": "layers",
        },
    ),
}


def their_model(case: str, **config: Any) -> Any:
    """PEFT's model over transformers' of a case, its adapter having learnt something."""
    keys = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config}
    model = peft.get_peft_model(reference_model(hf_config(case)), peft.LoraConfig(**keys))
    move(model)
    return model.eval()


def ours_of(case: str) -> Decoder:
    """Our model with the weights of transformers' of a case."""
    hf = hf_config(case)
    return decoder_like(reference_model(hf), hf)


@pytest.mark.parametrize("name", OURS)
def test_peft_computes_what_we_saved(name: str, tmp_path: Path) -> None:
    case, spec = OURS[name]
    ids, model = tokens(2, 9), ours_of(case)
    before = logits(ours_of(case).double(), ids)
    save_adapter(adapted(model, **spec), tmp_path, base_model="some/model")
    theirs = peft.PeftModel.from_pretrained(reference_model(hf_config(case)), tmp_path)
    # In float64, where sums in another order do not differ by as much as is allowed.
    ours = logits(model.double(), ids)
    assert (ours - before).abs().max() > 0.1
    assert torch.allclose(theirs.double()(ids).logits.float(), ours, atol=1e-5)
    # Ours again from the file, and the base beneath it.
    again = ours_of(case)
    load_adapter(again, tmp_path, name="again")
    again.double()
    assert torch.allclose(logits(again, ids), ours, atol=1e-5)
    with adapters_off(again), adapters_off(model):
        assert torch.equal(logits(again, ids), before)
        assert torch.allclose(logits(model, ids), before, atol=1e-5)
    merge(model)
    assert torch.allclose(logits(model, ids), ours, atol=1e-5)


@pytest.mark.parametrize("name", THEIRS)
def test_we_compute_what_peft_saved(name: str, tmp_path: Path) -> None:
    case, config = THEIRS[name]
    ids, theirs = tokens(2, 9), their_model(case, **config)
    theirs.save_pretrained(tmp_path)
    # In float64, where sums in another order do not differ by as much as is allowed.
    expected = theirs.double()(ids).logits.float()
    for adapter in ("default", "other"):
        ours = ours_of(case)
        before = logits(ours_of(case).double(), ids)
        load_adapter(ours, tmp_path, name=adapter)
        ours.double()
        assert (expected - before).abs().max() > 0.1
        assert torch.allclose(logits(ours, ids), expected, atol=1e-5)
        with adapters_off(ours):
            assert torch.equal(logits(ours, ids), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_gradients_are_pefts(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    case, ids = "llama-biases", tokens(2, 9)
    targets = ["embed_tokens", "q_proj", "o_proj", "up_proj"]
    theirs = their_model(case, target_modules=targets, modules_to_save=["lm_head"], **config)
    theirs.save_pretrained(tmp_path)
    ours = ours_of(case)
    load_adapter(ours, tmp_path)
    for model, out in ((theirs.to(dtype), lambda: theirs(ids).logits), (ours.to(dtype), None)):
        result = logits(ours, ids) if out is None else out()
        picked = torch.log_softmax(result[:, :-1].to(dtype), -1).gather(-1, ids[:, 1:, None])
        (-picked.mean()).backward()
        assert model is theirs or model is ours
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    expected = {
        name.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace(".modules_to_save", "")
        .replace("magnitude_vector.weight", "magnitude_vector"): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert found.keys() == expected.keys()
    # Logits are made in fp32 by us whatever the weights are in.
    for name, gradient in found.items():
        assert gradient is not None
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=2e-7), name


def test_a_model_of_transformers_own_class(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3}
    config = AutoConfig.for_model("gpt_neox", vocab_size=97, num_attention_heads=4, **sizes)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "base")
    ids, ours = tokens(2, 9), load_model(tmp_path / "base")
    spec = AdapterSpec(rank=3, alpha=5.0, targets=("query_key_value", "embed_in", "lm_head"))
    add_adapter(ours, spec)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    save_adapter(ours, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    expected = loaded(ids).logits
    assert torch.allclose(ours(ids), expected, atol=1e-5)
    again = load_model(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert torch.allclose(again(ids), expected, atol=1e-5)
    merge(again)
    assert torch.allclose(again(ids), expected, atol=1e-5)


def test_lora_plus_groups_are_pefts() -> None:
    from peft.optimizers import create_loraplus_optimizer

    case, spec = "llama", {"targets": ("embed_tokens", "q_proj"), "dora": True}
    theirs = their_model(case, target_modules=list(spec["targets"]), use_dora=True)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=8)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {
        name.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace("magnitude_vector.weight", "magnitude_vector"): rates[id(p)]
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    ours = adapted(ours_of(case), **spec)
    factors = learning_rate_factors(ours, 8.0, 2e-3)
    assert {name: 2e-3 * factor for name, factor in factors.items()} == pytest.approx(expected)

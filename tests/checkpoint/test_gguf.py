"""GGUF files beside transformers' reader of them, the gguf package's, and llama.cpp's formulas."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from tests.models.cases import LLAMA3, reference_model
from trainwright.checkpoint.gguf_export import directory_entries, write_gguf_files
from trainwright.checkpoint.storage import Entry
from trainwright.data.tokenizers import byte_tokenizer
from trainwright.errors import UserError
from trainwright.models.families import new_hf_config

ROWS = 270  # more than the tokenizer's 259
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 5}
# Those that transformers reads.
READ_BY_TRANSFORMERS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),  # the one that transformers takes for granted
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7}),
    "phi3": ("phi3", {"sliding_window": 64}),
}


def config_of(family: str, keys: dict[str, Any]) -> dict[str, Any]:
    return new_hf_config(family, {**SHAPE, **keys}, ROWS)


def saved(folder: Path, hf: dict[str, Any]) -> Any:
    """transformers' model of a config with random weights, saved in `folder`."""
    model = reference_model(hf)
    model.save_pretrained(folder)
    return model


def write(folder: Path, hf: dict[str, Any], *kinds: str) -> tuple[list[gguf.GGUFReader], list[str]]:
    entries = directory_entries(folder)
    notes = write_gguf_files(folder, "m", kinds, entries, hf_config=hf, tokenizer=words(folder))
    return [gguf.GGUFReader(folder / f"m-{kind.upper()}.gguf") for kind in kinds], notes


def words(folder: Path) -> Path:
    """A tokenizer of bytes beside `folder`."""
    made = folder.with_name(f"{folder.name}-words")
    if not made.exists():
        byte_tokenizer().save_pretrained(made)
    return made


def tensors(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}


def value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_computes_the_same_from_the_file(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = config_of(*READ_BY_TRANSFORMERS[name])
    expected = saved(tmp_path, hf)
    write(tmp_path, hf, "f32", "q8_0")
    # transformers does not read how wide experts are; of all others, the file alone tells.
    given = {"config": AutoConfig.from_pretrained(tmp_path)} if "moe" in name else {}
    ids = torch.randint(0, 259, (2, 12), generator=torch.Generator().manual_seed(1))
    got = {}
    with torch.no_grad():
        want = expected(ids).logits
        for kind in ("F32", "Q8_0"):
            model = AutoModelForCausalLM.from_pretrained(
                tmp_path, gguf_file=f"m-{kind}.gguf", dtype=torch.float32, **given
            )
            got[kind] = model.eval()(ids).logits
    size = want.std()
    assert (got["F32"] - want).abs().max() < 2e-5 * size
    assert (got["Q8_0"] - want).pow(2).mean().sqrt() < 0.1 * size
    assert (got["Q8_0"] - want).abs().max() > 0


def test_every_type_rounds_as_it_should(tmp_path: Path) -> None:
    """Half a step of each block's own grid; f16 and bf16 as torch rounds."""
    hf = config_of("llama", {})
    saved(tmp_path, hf)
    kinds = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
    readers, notes = write(tmp_path, hf, *kinds)
    assert notes == []
    files = dict(zip(kinds, readers, strict=True))
    exact = tensors(files["f32"])
    for kind, reader in files.items():
        assert value(reader, "general.file_type") == {
            "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q5_1": 9, "q5_0": 8, "q4_1": 3, "q4_0": 2
        }[kind]  # fmt: skip
        for tensor in reader.tensors:
            found, truth = dequantize(tensor.data, tensor.tensor_type), exact[tensor.name]
            if tensor.name.endswith("norm.weight"):
                assert tensor.tensor_type.name == "F32" and np.array_equal(found, truth)
                continue
            is_output = tensor.name == "output.weight" and kind[:2] in ("q4", "q5")
            assert tensor.tensor_type.name == ("Q8_0" if is_output else kind.upper())
            if kind in ("f16", "bf16"):
                dtype = torch.float16 if kind == "f16" else torch.bfloat16
                assert np.array_equal(found, torch.from_numpy(truth).to(dtype).float().numpy())
                continue
            blocks, near = truth.reshape(-1, 32), found.reshape(-1, 32)
            spread = np.abs(blocks).max(1, keepdims=True)
            steps = {"q8_0": 127, "q5_0": 16, "q4_0": 8}
            step = spread / 127 if is_output else spread / steps.get(kind, 1)
            if kind in ("q5_1", "q4_1"):
                step = np.ptp(blocks, 1, keepdims=True) / (31 if kind == "q5_1" else 15)
            # A block of q4_0 or q5_0 reaches its greatest value on one side only.
            most = 1.01 if kind in ("q5_0", "q4_0") and not is_output else 0.51
            assert kind == "f32" or (np.abs(near - blocks) <= most * step + 2e-3 * spread).all()
    sizes = [(tmp_path / f"m-{kind.upper()}.gguf").stat().st_size for kind in kinds]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 3 * sizes[3]


def test_rows_that_do_not_fill_blocks_are_f16_and_said_so(tmp_path: Path) -> None:
    hf = config_of("llama", {"intermediate_size": 76})
    saved(tmp_path, hf)
    (reader,), notes = write(tmp_path, hf, "q4_0")
    odd = {t.name for t in reader.tensors if t.tensor_type.name == "F16"}
    assert odd == {f"blk.{layer}.ffn_down.weight" for layer in range(3)}
    assert len(notes) == 1 and "stored as f16" in notes[0] and "blk.0.ffn_down" in notes[0]


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "granite", "smollm3"])
def test_q_and_k_are_reordered_where_neighbours_turn(family: str, tmp_path: Path) -> None:
    """Channel i of a head and channel i + half, which turn together, become 2i and 2i + 1."""
    hf = config_of(family, {"sliding_window": None} if family in ("mistral", "mixtral") else {})
    state = saved(tmp_path, hf).state_dict()
    (reader,), _ = write(tmp_path, hf, "f32")
    made = tensors(reader)
    for part, heads in (("q", 4), ("k", 2)):
        before = state[f"model.layers.1.self_attn.{part}_proj.weight"].numpy()
        after = made[f"blk.1.attn_{part}.weight"]
        for head in range(heads):
            for i in range(8):
                assert np.array_equal(after[16 * head + 2 * i], before[16 * head + i])
                assert np.array_equal(after[16 * head + 2 * i + 1], before[16 * head + i + 8])
    value_before = state["model.layers.1.self_attn.v_proj.weight"].numpy()
    assert np.array_equal(made["blk.1.attn_v.weight"], value_before)


def test_deepseek_is_cut_and_stacked(tmp_path: Path) -> None:
    hf = config_of("deepseek_v3", DEEPSEEK)
    state = {name: t.numpy() for name, t in saved(tmp_path, hf).state_dict().items()}
    (reader,), _ = write(tmp_path, hf, "f32")
    made = tensors(reader)
    both = state["model.layers.2.self_attn.kv_b_proj.weight"].reshape(4, 24 + 16, 32)
    for head in range(4):
        assert np.array_equal(made["blk.2.attn_k_b.weight"][head], both[head, :24].T)
        assert np.array_equal(made["blk.2.attn_v_b.weight"][head], both[head, 24:])
    gates, ups = np.split(state["model.layers.1.mlp.experts.gate_up_proj"], 2, axis=1)
    assert np.array_equal(made["blk.1.ffn_gate_exps.weight"], gates)
    assert np.array_equal(made["blk.1.ffn_up_exps.weight"], ups)
    correction = state["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert np.array_equal(made["blk.1.exp_probs_b.bias"], correction)
    assert "blk.0.ffn_gate.weight" in made and "blk.0.ffn_gate_exps.weight" not in made
    told = {
        "attention.head_count_kv": 1,
        "attention.key_length": 32 + 8,
        "attention.key_length_mla": 24 + 8,
        "attention.value_length_mla": 16,
        "expert_gating_func": 2,
        "expert_shared_count": 2,
        "leading_dense_block_count": 1,
        "rope.dimension_count": 8,
    }
    assert {key: value(reader, f"deepseek2.{key}") for key in told} == told


@pytest.mark.parametrize("family", ["olmo2", "olmoe", "qwen2_moe"])
def test_tied_embeddings_are_written_twice_for_code_that_needs_both(
    family: str, tmp_path: Path
) -> None:
    keys = {} if family == "olmo2" else {**EXPERTS, "shared_expert_intermediate_size": 64}
    if family == "olmoe":
        keys = {"num_experts": 4, "num_experts_per_tok": 2}
    hf = config_of(family, {**keys, "tie_word_embeddings": True})
    saved(tmp_path, hf)
    (reader,), _ = write(tmp_path, hf, "f32")
    made = tensors(reader)
    assert np.array_equal(made["output.weight"], made["token_embd.weight"])


def test_llama3s_frequencies_are_divided_as_transformers_does(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {**LLAMA3, "original_max_position_embeddings": 64}
    rope = {**scaling, "rope_theta": 500.0}
    hf = config_of("llama", {"rope_scaling": scaling, "rope_theta": 500.0})
    saved(tmp_path, hf)
    (reader,), _ = write(tmp_path, hf, "f16")
    factors = tensors(reader)["rope_freqs.weight"]
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**SHAPE, rope_parameters=rope), "cpu")
    plain = 500.0 ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / factors, expected.numpy(), rtol=1e-6)
    assert factors.min() == 1.0 and factors.max() == 8.0


def test_yarn_windows_and_scales_are_keys(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("qwen2", {"rope_scaling": yarn}, {
            "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": 1.0,
        }),
        ("qwen2", {"rope_scaling": {**yarn, "attention_factor": 1.0}}, {
            # llama.cpp multiplies by 1 + 0.1 ln(4), which is to come out as 1
            "rope.scaling.attn_factor": pytest.approx(1 / 1.1386294, rel=1e-6),
        }),
        ("gemma3_text", {
            **GEMMA, "num_hidden_layers": 6, "rope_theta": 7e5, "rope_local_base_freq": 20.0
        }, {
            "attention.sliding_window": 5, "rope.freq_base": 7e5, "rope.freq_base_swa": 20.0,
            "attention.sliding_window_pattern": None,
        }),
        ("gemma3_text", {**GEMMA, "sliding_window_pattern": 2}, {
            "attention.sliding_window_pattern": [True, False, True],
        }),
        ("gemma2", {**GEMMA, "attn_logit_softcapping": 9.0}, {
            "attn_logit_softcapping": 9.0, "final_logit_softcapping": 30.0,
            "attention.key_length": 256,
        }),
        ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5}, {
            "logit_scale": 4.0, "residual_scale": 0.5, "embedding_scale": 1.0,
        }),
        # no window in llama.cpp's code: the file ends where one would begin
        ("mistral", {"sliding_window": 40}, {"context_length": 40}),
    ]  # fmt: skip
    for number, (family, keys, told) in enumerate(cases):
        folder = tmp_path / str(number)
        hf = config_of(family, keys)
        saved(folder, hf)
        (reader,), _ = write(folder, hf, "q8_0")
        arch = value(reader, "general.architecture")
        assert {key: value(reader, f"{arch}.{key}") for key in told} == told, (family, keys)


REFUSED = {
    "type 'dynamic'": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "activation gelu": ("llama", {"hidden_act": "gelu"}),
    "bias after attention": ("qwen3", {"attention_bias": True}),
    "queries scaled by another number": ("gemma2", {**GEMMA, "query_pre_attn_scalar": 7}),
    "experts in some layers only": ("qwen3_moe", {**EXPERTS, "decoder_sparse_step": 2}),
    "family without experts": ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [0, 1, 2]}),
    "weighing experts": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": False}),
    "without rotary embeddings": ("smollm3", {"no_rope_layer_interval": 2}),
    "not interleaved": ("deepseek_v3", {**DEEPSEEK, "rope_interleave": False}),
    "an output matrix apart": ("gemma2", {**GEMMA, "tie_word_embeddings": False}),
    "`truncate: false`": ("llama", {"rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
        "truncate": False,
    }}),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(reason: str, tmp_path: Path) -> None:
    hf = config_of(*REFUSED[reason])
    with pytest.raises(UserError, match=reason.replace("(", r"\(")):
        write_gguf_files(tmp_path, "m", ["f16"], [], hf_config=hf, tokenizer=words(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_reward_model_and_an_unknown_family_are_refused(tmp_path: Path) -> None:
    reward = {**config_of("llama", {}), "architectures": ["LlamaForSequenceClassification"]}
    other = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
    for hf, reason in ((reward, "reward model"), (other, "'gpt_neox'")):
        with pytest.raises(UserError, match=reason):
            write_gguf_files(tmp_path, "m", ["f16"], [], hf_config=hf, tokenizer=words(tmp_path))


def test_no_more_than_one_weight_is_held_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    hf = config_of("mixtral", {"num_local_experts": 4, "sliding_window": None})
    saved(tmp_path, hf)
    held: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def counting(entry: Entry) -> Entry:
        def make() -> torch.Tensor:
            nonlocal most
            tensor = entry.make().clone()
            held.append(weakref.ref(tensor))
            most = max(most, sum(each() is not None for each in held))
            return tensor

        return Entry(entry.name, entry.dtype, entry.shape, make)

    entries = [counting(entry) for entry in directory_entries(tmp_path)]
    options: dict[str, Any] = {"hf_config": hf, "tokenizer": words(tmp_path)}
    write_gguf_files(tmp_path, "m", ["q8_0"], entries, **options)
    assert len(held) == len(entries) and most <= 2  # one, and the one before it going

    before = {file.name for file in tmp_path.iterdir()}
    last = entries[-1]
    entries[-1] = Entry(last.name, last.dtype, last.shape, lambda: torch.full(last.shape, 7e4))
    with pytest.raises(UserError, match="values that f16 cannot"):
        write_gguf_files(tmp_path, "m", ["f16"], entries, **options)
    assert {file.name for file in tmp_path.iterdir()} == before

"""Axolotl's YAML: `base_model`, `datasets`, `adapter`, `rl`, …

Keys and their defaults are those of Axolotl's schemas (axolotl/utils/schemas).
"""

from __future__ import annotations

from typing import Any

from trainwright.recipe.importers.axolotl_data import is_plain_text, read_datasets
from trainwright.recipe.importers.axolotl_keys import BY_REWARD, DEFAULTS, TABLE
from trainwright.recipe.importers.job import (
    Job,
    Rule,
    each,
    ignored,
    is_off,
    names,
    number,
    same,
    truth,
    unsupported,
)
from trainwright.recipe.importers.rules import (
    OWN_KERNELS,
    batch,
    betas,
    length,
    precision,
    quantised,
    row_length,
    warmup,
)


def translate(job: Job) -> None:
    """Take up every key of an Axolotl configuration."""
    _objective(job)
    _adapter(job)
    _data(job)
    batch(job, "micro_batch_size", "gradient_accumulation_steps", 1)
    length(job, "num_epochs", "max_steps", 1)
    precision(job, _PRECISIONS, "bf16")
    warmup(job, "warmup_steps", "warmup_ratio")
    betas(job, "adam_beta1", "adam_beta2")
    job.run(TABLE)
    for target, (key, value) in DEFAULTS.items():
        job.assumed(key, target, value)


def _objective(job: Job) -> None:
    rl = job.get("rl")
    if job.get("process_reward_model"):
        fix = "train on whole answers: `reward_model: true`"
        raise job.refusal("process_reward_model", "there are no stepwise rewards here", fix)
    if job.get("reward_model"):
        job.translated("reward_model", "objective.kind", "reward")
        if job.has("center_rewards_coefficient"):
            center = job.number("center_rewards_coefficient")
            job.translated("center_rewards_coefficient", "objective.center", center)
    elif rl in ("dpo", "orpo", "kto", "simpo"):
        job.translated("rl", "objective.kind", rl)
    elif rl == "ipo":
        job.put("objective.loss", "ipo")
        job.translated("rl", "objective.kind", "dpo", "with `loss: ipo`")
    elif rl:
        known = "dpo, ipo, kto, orpo and simpo"
        raise job.refusal("rl", f"`{rl}`: {BY_REWARD}", f"of `rl`, {known} can be imported")
    else:
        sets = [
            *_listed(job.get("datasets"), "alpaca"),
            *_listed(job.get("pretraining_dataset"), "pretrain"),
        ]
        plain = bool(sets) and all(is_plain_text(each) for each in sets)
        if job.has("pretraining_dataset") or plain:
            job.put("objective.kind", "next_token")
        else:
            job.put("objective.kind", "sft")
    kind = job.given("objective.kind")
    _preference(job, str(kind))


def _listed(value: Any, kind: str) -> list[dict[str, Any]]:
    """The entries of a list of data sets; `kind` is the type of those without one."""
    if isinstance(value, str):
        return [{"path": value, "type": kind}]
    entries = value if isinstance(value, list) else []
    return [{"type": kind, **each} for each in entries if isinstance(each, dict)]


def _preference(job: Job, kind: str) -> None:
    """The weights of preference losses, each of which belongs to certain kinds."""
    if kind in ("dpo", "kto", "orpo", "simpo"):
        strength = {"orpo": "orpo_alpha"}.get(kind, "rl_beta")
        key = strength if job.has(strength) else "dpo_beta" if job.has("dpo_beta") else "rl_beta"
        if job.has(key):
            job.translated(key, "objective.beta", job.number(key))
        else:
            job.assumed(key, "objective.beta", 0.1)
    if kind == "simpo":
        for key, target, default in (
            ("simpo_gamma", "objective.margin", 0.5),
            ("cpo_alpha", "objective.sft_weight", 1.0),
        ):
            if job.has(key):
                job.translated(key, target, job.number(key))
            else:
                job.assumed(key, target, default)
    smoothing = job.number("dpo_label_smoothing", 0) or 0
    if kind == "dpo" and smoothing:
        job.put("objective.label_smoothing", smoothing)
        job.translated("dpo_label_smoothing", "objective.loss", "cdpo")
    if kind == "dpo" and job.has("rpo_alpha"):
        base = job.given("objective.loss") or "sigmoid"
        losses = {base: 1.0, "sft": job.number("rpo_alpha")}
        job.translated("rpo_alpha", "objective.loss", losses)
    for name in ("desirable", "undesirable"):
        if kind == "kto" and job.has(f"kto_{name}_weight"):
            weight = job.number(f"kto_{name}_weight")
            job.translated(f"kto_{name}_weight", f"objective.{name}_weight", weight)
    for key in _OF_KINDS:
        if job.has(key) and not job.is_noted(key):
            job.ignored(key, f"of no use for {kind}")


_OF_KINDS = (
    *("rl_beta", "dpo_beta", "orpo_alpha", "simpo_gamma", "cpo_alpha", "rpo_alpha"),
    *("kto_desirable_weight", "kto_undesirable_weight", "dpo_label_smoothing"),
)


def _adapter(job: Job) -> None:
    name = job.get("adapter")
    if not job.has("adapter"):
        keys = [key for key in job.values if key.startswith(("lora", "peft")) and job.has(key)]
        for key in keys:
            job.ignored(key, "there is no adapter: `adapter` is empty")
        quantised_alone = [k for k in ("load_in_4bit", "load_in_8bit") if job.has(k)]
        for key in quantised_alone:
            off = is_off(job.get(key))
            reason = "the weights of a model that is itself trained are not quantised"
            job.ignored(key, "switched off") if off else job.unsupported(key, reason)
        return
    if name not in ("lora", "qlora"):
        fix = "import it with `adapter: lora`"
        raise job.refusal("adapter", f"adapters are LoRA here; `{name}` is not known", fix)
    job.put("adapter", {})
    job.note("translated", "adapter", "adapter")
    quantised(job, "load_in_4bit", "load_in_8bit")
    if name == "qlora" and job.given("adapter.quantise") is None:
        job.put("adapter.quantise", "nf4")
    job.run(_ADAPTER)
    if job.given("adapter.targets") is None:
        # PEFT's own choice for the llama family.
        job.assumed("lora_target_modules", "adapter.targets", ["q_proj", "v_proj"])
    job.assumed("lora_r", "adapter.rank", 8)
    job.assumed("lora_alpha", "adapter.alpha", 8)


def _targets(job: Job, key: str, value: Any) -> None:
    linear = job.has("lora_target_linear") and not is_off(job.get("lora_target_linear"))
    if key == "lora_target_linear":
        if is_off(value):
            job.ignored(key, "switched off")
        else:
            job.translated(key, "adapter.targets", "all-linear")
    elif linear:
        job.ignored(key, "`lora_target_linear` makes all linear layers targets")
    elif value == "all-linear":
        job.translated(key, "adapter.targets", value)
    else:
        job.translated(key, "adapter.targets", names(value))


def _initial(job: Job, key: str, value: Any) -> None:
    known = {"pissa": "pissa", "gaussian": "gaussian", "True": "default", "true": "default"}
    text = str(value)
    if text.startswith("pissa_niter"):
        reason = "the exact singular vectors, not some rounds of approximation"
        job.approximated(key, "adapter.init", "pissa", reason)
    elif text in known:
        job.translated(key, "adapter.init", known[text])
    else:
        job.unsupported(key, "first values are default, gaussian or pissa")


_ADAPTER: dict[str, Rule] = {
    "lora_target_linear": _targets,
    "lora_target_modules": _targets,
    "lora_r": same("adapter.rank", number),
    "lora_alpha": same("adapter.alpha", number),
    "lora_dropout": same("adapter.dropout", number),
    "lora_modules_to_save": same("adapter.train_also", names),
    "lora_model_dir": same("adapter.path", str),
    "peft_use_dora": same("adapter.dora", truth),
    "peft_use_rslora": same("adapter.rslora", truth),
    "peft_init_lora_weights": _initial,
    "loraplus_lr_ratio": same("adapter.plus_ratio", number),
    "loraplus_lr_embedding": unsupported("embeddings' adapters learn at the same rate"),
    "lora_fan_in_fan_out": ignored("weights are turned as their layer needs it"),
    "lora_on_cpu": ignored("`export --merge` works in the host's memory"),
    **each(
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel", ignored(OWN_KERNELS)
    ),
    **each(
        "peft_layers_to_transform peft_layers_pattern",
        unsupported("name the layers in `adapter.targets`, by whole paths"),
    ),
    "lora_target_parameters": unsupported("adapters sit on layers, not on single parameters"),
    "peft_autocast_adapter_dtype": ignored("adapters are always fp32"),
    "peft_ensure_weight_tying": ignored("tied weights stay tied"),
    "peft_layer_replication": unsupported("layers are not doubled"),
    "peft_trainable_token_indices": unsupported("`adapter.train_also: [embed_tokens]` trains all"),
    "peft": unsupported("of `peft`, no key is known"),
    "bnb_config_kwargs": unsupported("quantisation is nf4, doubly quantised"),
    "gptq": unsupported("weights are quantised here, not loaded quantised"),
}


def _data(job: Job) -> None:
    for key in ("datasets", "test_datasets"):
        if job.has(key):
            read_datasets(job, key, job.get(key))
    if job.has("pretraining_dataset"):
        value = job.get("pretraining_dataset")
        if isinstance(value, str):
            job.translated("pretraining_dataset", "data.sources", [{"path": value}])
        else:
            read_datasets(job, "pretraining_dataset", value)
    row_length(job, "sequence_len", 512)
    kind = job.given("objective.kind")
    if kind == "next_token" and not job.has("sample_packing"):
        job.put("data.packing", "best-fit")
    if kind == "sft":
        on = "all" if job.get("train_on_inputs") in (True, "yes", "on") else "assistant"
        if job.has("train_on_inputs"):
            job.translated("train_on_inputs", "objective.train_on", on)
        else:
            job.put("objective.train_on", on)


_PRECISIONS = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp8": "float8",
    "fp16": "fp16",
    "float16": "fp16",
    "float32": "fp32",
}

"""torchtune's YAML: sections whose `_component_` names the Python function that they configure.

Components and their defaults are those of torchtune's recipes and datasets.
"""

from __future__ import annotations

import os
import re
from typing import Any

from trainwright.recipe.importers.job import (
    Job,
    Rule,
    Table,
    each,
    ignored,
    is_off,
    number,
    same,
    truth,
    unsupported,
)
from trainwright.recipe.importers.rules import (
    IMAGES,
    OWN_KERNELS,
    OWN_LAUNCH,
    OWN_LOADING,
    OWN_RESUMING,
    batch,
    optimizer,
    row_length,
    run_name,
    schedule,
)
from trainwright.recipe.importers.torchtune_data import is_plain_text, read_datasets
from trainwright.recipe.objective import PAIRED

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_ENVIRONMENT = re.compile(r"\$\{oc\.env:(\w+)(?:,([^}]*))?\}")
# Names of torchtune's own layers: ours are Hugging Face's.
_LAYERS = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MLP = ["gate_proj", "up_proj", "down_proj"]
_SOURCE = "the model's own files, in `model.path`"


def translate(job: Job) -> None:
    """Take up every key of a torchtune configuration."""
    _loss(job)
    _model(job)
    if job.has("dataset"):
        read_datasets(job, "dataset", "data.sources")
    if job.has("dataset_val"):
        read_datasets(job, "dataset_val", "data.validation")
    batch(job, "batch_size", "gradient_accumulation_steps", 1)
    _length(job)
    _sequence_length(job)
    for section, table in _SECTIONS.items():
        if isinstance(job.get(section), dict):
            job.run(table, section)
    job.run(_TABLE)
    if not job.has("lr_scheduler"):
        job.assumed("lr_scheduler", "schedule.name", "constant")
        job.assumed("lr_scheduler.num_warmup_steps", "schedule.warmup", 0)
    for target, (key, value) in _DEFAULTS.items():
        job.assumed(key, target, value)


def resolve(tree: Any, root: Any = None, depth: int = 0) -> Any:
    """Fill OmegaConf's `${section.key}` and `${oc.env:NAME}`; what leads nowhere stays."""
    root = tree if root is None else root
    if isinstance(tree, dict):
        return {key: resolve(value, root, depth) for key, value in tree.items()}
    if isinstance(tree, list):
        return [resolve(value, root, depth) for value in tree]
    if not isinstance(tree, str) or "${" not in tree or depth > 10:
        return tree

    def found(match: re.Match[str]) -> Any:
        here = root
        for part in match[1].split("."):
            here = here.get(part) if isinstance(here, dict) else None
        return match[0] if here is None else here

    tree = _ENVIRONMENT.sub(lambda m: os.environ.get(m[1], m[2] or m[0]), tree)
    whole = _REFERENCE.fullmatch(tree)
    filled = found(whole) if whole else _REFERENCE.sub(lambda m: str(found(m)), tree)
    return filled if filled == tree else resolve(filled, root, depth + 1)


def component(job: Job, section: str) -> str:
    """The last part of a section's `_component_`; "" where there is none."""
    value = job.get(f"{section}._component_")
    return str(value).rpartition(".")[2] if value else ""


def _loss(job: Job) -> None:
    """The objective, which stands in `loss` (and, for distillation, `kd_loss`)."""
    name = component(job, "loss")
    key = "loss._component_"
    if job.has("kd_loss"):
        _distillation(job)
    elif name in ("DPOLoss", "IPOLoss", "RSOLoss"):
        smoothing = job.number("loss.label_smoothing", 0) or 0
        ours = {"IPOLoss": "ipo", "RSOLoss": "hinge"}.get(name, "cdpo" if smoothing else "sigmoid")
        job.put("objective.loss", ours)
        job.translated(key, "objective.kind", "dpo", f"with `loss: {ours}`")
        job.run(_DPO, "loss")
        job.assumed("loss.beta", "objective.beta", 0.1)
    elif name == "SimPOLoss":
        job.translated(key, "objective.kind", "simpo")
        job.run(_SIMPO, "loss")
        job.assumed("loss.beta", "objective.beta", 2.0)
    elif name in ("PPOLoss", "GRPOLoss", "GRPOSimpleLoss", "GRPOCompletionLoss"):
        what = f"{name}: there is no training by rewards of the model's own answers here"
        raise job.refusal(key, what, "import a configuration of sft, dpo or distillation")
    else:
        plain = is_plain_text(job.get("dataset"))
        job.put("objective.kind", "next_token" if plain else "sft")
        if name:
            job.note("translated", key, "objective.kind")
        for other in ("num_output_chunks", "ignore_index", "tiled"):
            if job.has(f"loss.{other}"):
                job.ignored(f"loss.{other}", OWN_KERNELS)


def _distillation(job: Job) -> None:
    name = component(job, "kd_loss")
    beta = {"Reverse": 1.0, "Symmetric": 0.5}.get(name.partition("KL")[0], 0.0)
    teacher = job.get("teacher_checkpointer.checkpoint_dir")
    job.put("objective.kind", "distill")
    job.put("objective.beta", beta)
    if name.startswith("Symmetric"):
        reason = "half and half of a Jensen-Shannon divergence, not of the two KLs"
        job.note("approximated", "kd_loss", "objective.beta", reason)
    else:
        job.note("translated", "kd_loss", "objective.beta", "an end of the generalised divergence")
    if job.has("kd_ratio"):
        # Theirs weighs the divergence, ours the cross entropy.
        job.translated("kd_ratio", "objective.mix", 1.0 - (job.number("kd_ratio") or 0.0))
    job.assumed("kd_ratio", "objective.mix", 0.5)
    if teacher:
        key = "teacher_checkpointer.checkpoint_dir"
        job.translated(key, "objective.teacher", str(teacher))
    job.run(_TEACHER, "teacher_checkpointer")
    if job.has("teacher_model"):
        job.ignored("teacher_model", "the teacher's own files, in `objective.teacher`")
    if job.has("loss"):
        job.ignored("loss", "the cross entropy beside the divergence, in `objective.mix`")


def _model(job: Job) -> None:
    folder = job.get("checkpointer.checkpoint_dir")
    if folder:
        job.translated("checkpointer.checkpoint_dir", "model.path", str(folder))
    name = component(job, "model")
    if re.search(r"vision|flamingo|multimodal", name):
        what = f"`{name}`: {IMAGES}"
        raise job.refusal("model._component_", what, "import a configuration of a text model")
    lora = name.startswith(("lora_", "qlora_")) or job.has("model.lora_rank")
    if not lora:
        return
    job.put("adapter", {})
    if name.startswith("qlora_"):
        job.put("adapter.quantise", "nf4")
    if job.has("model._component_"):
        job.note("translated", "model._component_", "adapter", f"its weights from {_SOURCE}")
    targets = [_LAYERS.get(each, each) for each in job.names("model.lora_attn_modules")]
    if job.get("model.apply_lora_to_mlp") is True:
        targets += _MLP
    if job.get("model.apply_lora_to_output") is True:
        targets.append("lm_head")
    job.put("adapter.targets", list(dict.fromkeys(targets)) or "all-linear")
    for key in ("lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output"):
        if f"model.{key}" in job.document.places and job.get(f"model.{key}") is not None:
            job.note("translated", f"model.{key}", "adapter.targets")
    job.run(_LORA, "model")
    job.assumed("model.lora_rank", "adapter.rank", 8)
    job.assumed("model.lora_alpha", "adapter.alpha", 16)


def _length(job: Job) -> None:
    epochs = job.number("epochs", 1) or 1
    most = job.number("max_steps_per_epoch", 0) or 0
    if most:
        reason = f"{epochs:g} × {most:g} steps, however short the data"
        for key in ("epochs", "max_steps_per_epoch"):
            if job.has(key):
                job.approximated(key, "training.steps", int(epochs * most), reason)
    elif job.has("epochs"):
        job.translated("epochs", "training.epochs", epochs)
    else:
        job.assumed("epochs", "training.epochs", 1)


def _sequence_length(job: Job) -> None:
    """`tokenizer.max_seq_len`; null there means that nothing is ever cut."""
    key = "tokenizer.max_seq_len"
    if key in job.document.places and not job.has(key):
        tokens = 4096 if job.given("objective.kind") in PAIRED else 2048
        reason = "a row has a length here; choose it so that your longest example fits"
        job.approximated(key, "data.sequence_length", tokens, reason)
    else:
        row_length(job, key, 2048)


def _precision(job: Job, key: str, value: Any) -> None:
    if value in ("bf16", "fp16", "fp32"):
        if value == "bf16":
            reason = "weights and optimizer state stay fp32; torchtune's are bf16 too"
            job.approximated(key, "training.precision", value, reason)
        else:
            job.translated(key, "training.precision", value)
    else:
        job.unsupported(key, "precisions are fp32, bf16, fp16 and float8")


def _schedule(job: Job, key: str, value: Any) -> None:
    name = str(value).rpartition(".")[2]
    known = re.fullmatch(r"get_(\w+?)(_schedule)?(_with_warmup)?", name)
    if name == "CosineAnnealingLR":
        schedule(job, key, "cosine")
    else:
        schedule(job, key, known[1] if known else name)


def _component_optimizer(job: Job, key: str, value: Any) -> None:
    optimizer(job, key, str(value).rpartition(".")[2])


def _logger(job: Job, key: str, value: Any) -> None:
    name = str(value).rpartition(".")[2]
    ours = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard"}.get(name)
    if ours:
        job.translated(key, "tracking.to", [ours])
    elif name in ("DiskLogger", "StdoutLogger"):
        job.ignored(key, "metrics are always on the screen and in `metrics.jsonl`")
    else:
        job.unsupported(key, "tracking knows tensorboard, wandb and trackio")


def _pair(value: Any) -> list[float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{value!r} is not a pair of numbers")
    return [number(each) for each in value]


def _recomputed(job: Job, key: str, value: Any) -> None:
    job.translated(key, "training.recompute", "full" if truth(value) else "none")


def _offloaded(job: Job, key: str, value: Any) -> None:
    if is_off(value):
        job.ignored(key, "switched off")
    else:
        job.translated(key, "parallel.offload", "parameters")


_DPO: dict[str, Rule] = {
    "beta": same("objective.beta", number),
    "tau": same("objective.beta", number),
    "gamma": same("objective.beta", number),
    "label_smoothing": same("objective.label_smoothing", number),
}
_SIMPO: dict[str, Rule] = {
    "beta": same("objective.beta", number),
    "gamma": same("objective.margin", number),
    "label_smoothing": unsupported("simpo's labels are not smoothed"),
}
_LORA: dict[str, Rule] = {
    "lora_rank": same("adapter.rank", number),
    "lora_alpha": same("adapter.alpha", number),
    "lora_dropout": same("adapter.dropout", number),
    "use_dora": same("adapter.dora", truth),
    "quantize_base": same("adapter.quantise", lambda value: "nf4" if truth(value) else "none"),
}
_FILES = ignored(f"found in {_SOURCE}")
_TEACHER: dict[str, Rule] = each(
    "_component_ checkpoint_files recipe_checkpoint output_dir model_type",
    ignored("found in the teacher's own files"),
)
_SECTIONS: dict[str, Table] = {
    "model": {"_component_": _FILES, "max_seq_len": _FILES},
    "tokenizer": {
        **each("_component_ path merges_file truncation_type special_tokens_path", _FILES),
        "prompt_template": unsupported("`tokenizer.chat_template` names a template or a file"),
    },
    "checkpointer": {
        **each("_component_ checkpoint_files model_type safe_serialization", _FILES),
        **each("recipe_checkpoint adapter_checkpoint", ignored(OWN_RESUMING)),
        "output_dir": ignored("the run's folder holds its checkpoints"),
    },
    "optimizer": {
        "_component_": _component_optimizer,
        "lr": same("optimizer.learning_rate", number),
        "weight_decay": same("optimizer.weight_decay", number),
        "betas": same("optimizer.betas", _pair),
        "eps": same("optimizer.eps", number),
        "momentum": same("optimizer.momentum", number),
        **each("fused foreach bf16_stochastic_round block_size", ignored(OWN_KERNELS)),
    },
    "lr_scheduler": {
        "_component_": _schedule,
        "num_warmup_steps": same("schedule.warmup", number),
        "num_cycles": ignored("one cycle"),
        **each("num_training_steps last_epoch", ignored("the run's own steps")),
    },
    "metric_logger": {
        "_component_": _logger,
        "project": same("tracking.project", str),
        "name": run_name,
        **each("log_dir filename dir", ignored("the run's folder holds its metrics")),
        **each("entity group job_type", unsupported("set the tracker's own environment variables")),
    },
}

_TABLE: Table = {
    "output_dir": same("run_directory", str),
    "seed": same("seed", number),
    "shuffle": same("data.shuffle", truth),
    "clip_grad_norm": same("training.gradient_clip", number),
    "compile": same("training.compile", truth),
    "dtype": _precision,
    "enable_activation_checkpointing": _recomputed,
    "enable_activation_offloading": same("training.activation_offload", truth),
    **each("ac_mode ac_option", ignored("whole blocks are recomputed")),
    "fsdp_cpu_offload": _offloaded,
    **each(
        "fsdp_reshard_after_forward fsdp_sharding_strategy custom_sharded_layers",
        ignored("`parallel.zero` says what is sharded"),
    ),
    "tensor_parallel_dim": same("parallel.tp", number),
    "context_parallel_dim": same("parallel.cp", number),
    "data_parallel_shard_dim": unsupported("the plan derives it; or write `parallel.dp_shard`"),
    "data_parallel_replicate_dim": same("parallel.dp_replicate", number),
    "tensor_parallel_plan": ignored("how layers are cut is known by family"),
    "log_every_n_steps": same("tracking.log_every", number),
    "log_level": ignored(OWN_LAUNCH),
    "log_peak_memory_stats": ignored("always in the run's report"),
    "run_val_every_n_steps": same("evaluation.every", number),
    "save_every_n_steps": same("checkpoint.every", number),
    "save_last_epoch_only": ignored("the last step is always saved"),
    "save_adapter_weights_only": ignored("checkpoints hold what is trained, and its optimizer"),
    "enable_async_checkpointing": same("checkpoint.asynchronous", truth),
    "resume_from_checkpoint": ignored(OWN_RESUMING),
    "optimizer_in_bwd": ignored("gradients are clipped by the norm of the whole model"),
    **each("device device_index process_group_backend keep_checkpoint", ignored(OWN_LAUNCH)),
    "dataloader": ignored(OWN_LOADING),
    "profiler": ignored("of the other tool's own workings"),
    "batch_size_val": ignored("the plan finds the micro-batch"),
    **each(
        "enable_fp8_training",
        same("training.precision", lambda v: "float8" if truth(v) else "bf16"),
    ),
    "fp8_recipe_name": ignored(OWN_KERNELS),
    "quantizer": unsupported("weights are quantised under adapters only"),
}

# Where our defaults are others than torchtune's: our key, theirs, and its value.
_DEFAULTS: dict[str, tuple[str, Any]] = {
    "data.packing": ("dataset.packed", "none"),
    "data.validation": ("dataset_val", 0.0),
    "training.gradient_clip": ("clip_grad_norm", None),
    "optimizer.weight_decay": ("optimizer.weight_decay", 0.01),
    "optimizer.betas": ("optimizer.betas", [0.9, 0.999]),
    "schedule.final": ("lr_scheduler", 0.0),
}

"""What each of TRL's single arguments is in the recipe."""

from __future__ import annotations

from typing import Any

from trainwright.recipe.importers.hf_arguments import TRAINING_ARGUMENTS
from trainwright.recipe.importers.job import (
    Job,
    Table,
    each,
    ignored,
    number,
    same,
    truth,
    unsupported,
)
from trainwright.recipe.importers.rules import (
    NO_EARLY_STOP,
    OWN_LAUNCH,
    WEIGHTS_FP32,
)
from trainwright.recipe.importers.templates import template_file

ON_POLICY = "there is no training on the model's own answers here"


def _kept(job: Job, key: str, value: Any) -> None:
    if value == "keep_start":
        job.translated(key, "data.too_long", "cut")
    else:
        job.approximated(key, "data.too_long", "cut", "examples lose their end, not their start")


def _weights_type(job: Job, key: str, value: Any) -> None:
    if value in ("auto", "float32"):
        job.ignored(key, "weights are kept in fp32 and saved as `export.dtype` says")
    else:
        job.approximated(
            key, "export.dtype", "bf16" if value == "bfloat16" else "fp16", WEIGHTS_FP32
        )


_OF_KIND = ignored("of no use for this objective")
_DIVERGENCE = "the divergence is the reverse KL"


def _only_loss(job: Job, key: str, value: Any) -> None:
    """`loss_type` of objectives that have one loss here."""
    if value in ("kto", "sigmoid", ["kto"], ["sigmoid"]):
        job.ignored(key, "the objective's own loss")
    else:
        job.unsupported(key, f"{job.given('objective.kind')} has one loss here")


def _divergence(job: Job, key: str, value: Any) -> None:
    if value == "reverse_kl":
        job.ignored(key, _DIVERGENCE)
    else:
        job.unsupported(key, _DIVERGENCE)


KINDS: dict[str, Table] = {
    "dpo": {
        "beta": same("objective.beta", number),
        "precompute_ref_log_probs": same("objective.cache_reference", truth),
    },
    "kto": {
        "beta": same("objective.beta", number),
        "precompute_ref_log_probs": same("objective.cache_reference", truth),
        "desirable_weight": same("objective.desirable_weight", number),
        "undesirable_weight": same("objective.undesirable_weight", number),
    },
    "orpo": {"beta": same("objective.beta", number)},
    "cpo": {
        "beta": same("objective.beta", number),
        "cpo_alpha": same("objective.sft_weight", number),
        "label_smoothing": same("objective.label_smoothing", number),
    },
    "simpo": {
        "beta": same("objective.beta", number),
        "cpo_alpha": same("objective.sft_weight", number),
        "simpo_gamma": same("objective.margin", number),
    },
    "reward": {"center_rewards_coefficient": same("objective.center", number)},
    "distill": {
        "teacher_model_name_or_path": same("objective.teacher", str),
        "temperature": same("objective.temperature", number),
        "beta": same("objective.beta", number),
        **each("lmbda seq_kd max_new_tokens", unsupported(ON_POLICY)),
    },
}

TABLE: Table = {
    **TRAINING_ARGUMENTS,
    "model_name_or_path": same("model.path", str),
    "tokenizer_name_or_path": same("tokenizer.path", str),
    "chat_template_path": template_file,
    **each("dtype torch_dtype", _weights_type),
    "truncation_mode": _kept,
    "test_split_size": same("data.validation", number),
    "shuffle_dataset": same("data.shuffle", truth),
    "num_processes": same("parallel.workers", number),
    "config": ignored("its keys are read as well"),
    **each("eval_packing", ignored("held-out rows are filled like the others")),
    **each(
        "max_prompt_length max_completion_length",
        unsupported("an example is cut as a whole, by `data.sequence_length`"),
    ),
    **each(
        "pad_token eos_token",
        unsupported("the tokenizer keeps its tokens; padding is never trained on"),
    ),
    **each(
        "dataset_kwargs model_init_kwargs ref_model_init_kwargs teacher_model_init_kwargs "
        "dataset_batch_size use_logits_to_keep disable_dropout ignore_bias_buffers",
        ignored(OWN_LAUNCH),
    ),
    **each(
        "precompute_ref_batch_size precompute_ref_eval_batch_size",
        ignored("as large as a micro-batch"),
    ),
    "generate_during_eval": unsupported("`evaluation.samples.prompts` shows completions"),
    **each(
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
        unsupported("the reference stays what it was"),
    ),
    "reference_free": unsupported("without a reference, choose orpo, cpo or simpo"),
    "force_use_ref_model": ignored("`objective.reference` names another reference"),
    **each("model_adapter_name ref_adapter_name", ignored("there is one adapter")),
    "f_divergence_type": _divergence,
    "f_alpha_divergence_coef": unsupported(_DIVERGENCE),
    "use_weighting": unsupported("pairs weigh alike"),
    "ld_alpha": unsupported("longer answers' tails weigh like the rest"),
    "discopop_tau": unsupported("discopop's temperature is 0.05"),
    "center_rewards_coefficient": _OF_KIND,
    "early_stopping_patience": unsupported(NO_EARLY_STOP),
    "alpha": unsupported("AlphaPO's rewards are not among the losses"),
    "is_encoder_decoder": ignored("models here are decoders"),
    "env": unsupported("set environment variables before the command"),
    **each(
        "beta label_smoothing desirable_weight undesirable_weight cpo_alpha simpo_gamma "
        "loss_weights rpo_alpha temperature",
        _OF_KIND,
    ),
    "loss_type": _only_loss,
}

# Where our defaults are others than TRL's: our key, theirs, and its value.
DEFAULTS: dict[str, tuple[str, Any]] = {
    "data.validation": ("eval_strategy", 0.0),
    "training.recompute": ("gradient_checkpointing", "full"),
    "optimizer.weight_decay": ("weight_decay", 0.0),
    "schedule.name": ("lr_scheduler_type", "linear"),
    "schedule.final": ("lr_scheduler_kwargs", 0.0),
}

"""LLaMA-Factory's YAML: `stage`, `finetuning_type`, `template`, `dataset`, …

Keys and their defaults are those of LLaMA-Factory's arguments (llamafactory/hparams).
"""

from __future__ import annotations

from typing import Any

from trainwright.recipe.importers.hf_arguments import TRAINING_ARGUMENTS, training_arguments
from trainwright.recipe.importers.job import (
    Job,
    Rule,
    Table,
    each,
    ignored,
    is_off,
    names,
    number,
    same,
    truth,
    unsupported,
    when_on,
)
from trainwright.recipe.importers.llama_factory_data import limit, shares, sources
from trainwright.recipe.importers.rules import (
    IMAGES,
    NO_EARLY_STOP,
    OWN_CACHE,
    OWN_KERNELS,
    OWN_LAUNCH,
    batch,
    held_out,
    row_length,
)
from trainwright.recipe.importers.templates import chat_template

_STAGES = {"pt": "next_token", "sft": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto"}
_LINEAR_ONLY = "adapters are LoRA here"


def translate(job: Job) -> None:
    """Take up every key of a LLaMA-Factory configuration."""
    kind = _objective(job)
    _adapter(job)
    _data(job, kind)
    batch(job, "per_device_train_batch_size", "gradient_accumulation_steps", 8)
    training_arguments(job, 3.0, "fp32")
    job.run(_TABLE)
    if job.given("training.recompute") is None:
        job.assumed("disable_gradient_checkpointing", "training.recompute", "full")
    for target, (key, value) in _DEFAULTS.items():
        job.assumed(key, target, value)


def _objective(job: Job) -> str:
    stage = str(job.get("stage") or "sft")
    if stage not in _STAGES:
        fix = f"of `stage`, {', '.join(_STAGES)} can be imported"
        raise job.refusal("stage", f"there is no training in stage `{stage}` here", fix)
    kind = _STAGES[stage]
    loss = str(job.get("pref_loss") or "sigmoid")
    if kind == "dpo" and loss in ("orpo", "simpo"):
        kind = loss
    if job.has("stage"):
        job.translated("stage", "objective.kind", kind)
    else:
        job.assumed("stage", "objective.kind", kind)
    if kind in ("dpo", "kto", "orpo", "simpo"):
        if job.has("pref_beta"):
            job.translated("pref_beta", "objective.beta", job.number("pref_beta"))
        else:
            job.assumed("pref_beta", "objective.beta", 0.1)
    if kind == "dpo":
        _preference(job, loss)
    elif kind in ("orpo", "simpo") and job.has("pref_loss"):
        job.note("translated", "pref_loss", "objective.kind")
    if kind == "simpo":
        gamma = job.number("simpo_gamma", 0.5)
        if job.has("simpo_gamma"):
            job.translated("simpo_gamma", "objective.margin", gamma)
        else:
            job.assumed("simpo_gamma", "objective.margin", 0.5)
    if kind in ("dpo", "kto") and job.has("ref_model"):
        job.translated("ref_model", "objective.reference", str(job.get("ref_model")))
    for theirs, ours in (("chosen", "desirable"), ("rejected", "undesirable")):
        key = f"kto_{theirs}_weight"
        if kind == "kto" and job.has(key):
            job.translated(key, f"objective.{ours}_weight", job.number(key))
    return kind


def _preference(job: Job, loss: str) -> None:
    """DPO's loss, with label smoothing and terms of supervised training and of BCO."""
    if loss == "kto_pair":
        fix = "use `stage: kto` with rows marked good or bad"
        raise job.refusal("pref_loss", "kto_pair (KTO from pairs) is no loss here", fix)
    terms = {loss: 1.0}
    smoothing = job.number("dpo_label_smoothing", 0) or 0
    if smoothing and loss == "sigmoid":
        terms = {"cdpo": 1.0}
        job.translated("dpo_label_smoothing", "objective.label_smoothing", smoothing)
    added = {"sft": job.number("pref_ftx", 0) or 0, "bco": job.number("pref_bco_weight", 0) or 0}
    terms |= {name: weight for name, weight in added.items() if weight}
    job.put("objective.loss", terms if len(terms) > 1 else next(iter(terms)))
    if job.has("pref_loss"):
        job.note("translated", "pref_loss", "objective.loss")
    if added["sft"]:
        reason = (
            "its mean is over the batch's tokens; LLaMA-Factory takes the mean of each answer's"
        )
        job.note("approximated", "pref_ftx", "objective.loss", reason)
    if added["bco"]:
        reason = "without the running mean of rewards that BCO shifts by"
        job.note("approximated", "pref_bco_weight", "objective.loss", reason)


def _adapter(job: Job) -> None:
    kind = str(job.get("finetuning_type") or "lora")
    if kind == "lora":
        job.put("adapter", {})
        if job.has("finetuning_type"):
            job.note("translated", "finetuning_type", "adapter")
        _quantised(job)
        job.run(_ADAPTER)
        rank = job.given("adapter.rank") or 8
        job.assumed("lora_rank", "adapter.rank", 8)
        job.assumed("lora_alpha", "adapter.alpha", 2 * rank)
        job.assumed("lora_target", "adapter.targets", "all-linear")
        return
    if kind == "full":
        job.ignored("finetuning_type", "all weights are trained where there is no adapter")
    elif kind == "freeze":
        reason = "name what stays frozen in `training.freeze`; without it all weights are trained"
        job.unsupported("finetuning_type", reason)
    else:
        fix = "import it with `finetuning_type: lora`"
        raise job.refusal("finetuning_type", f"{_LINEAR_ONLY}; `{kind}` is not known", fix)
    for key in (*_ADAPTER, "quantization_bit"):
        if job.has(key) and not job.is_noted(key):
            job.ignored(key, "there is no adapter")


def _quantised(job: Job) -> None:
    bits = job.number("quantization_bit", 0) or 0
    kind = job.get("quantization_type")
    if not bits:
        return
    if bits not in (4, 8):
        reason = f"weights have 4 or 8 bits here, not {bits:g}"
        job.approximated("quantization_bit", "adapter.quantise", "nf4", reason)
    elif bits == 4 and kind == "fp4":
        reason = "4 bits are nf4, never fp4"
        job.approximated("quantization_type", "adapter.quantise", "nf4", reason)
        job.note("translated", "quantization_bit", "adapter.quantise")
    else:
        ours = "nf4" if bits == 4 else "int8"
        job.translated("quantization_bit", "adapter.quantise", ours)


def _targets(job: Job, key: str, value: Any) -> None:
    chosen = names(value)
    job.translated(key, "adapter.targets", "all-linear" if "all" in chosen else chosen)


def _paths(job: Job, key: str, value: Any) -> None:
    paths = names(value)
    if len(paths) == 1:
        job.translated(key, "adapter.path", paths[0])
    else:
        reason = "training goes on from one adapter; merge the others into the model before"
        job.approximated(key, "adapter.path", paths[-1], reason)


_ADAPTER: dict[str, Rule] = {
    "lora_rank": same("adapter.rank", number),
    "lora_alpha": same("adapter.alpha", number),
    "lora_dropout": same("adapter.dropout", number),
    "lora_target": _targets,
    "additional_target": same("adapter.train_also", names),
    "use_rslora": same("adapter.rslora", truth),
    "use_dora": same("adapter.dora", truth),
    "pissa_init": when_on(same("adapter.init", lambda value: "pissa")),
    "pissa_iter": ignored("the exact singular vectors, not some rounds of approximation"),
    "pissa_convert": unsupported("the saved adapter belongs to the changed base model"),
    "loraplus_lr_ratio": same("adapter.plus_ratio", number),
    "loraplus_lr_embedding": unsupported("embeddings' adapters learn at the same rate"),
    "create_new_adapter": unsupported("one adapter is trained; merge the other before"),
    "adapter_name_or_path": _paths,
}


def _data(job: Job, kind: str) -> None:
    for key in ("dataset", "eval_dataset"):
        if job.has(key):
            sources(job, key, kind)
    row_length(job, "cutoff_len", 2048)
    _packing(job, kind)
    if kind == "sft":
        _trained(job)


def _packing(job: Job, kind: str) -> None:
    neat = job.has("neat_packing") and not is_off(job.get("neat_packing"))
    on = job.has("packing") and not is_off(job.get("packing"))
    if neat:
        job.translated("neat_packing", "data.packing", "best-fit")
    elif on and kind != "next_token":
        reason = "sequences of one row do not see each other here, which LLaMA-Factory's do"
        job.approximated("packing", "data.packing", "best-fit", reason)
    elif on or (kind == "next_token" and not job.has("packing")):
        job.put("data.packing", "concat")
    else:
        job.put("data.packing", "none")
    for key in ("packing", "neat_packing"):
        if job.has(key) and not job.is_noted(key):
            job.note("translated", key, "data.packing")


def _trained(job: Job) -> None:
    asked = {
        "train_on_prompt": ("all", "with the prompt the turns' headers are trained as well"),
        "mask_history": ("completion", ""),
    }
    job.put("objective.train_on", "assistant")
    for key, (ours, differs) in asked.items():
        if not job.has(key):
            continue
        if is_off(job.get(key)):
            job.ignored(key, "switched off")
        elif differs:
            job.approximated(key, "objective.train_on", ours, differs)
        else:
            job.translated(key, "objective.train_on", ours)


def _no_recompute(job: Job, key: str, value: Any) -> None:
    job.translated(key, "training.recompute", "none" if truth(value) else "full")


def _unshuffled(job: Job, key: str, value: Any) -> None:
    job.translated(key, "data.shuffle", not truth(value))


_TABLE: Table = {
    **TRAINING_ARGUMENTS,
    "model_name_or_path": same("model.path", str),
    "template": chat_template,
    "max_samples": limit,
    "interleave_probs": shares,
    "val_size": held_out,
    "disable_gradient_checkpointing": _no_recompute,
    "disable_shuffling": _unshuffled,
    "moe_aux_loss_coef": same("training.router_balance_loss", number),
    "use_muon": when_on(same("optimizer.name", lambda value: "muon")),
    "use_swanlab": unsupported("tracking knows tensorboard, wandb and trackio"),
    "early_stopping_steps": unsupported(NO_EARLY_STOP),
    "dataset_dir": ignored("the data sets' own paths are in the recipe"),
    **each("mix_strategy", ignored("`weight` of each source says the mixture")),
    **each("overwrite_cache tokenized_path cache_dir", ignored(OWN_CACHE)),
    **each(
        "plot_loss include_effective_tokens_per_second compute_accuracy print_param_status",
        ignored("always in the run's report"),
    ),
    **each("train_from_scratch", unsupported("a new model is `model.family` and `model.preset`")),
    **each(
        "use_fast_tokenizer split_special_tokens use_kv_cache infer_dtype infer_backend "
        "offload_folder quantization_device_map upcast_layernorm upcast_lmhead_output",
        ignored("the model's own files say it, or it is for generation only"),
    ),
    **each("quantization_method", ignored("bitsandbytes' layout, on any device")),
    **each("quantization_type double_quantization", ignored("nf4, doubly quantised")),
    **each(
        "resize_vocab add_tokens add_special_tokens new_special_tokens_config init_special_tokens",
        unsupported("the vocabulary stays as it is"),
    ),
    **each(
        "rope_scaling shift_attn mixture_of_depths",
        unsupported("a pretrained model keeps its config"),
    ),
    **each(
        "adapter_folder ref_model_adapters ref_model_quantization_bit reward_model_adapters "
        "reward_model_quantization_bit",
        unsupported("name one whole model, merged before"),
    ),
    "ref_model": ignored("no reference model is needed"),
    **each(
        "pref_beta pref_ftx pref_loss pref_bco_weight simpo_gamma kto_chosen_weight "
        "kto_rejected_weight dpo_label_smoothing",
        ignored("of no use for this stage"),
    ),
    "ld_alpha": unsupported("longer answers' tails weigh like the rest"),
    **each(
        "reward_model reward_model_type ppo_buffer_size ppo_epochs ppo_score_norm ppo_target "
        "ppo_whiten_rewards",
        unsupported("there is no training by rewards of the model's own answers here"),
    ),
    **each(
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules use_llama_pro",
        unsupported("`training.freeze` names what is not trained"),
    ),
    **each(
        "use_galore galore_target galore_rank galore_update_interval galore_scale "
        "galore_proj_type galore_layerwise use_apollo apollo_target apollo_rank "
        "apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_layerwise "
        "apollo_scale_front use_badam badam_mode badam_start_block badam_switch_mode "
        "badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose "
        "use_adam_mini",
        unsupported("optimizers are muon and adamw, its 8-bit and paged kinds"),
    ),
    **each("oft_rank oft_block_size oft_target module_dropout", unsupported(_LINEAR_ONLY)),
    "use_dft_loss": unsupported("each token's loss is its own cross entropy"),
    "tool_format": ignored("the chat template words the tools"),
    "eval_on_each_dataset": ignored("held-out loss is told by data set"),
    **each(
        "media_dir image_max_pixels image_min_pixels video_max_pixels video_fps video_maxlen "
        "video_min_pixels freeze_vision_tower freeze_multi_modal_projector "
        "freeze_language_model audio_sampling_rate use_audio_in_video crop_to_patches",
        unsupported(IMAGES),
    ),
    **each(
        "swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key "
        "swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret",
        unsupported("tracking knows tensorboard, wandb and trackio"),
    ),
    **each("fp8", when_on(same("training.precision", lambda value: "float8"))),
    **each("fp8_backend fp8_enable_fsdp_float8_all_gather", ignored(OWN_KERNELS)),
    **each("hf_hub_token ms_hub_token om_hub_token", ignored("the hub's own log-in is used")),
    **each(
        "use_ray ray_run_name ray_storage_path ray_num_workers resources_per_worker "
        "placement_strategy ray_init_kwargs",
        ignored(OWN_LAUNCH),
    ),
    **each(
        "export_dir export_size export_device export_legacy_format export_quantization_bit "
        "export_quantization_dataset",
        ignored("`trainwright export` does it afterwards, `--merge` and `--gguf` included"),
    ),
    "export_hub_model_id": when_on(same("export.push")),
    **each(
        "eval_num_beams max_new_tokens top_p top_k temperature do_sample num_beams "
        "repetition_penalty default_system enable_thinking",
        unsupported("completions are asked for in `evaluation.samples`"),
    ),
}

# Where our defaults are others than LLaMA-Factory's: our key, theirs, and its value.
_DEFAULTS = {
    "data.validation": ("val_size", 0.0),
    "optimizer.learning_rate": ("learning_rate", 5e-5),
    "optimizer.weight_decay": ("weight_decay", 0.0),
    "schedule.name": ("lr_scheduler_type", "linear"),
    "schedule.final": ("lr_scheduler_kwargs", 0.0),
}

"""transformers' TrainingArguments, which LLaMA-Factory and TRL take over key by key."""

from __future__ import annotations

from typing import Any

from trainwright.recipe.importers.job import (
    Job,
    Table,
    each,
    ignored,
    is_off,
    near,
    number,
    same,
    truth,
    unsupported,
)
from trainwright.recipe.importers.rules import (
    HUB,
    OWN_KERNELS,
    OWN_LAUNCH,
    OWN_LOADING,
    OWN_PADDING,
    OWN_RESUMING,
    betas,
    final_rate,
    length,
    optimizer,
    precision,
    recompute,
    run_name,
    schedule,
    steps_between,
    strategy,
    trackers,
    warmup,
)
from trainwright.recipe.importers.spreading import accelerate, deepspeed, fsdp, fsdp_config


def training_arguments(job: Job, epochs: float, otherwise: str) -> None:
    """Keys that go together: length, warm-up, betas, precision.

    `epochs` is the tool's default, and `otherwise` the precision without `bf16` and `fp16`.
    """
    length(job, "num_train_epochs", "max_steps", epochs)
    warmup(job, "warmup_steps", "warmup_ratio")
    betas(job, "adam_beta1", "adam_beta2")
    precision(job, {"bf16": "bf16", "fp16": "fp16", "pure_bf16": "bf16"}, otherwise)


def _clip(job: Job, key: str, value: Any) -> None:
    norm = number(value)
    job.translated(key, "training.gradient_clip", norm if norm > 0 else None)


def _learning(job: Job, key: str, value: Any) -> None:
    """`do_train`, which is what a recipe is for."""
    if is_off(value):
        job.unsupported(key, "a recipe trains; `trainwright evaluate` measures")
    else:
        job.ignored(key, "a recipe trains")


def _push(job: Job, key: str, value: Any) -> None:
    """`push_to_hub`: `hub_model_id` says where to."""
    if is_off(value):
        job.ignored(key, "switched off")
    elif job.has("hub_model_id"):
        job.ignored(key, "`hub_model_id` says where to")
    else:
        job.unsupported(key, "the repository's owner is not known here: write `export.push`")


def _push_to(job: Job, key: str, value: Any) -> None:
    """`hub_model_id`, which counts with `push_to_hub` only."""
    if job.has("push_to_hub") and not is_off(job.get("push_to_hub")):
        job.translated(key, "export.push", value)
    else:
        job.ignored(key, "without `push_to_hub` nothing is sent")


def _sampling(job: Job, key: str, value: Any) -> None:
    """The order of rows."""
    if value == "sequential":
        job.translated(key, "data.shuffle", False)
    else:
        job.ignored(key, "rows are shuffled, and filled as `data.packing` says")


TRAINING_ARGUMENTS: Table = {
    "train_sampling_strategy": _sampling,
    "output_dir": same("run_directory", str),
    "run_name": run_name,
    "seed": same("seed", number),
    "data_seed": unsupported("one `seed` is for everything"),
    "full_determinism": ignored("the same seed gives the same batches on any number of workers"),
    "learning_rate": same("optimizer.learning_rate", number),
    "weight_decay": same("optimizer.weight_decay", number),
    "adam_epsilon": same("optimizer.eps", number),
    "max_grad_norm": _clip,
    "optim": optimizer,
    "optim_target_modules": unsupported("every weight has the one optimizer"),
    "router_aux_loss_coef": same("training.router_balance_loss", number),
    "project": ignored("`tracking.project` is the trackers' project"),
    "parallelism_config": unsupported("how the work is spread stands in `parallel`"),
    "optim_args": unsupported("an optimizer's options are the keys of `optimizer`"),
    "lr_scheduler_type": schedule,
    "lr_scheduler_kwargs": final_rate,
    **each("gradient_checkpointing activation_checkpointing", recompute),
    **each(
        "gradient_checkpointing_kwargs gradient_checkpointing_use_reentrant use_reentrant_gc "
        "activation_checkpointing_kwargs",
        ignored("recomputing is never reentrant"),
    ),
    "activation_offloading": same("training.activation_offload", truth),
    "neftune_noise_alpha": same("training.neftune_alpha", number),
    "torch_compile": same("training.compile", truth),
    **each("torch_compile_backend torch_compile_mode", ignored("torch.compile's own defaults")),
    **each(
        "tf32 flash_attn use_liger_kernel enable_liger_kernel use_flash_attention_2 "
        "attn_implementation use_unsloth use_unsloth_gc liger_kernel_config use_v1_kernels "
        "torch_empty_cache_steps bf16_full_eval fp16_full_eval half_precision_backend",
        ignored(OWN_KERNELS),
    ),
    "deepspeed": deepspeed,
    "fsdp": fsdp,
    "fsdp_config": fsdp_config,
    "accelerator_config": ignored(OWN_LAUNCH),
    **each("accelerate_config config_file", accelerate),
    **each(
        "ddp_timeout ddp_find_unused_parameters ddp_backend ddp_bucket_cap_mb "
        "ddp_broadcast_buffers local_rank num_machines machine_rank main_process_port "
        "ddp_static_graph log_level_replica save_on_each_node use_cache debug "
        "main_process_ip no_cuda use_cpu disable_tqdm log_level log_on_each_node "
        "low_cpu_mem_usage device_map mixed_precision multi_gpu",
        ignored(OWN_LAUNCH),
    ),
    **each(
        "dataloader_num_workers dataloader_pin_memory dataloader_drop_last "
        "dataloader_in_order dataloader_multiprocessing_context dataloader_persistent_workers "
        "dataloader_prefetch_factor preprocessing_num_workers "
        "preprocessing_batch_size remove_unused_columns dataset_num_proc streaming "
        "dataset_streaming buffer_size split_batches",
        ignored(OWN_LOADING),
    ),
    **each(
        "pad_to_multiple_of group_by_length padding_free label_pad_token_id padding_value "
        "length_column_name ignore_pad_token_for_loss",
        ignored(OWN_PADDING),
    ),
    **each(
        "per_device_eval_batch_size eval_accumulation_steps auto_find_batch_size",
        ignored("the plan finds the micro-batch"),
    ),
    "eval_steps": steps_between("evaluation.every", "every other checkpoint"),
    **each("eval_strategy evaluation_strategy", strategy("evaluation.every")),
    **each(
        "eval_on_start eval_delay do_eval prediction_loss_only include_num_input_tokens_seen "
        "include_for_metrics label_names eval_do_concat_batches eval_use_gather_object "
        "average_tokens_across_devices batch_eval_metrics",
        ignored("what is held out is measured in any case, each token with one weight"),
    ),
    "save_steps": steps_between("checkpoint.every", "a tenth of the run"),
    "save_strategy": strategy("checkpoint.every"),
    "save_total_limit": same("checkpoint.keep_last", number),
    "save_only_model": ignored("checkpoints are whole, so that runs can be resumed"),
    "save_safetensors": ignored("weights are always safetensors"),
    "load_best_model_at_end": near(
        "checkpoint.keep_best",
        "the best by validation loss is kept; the export is the last",
        truth,
    ),
    **each("metric_for_best_model greater_is_better", ignored("the best is by validation loss")),
    **each(
        "resume_from_checkpoint restore_callback_states_from_checkpoint enable_jit_checkpoint "
        "overwrite_output_dir ignore_data_skip",
        ignored(OWN_RESUMING),
    ),
    "logging_steps": steps_between("tracking.log_every", "1"),
    "logging_strategy": strategy("tracking.log_every"),
    **each(
        "trackio_space_id trackio_bucket_id trackio_static_space_id logging_first_step logging_dir "
        "log_completions include_tokens_per_second "
        "skip_memory_metrics logging_nan_inf_filter",
        ignored("every logged step goes into the run directory"),
    ),
    "report_to": trackers,
    "do_train": _learning,
    **each(
        "do_predict predict_with_generate",
        unsupported("`evaluation.samples.prompts` shows completions while training"),
    ),
    "push_to_hub": _push,
    "hub_model_id": _push_to,
    "hub_private_repo": same("export.private", truth),
    **each("hub_strategy hub_token hub_revision hub_always_push", unsupported(HUB)),
    **each("label_smoothing_factor", unsupported("targets are not smoothed")),
    "trust_remote_code": same("model.trust_remote_code", truth),
    "model_revision": ignored("the newest version on the hub is taken"),
}

"""What each of Axolotl's single keys is in the recipe."""

from __future__ import annotations

from typing import Any

from trainwright.recipe.importers.job import (
    Job,
    Table,
    display_name,
    each,
    ignored,
    is_off,
    names,
    near,
    number,
    same,
    truth,
    unsupported,
    when_on,
)
from trainwright.recipe.importers.rules import (
    HUB,
    IMAGES,
    NO_EARLY_STOP,
    OWN_CACHE,
    OWN_KERNELS,
    OWN_LAUNCH,
    OWN_LOADING,
    OWN_PADDING,
    OWN_RESUMING,
    PER_EPOCH,
    final_rate,
    held_out,
    optimizer,
    project,
    recompute,
    run_name,
    schedule,
    steps_between,
    strategy,
    tracker,
)
from trainwright.recipe.importers.spreading import PARALLEL, deepspeed, fsdp, fsdp_config
from trainwright.recipe.importers.templates import chat_template, template_file

BY_REWARD = "there is no training by rewards of the model's own answers here"


def _packing(job: Job, key: str, value: Any) -> None:
    job.translated(key, "data.packing", "best-fit" if truth(value) else "none")


def _offloaded(job: Job, key: str, value: Any) -> None:
    if is_off(value):
        job.ignored(key, "switched off")
    elif value is True:
        job.translated(key, "training.activation_offload", True)
    else:
        reason = f"to the host's memory, not as `{value}`"
        job.approximated(key, "training.activation_offload", True, reason)


def _compiled(job: Job, key: str, value: Any) -> None:
    job.translated(key, "training.compile", value if value == "auto" else truth(value))


def _too_long(job: Job, key: str, value: Any) -> None:
    job.translated(key, "data.too_long", "cut" if value == "truncate" else "drop")


def _plugins(job: Job, key: str, value: Any) -> None:
    fused = all("liger" in each.lower() or "cut_cross" in each.lower() for each in names(value))
    if fused:
        job.ignored(key, OWN_KERNELS)
    else:
        job.unsupported(key, f"{display_name(job.tool)}'s plugins are code of its own")


TABLE: Table = {
    "base_model": same("model.path", str),
    **each("base_model_config tokenizer_config", same("tokenizer.path", str)),
    "trust_remote_code": same("model.trust_remote_code", truth),
    **each(
        "model_type type_of_model tokenizer_type cls_model_config is_llama_derived_model "
        "is_mistral_derived_model is_falcon_derived_model is_qwen_derived_model "
        "tokenizer_use_fast tokenizer_legacy low_cpu_mem_usage strict",
        ignored("the model's own files say it"),
    ),
    **each(
        "tokenizer_use_mistral_common tokenizer_save_jinja_files num_labels "
        "experimental_skip_move_to_device llama4_linearized_experts",
        ignored("the model's own files say it"),
    ),
    **each(
        "model_quantization_config model_quantization_config_kwargs",
        unsupported("weights are quantised here, not loaded quantised"),
    ),
    **each(
        "use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks rope_scaling "
        "max_packed_sequence_len",
        unsupported("a pretrained model keeps its config"),
    ),
    **each(
        "adam_epsilon2 adam_beta3 lr_div_factor torchdistx_path",
        unsupported("optimizers are muon and adamw, its 8-bit and paged kinds"),
    ),
    **each(
        "max_prompt_len",
        unsupported("an example is cut as a whole, by `data.sequence_length`"),
    ),
    **each("dpo_norm_loss", unsupported("`objective.loss: sigmoid_norm` is near to it")),
    **each(
        "dpo_use_logits_to_keep dpo_generate_during_eval sample_packing_eff_est "
        "total_num_tokens total_supervised_tokens axolotl_config_path",
        ignored("of the other tool's own workings"),
    ),
    "base_model_ignore_patterns": ignored("only safetensors and the config are read"),
    **each("revision_of_model model_revision", unsupported("download that version and name it")),
    **each(
        "overrides_of_model_config model_config overrides_of_model_kwargs model_kwargs",
        unsupported("a pretrained model keeps its config"),
    ),
    "output_dir": same("run_directory", str),
    "seed": same("seed", number),
    "chat_template": chat_template,
    "chat_template_jinja": template_file,
    "default_system_message": unsupported("system turns stand in the data"),
    "eot_tokens": ignored("the end of a turn is found from the template, and trained"),
    "special_tokens": unsupported("the tokenizer keeps its tokens; padding is never trained on"),
    **each(
        "tokens added_tokens_overrides resize_token_embeddings_to_32x shrink_embeddings "
        "mean_resizing_embeddings embeddings_skip_upcast fix_untrained_tokens",
        unsupported("the vocabulary stays as it is"),
    ),
    "sample_packing": _packing,
    "pretraining_sample_concatenation": when_on(
        same("data.packing", lambda value: "concat"), "`data.packing` says it"
    ),
    "excess_length_strategy": _too_long,
    "shuffle_merged_datasets": same("data.shuffle", truth),
    "val_set_size": held_out,
    "dataset_prepared_path": ignored(OWN_CACHE),
    "push_dataset_to_hub": unsupported(HUB),
    **each("eval_sample_packing", ignored("held-out rows are filled like the others")),
    **each(
        "pad_to_sequence_len group_by_length sample_packing_group_size sample_packing_bin_size "
        "sample_packing_sequentially multipack_real_batches batch_flattening "
        "pretrain_multipack_buffer_size pretrain_multipack_attn",
        ignored(OWN_PADDING),
    ),
    **each(
        "dataset_processes dataset_num_proc dataset_keep_in_memory dataloader_pin_memory "
        "dataloader_num_workers dataloader_prefetch_factor dataloader_drop_last "
        "remove_unused_columns streaming skip_prepare_dataset preprocess_iterable "
        "is_preprocess hf_use_auth_token accelerator_config shuffle_before_merging_datasets",
        ignored(OWN_LOADING),
    ),
    "dataset_exact_deduplication": unsupported("rows are taken as they are"),
    **each("dataset_shard_num dataset_shard_idx", unsupported("`limit` takes the first rows")),
    **each("min_sample_len curriculum_sampling", unsupported("every row is taken, shuffled")),
    "learning_rate": same("optimizer.learning_rate", number),
    "optimizer": optimizer,
    "optim_args": unsupported("an optimizer's options are the keys of `optimizer`"),
    "weight_decay": same("optimizer.weight_decay", number),
    "adam_epsilon": same("optimizer.eps", number),
    "max_grad_norm": same("training.gradient_clip", number),
    "lr_scheduler": schedule,
    "lr_scheduler_kwargs": final_rate,
    "cosine_min_lr_ratio": same("schedule.final", number),
    "cosine_constant_lr_ratio": unsupported("a cosine runs to the end"),
    **each(
        "embedding_lr embedding_lr_scale lr_groups lr_quadratic_warmup optim_target_modules",
        unsupported("one learning rate is for all weights, its warm-up linear"),
    ),
    "neftune_noise_alpha": same("training.neftune_alpha", number),
    "noisy_embedding_alpha": same("training.neftune_alpha", number),
    "unfrozen_parameters": unsupported("`training.freeze` names what is not trained"),
    "gradient_checkpointing": recompute,
    "gradient_checkpointing_kwargs": ignored("recomputing is never reentrant"),
    "activation_offloading": _offloaded,
    "torch_compile": _compiled,
    **each("torch_compile_backend torch_compile_mode", ignored("torch.compile's own defaults")),
    "plugins": _plugins,
    "batch_size": unsupported("write `training.batch_sequences`, the batch of all devices"),
    **each("eval_batch_size auto_find_batch_size", ignored("the plan finds the micro-batch")),
    **each(
        "flash_attention sdp_attention xformers_attention eager_attention flex_attention attention "
        "attn_implementation flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv "
        "flash_attn_fuse_mlp unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv "
        "unsloth_lora_o unsloth_rms_norm unsloth_rope liger_rope liger_rms_norm liger_swiglu "
        "liger_glu_activation liger_layer_norm liger_cross_entropy cut_cross_entropy "
        "liger_fused_linear_cross_entropy flash_optimum tf32 gc_steps lora_mlp_kernel "
        "lora_qkv_kernel lora_o_kernel use_kernels chunked_cross_entropy flex_attn_compile_kwargs",
        ignored(OWN_KERNELS),
    ),
    "s2_attention": unsupported("attention sees all tokens"),
    "deepspeed": deepspeed,
    "fsdp": fsdp,
    "fsdp_config": fsdp_config,
    "fsdp_version": ignored("it is FSDP2 here"),
    "fsdp_final_state_dict_type": ignored("checkpoints are sharded, and exported whole"),
    "qlora_sharded_model_loading": ignored("each worker reads its own part"),
    **{key: same(target, number) for key, target in PARALLEL.items()},
    **each(
        "heads_k_stride ring_attn_func", ignored("`parallel.cp_method` has defaults of its own")
    ),
    **each(
        "ddp ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters "
        "local_rank world_size device device_map max_memory gpu_memory_limit use_ray "
        "ray_run_name ray_num_workers resources_per_worker",
        ignored(OWN_LAUNCH),
    ),
    "eval_steps": steps_between("evaluation.every", "every other checkpoint"),
    **each("eval_strategy evaluation_strategy", strategy("evaluation.every")),
    "evals_per_epoch": unsupported(PER_EPOCH.format(default="every other checkpoint")),
    "save_steps": steps_between("checkpoint.every", "a tenth of the run"),
    "save_strategy": strategy("checkpoint.every"),
    "saves_per_epoch": unsupported(PER_EPOCH.format(default="a tenth of the run")),
    "save_total_limit": same("checkpoint.keep_last", number),
    "load_best_model_at_end": near(
        "checkpoint.keep_best", "the best by validation loss is kept; the export is the last", truth
    ),
    **each("metric_for_best_model greater_is_better", ignored("the best is by validation loss")),
    "save_only_model": ignored("checkpoints are whole, so that runs can be resumed"),
    "save_safetensors": ignored("weights are always safetensors"),
    "early_stopping_patience": unsupported(NO_EARLY_STOP),
    **each(
        "loss_watchdog_threshold loss_watchdog_patience",
        unsupported("a loss that is not finite ends the run; a high one does not"),
    ),
    **each("resume_from_checkpoint auto_resume_from_checkpoints", ignored(OWN_RESUMING)),
    "logging_steps": steps_between("tracking.log_every", "1"),
    "use_wandb": tracker("wandb"),
    "wandb_project": project("wandb"),
    **each("wandb_name wandb_run_id", run_name),
    **each(
        "wandb_entity wandb_mode wandb_watch wandb_log_model",
        unsupported("set the tracker's own environment variables, such as WANDB_ENTITY"),
    ),
    "use_tensorboard": tracker("tensorboard"),
    "use_trackio": tracker("trackio"),
    "trackio_project_name": project("trackio"),
    **each("include_tokens_per_second include_tkps", ignored("always reported")),
    **each("profiler_steps debug", ignored("of the other tool's own workings")),
    "hub_model_id": when_on(same("export.push")),
    **each("hub_strategy hub_revision", unsupported(HUB)),
    **each(
        "eval_table_size eval_max_new_tokens do_causal_lm_eval eval_causal_lm_metrics "
        "do_bench_eval bench_dataset bench_split generate_samples num_generation_samples",
        unsupported("`evaluation.samples.prompts` shows completions while training"),
    ),
    **each("merge_lora merge_method", ignored("`trainwright export --merge` does it afterwards")),
    **each(
        "processor_type image_size image_resize_algorithm freeze_mm_modules", unsupported(IMAGES)
    ),
    **each("dpo_use_weighting", unsupported("pairs weigh alike")),
    **each("trl vllm", unsupported(BY_REWARD)),
    **each("qat quantization", unsupported("weights are quantised under adapters only")),
    **each(
        "relora relora_steps relora_prune_ratio relora_prune_method relora_warmup_steps "
        "relora_cpu_offload jagged_restart_steps",
        unsupported("adapters are not merged while training"),
    ),
    **each(
        "lisa_n_layers lisa_step_interval lisa_layers_attribute",
        unsupported("`training.freeze` is for the whole run"),
    ),
    **each(
        "use_mlflow mlflow_tracking_uri mlflow_experiment_name mlflow_run_name "
        "hf_mlflow_log_artifacts use_comet comet_api_key comet_workspace comet_project_name "
        "comet_mode comet_online comet_experiment_key comet_experiment_config",
        unsupported("tracking knows tensorboard, wandb and trackio"),
    ),
    **each(
        "gradio_title gradio_share gradio_server_name gradio_server_port "
        "gradio_max_new_tokens gradio_temperature",
        ignored("`trainwright serve` shows the result"),
    ),
}

# Where our defaults are others than Axolotl's: our key, theirs, and its value.
DEFAULTS = {
    "data.packing": ("sample_packing", "none"),
    "data.validation": ("val_set_size", 0.0),
    "optimizer.weight_decay": ("weight_decay", 0.0),
    "schedule.name": ("lr_scheduler", "cosine"),
    "schedule.final": ("cosine_min_lr_ratio", 0.0),
}

"""What the examples in `foreign/` should become, by hand from the tools' documentation."""

from __future__ import annotations

from typing import Any

ADAMW = {"weight_decay": 0.0, "betas": [0.9, 0.999]}

# By hand: the whole recipe of one example of each sort.
WHOLE: dict[str, dict[str, Any]] = {
    "axolotl_lora.yaml": {
        "name": "first-try",
        "run_directory": "./outputs/lora",
        "model": {"path": "NousResearch/Llama-3.2-1B"},
        "tokenizer": {"chat_template": "alpaca"},
        "data": {
            "sources": [
                {
                    "path": "teknium/GPT4-LLM-Cleaned",
                    "format": "alpaca",
                    "split": "train",
                    "limit": 2000,
                }
            ],
            "validation": 0.1,
            "sequence_length": 2048,
            "packing": "best-fit",
        },
        "objective": {"kind": "sft", "train_on": "assistant"},
        "adapter": {
            "rank": 16,
            "alpha": 32,
            "dropout": 0.05,
            "targets": [
                *("gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj")
            ],
        },
        "training": {
            "epochs": 1,
            "batch_sequences": 4,
            "precision": "bf16",
            "recompute": "full",
        },
        "optimizer": {"name": "adamw-8bit", "learning_rate": 2e-4, **ADAMW},
        "schedule": {"name": "cosine", "warmup": 10, "final": 0.0},
        "tracking": {"to": ["wandb"], "project": "llama-lora", "log_every": 1},
    },
    "axolotl_dpo.yaml": {
        "run_directory": "./outputs/dpo",
        "model": {"path": "meta-llama/Meta-Llama-3-8B-Instruct"},
        "tokenizer": {"chat_template": "llama3"},
        "data": {
            "sources": [
                {
                    "path": "fozziethebeat/alpaca_messages_2k_dpo_test",
                    "format": "preference",
                    "columns": {"prompt": "conversation", "chosen": "better", "rejected": "worse"},
                },
                {"path": "Intel/orca_dpo_pairs", "format": "preference", "split": "train"},
            ],
            "validation": 0.05,
            "sequence_length": 8192,
            "packing": "none",
        },
        "objective": {"kind": "dpo", "beta": 0.2},
        "adapter": {
            "rank": 32,
            "alpha": 16,
            "dropout": 0.05,
            "targets": "all-linear",
            "quantise": "int8",
        },
        "training": {
            "steps": 300,
            "batch_sequences": 8,
            "precision": "bf16",
            "recompute": "full",
        },
        "optimizer": {"name": "paged-adamw-8bit", "learning_rate": 5e-6, **ADAMW},
        "schedule": {"name": "linear", "warmup": 10, "final": 0.0},
        "parallel": {"zero": 2},
        "tracking": {"log_every": 5},
    },
    "llama_factory_kto_qlora.yaml": {
        "run_directory": "saves/kto",
        "model": {"path": "meta-llama/Meta-Llama-3-8B-Instruct"},
        "data": {
            "sources": [{"path": "kto_en_demo.json", "format": "kto"}],
            "validation": 0.0,
            "sequence_length": 2048,
            "packing": "none",
        },
        "objective": {
            "kind": "kto",
            "beta": 0.1,
            "desirable_weight": 1,
            "undesirable_weight": 2,
        },
        "adapter": {
            "rank": 8,
            "alpha": 16,
            "targets": "all-linear",
            "rslora": True,
            "quantise": "nf4",
        },
        "training": {
            "epochs": 1,
            "batch_sequences": 8,
            "precision": "fp16",
            "recompute": "full",
        },
        "optimizer": {"name": "adamw", "learning_rate": 5e-6, **ADAMW},
        "schedule": {"name": "cosine", "warmup": 0, "final": 0.0},
    },
    "torchtune_dpo.yaml": {
        "run_directory": "out/dpo",
        "model": {"path": "models/llama"},
        "data": {
            "sources": [
                {
                    "path": "lvwerra/stack-exchange-paired",
                    "format": "preference",
                    "columns": {
                        "prompt": "question",
                        "chosen": "response_j",
                        "rejected": "response_k",
                    },
                    "split": "train",
                },
                {
                    "path": "data/pairs.json",
                    "format": "preference",
                    "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"},
                },
            ],
            "validation": 0.0,
            "sequence_length": 4096,
            "packing": "none",
        },
        "objective": {"kind": "dpo", "loss": "sigmoid", "beta": 0.1, "label_smoothing": 0},
        "adapter": {
            "rank": 16,
            "alpha": 32,
            "targets": ["q_proj", "k_proj", "v_proj", "lm_head"],
            "quantise": "nf4",
        },
        "training": {
            "steps": 200,
            "batch_sequences": 32,
            "precision": "fp32",
            "gradient_clip": None,
        },
        "optimizer": {
            "name": "paged-adamw-8bit",
            "learning_rate": 5e-4,
            "weight_decay": 0.05,
            "betas": [0.9, 0.999],
        },
        "schedule": {"name": "constant", "warmup": 0, "final": 0.0},
        "parallel": {"tp": 2},
    },
    "trl_dpo.yaml": {
        "run_directory": "Qwen2-0.5B-DPO",
        "model": {"path": "Qwen/Qwen2.5-0.5B-Instruct"},
        "data": {
            "sources": [{"path": "trl-lib/ultrafeedback_binarized"}],
            "validation": [{"path": "trl-lib/ultrafeedback_binarized", "split": "test"}],
            "sequence_length": 1024,
            "packing": "none",
        },
        "objective": {"kind": "dpo", "beta": 0.05, "loss": {"sigmoid": 1, "sft": 0.2}},
        "training": {
            "epochs": 1,
            "batch_sequences": 16,
            "precision": "bf16",
            "recompute": "full",
        },
        "optimizer": {"learning_rate": 5e-7, **ADAMW},
        "schedule": {"name": "linear", "warmup": 0, "final": 0.0},
        "evaluation": {"every": 50},
        "tracking": {"log_every": 25},
    },
    "trl_reward.json": {
        "run_directory": "out/reward",
        "model": {"path": "Qwen/Qwen2-0.5B-Instruct"},
        "data": {
            "sources": [{"path": "trl-lib/ultrafeedback_binarized"}],
            "validation": 0.0,
            "sequence_length": 4096,
            "packing": "none",
        },
        "objective": {"kind": "reward", "center": 0.01},
        "training": {
            "epochs": 3.0,
            "batch_sequences": 8,
            "precision": "bf16",
            "recompute": "full",
        },
        "optimizer": {"learning_rate": 1e-5, **ADAMW},
        "schedule": {"name": "linear", "warmup": 0, "final": 0.0},
        "tracking": {"to": ["tensorboard", "wandb"]},
    },
}

# By hand: single values of the others, and the keys that cannot be carried over.
PARTS: list[tuple[str, str, Any]] = [
    ("axolotl_chat_full.yaml", "data.sources.0.format", "sharegpt"),
    ("axolotl_chat_full.yaml", "data.sources.1.format", "messages"),
    ("axolotl_chat_full.yaml", "data.too_long", "drop"),
    ("axolotl_chat_full.yaml", "data.validation.0.path", "data/support_test.jsonl"),
    ("axolotl_chat_full.yaml", "parallel", {"zero": 2, "cp": 2}),
    ("axolotl_chat_full.yaml", "training.activation_offload", True),
    ("axolotl_chat_full.yaml", "checkpoint", {"every": 100, "keep_last": 3}),
    ("axolotl_kto.yaml", "objective.desirable_weight", 0.2),
    (
        "torchtune_distill.yaml",
        "objective",
        {
            "kind": "distill",
            "beta": 0.0,
            "mix": 0.5,
            "teacher": "models/large",
            "train_on": "assistant",
        },
    ),
    ("axolotl_kto.yaml", "data.sequence_length", 4096),
    ("axolotl_kto.yaml", "schedule", {"name": "constant", "warmup": 20, "final": 0.0}),
    ("axolotl_pretrain.yaml", "objective", {"kind": "next_token"}),
    ("axolotl_pretrain.yaml", "data.sources", [{"path": "texts/handbook.jsonl", "field": "body"}]),
    ("axolotl_pretrain.yaml", "training.precision", "fp16"),
    ("axolotl_pretrain.yaml", "training.gradient_clip", 0.5),
    ("axolotl_qlora_fsdp.yaml", "adapter.plus_ratio", 16),
    ("axolotl_qlora_fsdp.yaml", "adapter.quantise", "nf4"),
    ("axolotl_qlora_fsdp.yaml", "export.push", "somebody/llama-70b-qlora"),
    ("axolotl_qlora_fsdp.yaml", "data.packing", "none"),  # YAML 1.1's `no`
    ("axolotl_qlora_fsdp.yaml", "optimizer.betas", [0.9, 0.95]),
    ("axolotl_qlora_fsdp.yaml", "parallel", {"zero": 3, "offload": "parameters"}),
    ("axolotl_qlora_fsdp.yaml", "schedule.final", 0.1),
    ("axolotl_qlora_fsdp.yaml", "schedule.warmup", 0.05),
    (
        "axolotl_qlora_fsdp.yaml",
        "data.sources.1.columns",
        {"instruction": "question", "output": "reply"},
    ),
    ("llama_factory_dpo.yaml", "objective.loss", {"sigmoid": 1.0, "sft": 0.2}),
    ("llama_factory_dpo.yaml", "adapter.targets", ["q_proj", "v_proj"]),
    ("llama_factory_dpo.yaml", "adapter.train_also", ["embed_tokens", "lm_head"]),
    (
        "llama_factory_dpo.yaml",
        "data.sources",
        [{"path": "dpo_en_demo.json", "format": "preference"}],
    ),
    ("llama_factory_full_zero3.yaml", "parallel", {"zero": 3, "offload": "optimizer"}),
    ("llama_factory_full_zero3.yaml", "adapter", None),
    ("llama_factory_full_zero3.yaml", "objective.train_on", "completion"),
    ("llama_factory_full_zero3.yaml", "schedule.final", 0.1),
    ("llama_factory_full_zero3.yaml", "data.sources.0.weight", 0.7),
    ("llama_factory_full_zero3.yaml", "data.sources.1.format", "messages"),
    ("llama_factory_full_zero3.yaml", "data.sources.1.split", "train_sft"),
    ("llama_factory_full_zero3.yaml", "data.validation.0.path", "alpaca_en_demo.json"),
    ("llama_factory_pretrain.yaml", "adapter.init", "pissa"),
    ("llama_factory_pretrain.yaml", "data.packing", "concat"),
    ("llama_factory_pretrain.yaml", "data.sources", [{"path": "c4_demo.jsonl"}]),
    (
        "llama_factory_sft.yaml",
        "data.sources.0",
        {"path": "identity.json", "format": "alpaca", "limit": 1000},
    ),
    ("llama_factory_sft.yaml", "data.sources.1.format", "sharegpt"),
    ("llama_factory_reward.yaml", "objective", {"kind": "reward"}),
    (
        "llama_factory_reward.yaml",
        "adapter",
        {"rank": 16, "alpha": 32, "targets": "all-linear", "dora": True},
    ),
    (
        "llama_factory_reward.yaml",
        "data.sources",
        [{"path": "dpo_en_demo.json", "format": "preference"}],
    ),
    ("llama_factory_reward.yaml", "data.sequence_length", 4096),  # two of `cutoff_len`'s 2,048
    ("llama_factory_sft.yaml", "evaluation.every", 500),
    (
        "torchtune_lora.yaml",
        "adapter.targets",
        ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    ("torchtune_lora.yaml", "objective.train_on", "all"),
    ("torchtune_lora.yaml", "data.sources", [{"path": "yahma/alpaca-cleaned", "format": "alpaca"}]),
    ("torchtune_lora.yaml", "training.batch_sequences", 64),
    ("torchtune_lora.yaml", "schedule", {"name": "cosine", "warmup": 100, "final": 0.0}),
]

# By hand: the keys that cannot be carried over.
LOST = {
    "axolotl_chat_full.yaml": {"datasets.1.roles", "special_tokens"},
    "axolotl_dpo.yaml": {"dpo_use_weighting"},
    "axolotl_kto.yaml": {"eval_max_new_tokens"},
    "axolotl_lora.yaml": {
        *("wandb_entity", "early_stopping_patience", "loss_watchdog_threshold"),
        *("loss_watchdog_patience", "evals_per_epoch", "saves_per_epoch", "special_tokens"),
    },
    "axolotl_pretrain.yaml": {"unfrozen_parameters"},
    "axolotl_qlora_fsdp.yaml": {
        *("loraplus_lr_embedding", "datasets.1.type.format", "fsdp_config.fsdp_moon_phase")
    },
    "llama_factory_dpo.yaml": set(),
    "llama_factory_full_zero3.yaml": {"save_strategy"},
    "llama_factory_kto_qlora.yaml": {"template"},
    "llama_factory_pretrain.yaml": {"pissa_convert", "wandb_watch_everything"},
    "llama_factory_reward.yaml": set(),
    "llama_factory_sft.yaml": set(),
    "torchtune_distill.yaml": set(),
    "torchtune_dpo.yaml": {"dataset.1.new_system_prompt"},
    "torchtune_lora.yaml": set(),
    "trl_dpo.yaml": {"no_remove_unused_columns"},
    "trl_reward.json": set(),
}

"""Fine-tuning speed and memory beside TRL: SFT, LoRA and QLoRA on the same conversations.

Both sides read one base directory (random weights, a tokenizer of 16,384 tokens made from Python's
standard library, a ChatML template) and one JSON-lines file of conversations: questions and answers
about the standard library, or `--data`. Tokens are those of the conversations; padding is not
counted. Each side runs in a process of its own, in turns; the first steps are not counted.

    python benchmarks/finetune.py [--steps 10] [--rounds 2] [--only sft lora qlora] [--data FILE]
    python benchmarks/finetune.py --shape 1b --sequence 2048 --only sft        # a GPU
    python benchmarks/finetune.py --shape 8b --sequence 2048 --rows 2 --only lora qlora

"as it comes" is TRL with its defaults but for logs and saving, which recompute activations; "at its
best" is with its packing (`bfd`) and without recomputing. Not packed, TRL pads a batch to its
longest example, trainwright every row to the whole length.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
ADAPTERS = {"sft": None, "lora": {"rank": 16}, "qlora": {"rank": 16, "quantise": "nf4"}}
SIDES = {
    "TRL as it comes": ("trl", {}),
    "TRL at its best": ("trl", {"packing": True, "gradient_checkpointing": False}),
    "trainwright, not packed": ("trainwright", {"packing": "none"}),
    "trainwright, recomputed": ("trainwright", {"recompute": "full"}),
    "trainwright, 2 rows a time": ("trainwright", {"micro_batch": 2}),
    "trainwright": ("trainwright", {}),
}
UNCOUNTED = 3


def prepare(folder: Path, shape: str, data: Path | None) -> None:
    """Write the base model and the conversations that both sides read."""
    import torch

    from trainwright.data.stdlib_docs import stdlib_rows
    from trainwright.data.templates_named import NAMED_TEMPLATES
    from trainwright.data.tokenizers import save_tokenizer, train_tokenizer
    from trainwright.models.families import decoder_config, new_hf_config
    from trainwright.models.weights import initialise, new_model, save_model
    from trainwright.recipe.presets import PRESETS
    from trainwright.recipe.schema import TrainTokenizer

    if data is None:
        conversations = [row["messages"] for _, row in stdlib_rows("messages")]
    else:
        rows = json.loads(data.read_text())
        conversations = [
            [
                {"role": "user", "content": f"{row['instruction']}\n{row['input']}".strip()},
                {"role": "assistant", "content": row["output"]},
            ]
            for row in rows
        ]
    with (folder / "conversations.jsonl").open("w") as file:
        for messages in conversations:
            # TRL wants prompt and completion apart, to train on the answer alone.
            row = {"prompt": messages[:-1], "completion": messages[-1:]}
            file.write(json.dumps(row) + "\n")
    base = folder / "base"
    texts = [m["content"] for messages in conversations for m in messages]
    tokenizer = train_tokenizer(texts, TrainTokenizer(vocab_size=16_384))
    tokenizer.chat_template = NAMED_TEMPLATES["chatml"]
    save_tokenizer(tokenizer, base)
    values = SMALL if shape == "small" else PRESETS["llama"][shape]
    config = decoder_config(new_hf_config("llama", values, values.get("vocab_size", 16_384)))
    dtype = torch.float32 if shape == "small" else torch.bfloat16
    model = new_model(config).to(dtype)
    initialise(model, 1)
    save_model(model, base)


def run_trainwright(
    options: argparse.Namespace,
    packing: str = "best-fit",
    recompute: str = "none",
    micro_batch: int | None = None,
) -> dict[str, Any]:
    """Train through the launcher; figures from the run's own records."""
    from itertools import pairwise

    import numpy as np

    import trainwright
    from trainwright.data.opening import open_data
    from trainwright.training.metrics import read_metrics

    run = options.folder / "run"
    recipe = {
        "name": "bench",
        "run_directory": str(run),
        "model": {"path": str(options.base / "base")},
        "objective": {"kind": "sft", "train_on": "completion"},
        "data": {
            "sources": [str(options.base / "conversations.jsonl")],
            "sequence_length": options.sequence,
            "packing": packing,
        },
        "training": {
            "steps": options.steps + UNCOUNTED,
            "batch_sequences": options.rows,
            "recompute": recompute,
        },
        "optimizer": {"learning_rate": 2e-5, "weight_decay": 0.0},
        "checkpoint": {"every": 10**6},
        "evaluation": {"every": 10**6, "rows": 1},
        "parallel": {"workers": 1, "micro_batch": micro_batch or options.rows},
        "export": {"at_end": False},
    }
    if ADAPTERS[options.method] is not None:
        recipe["adapter"] = ADAPTERS[options.method]
    file = options.folder / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    trainwright.train(file)
    records = [r for r in read_metrics(run) if r["kind"] == "step"]
    data = open_data(run).train
    tokens = []
    for step in range(len(records)):
        batch = data.batch(step)
        real = batch.segment_ids >= 0 if batch.segment_ids is not None else batch.input_ids >= 0
        tokens.append(int(np.count_nonzero(real)))
    seconds = [b["time"] - a["time"] for a, b in pairwise(records)]
    return {
        "tokens_per_second": sum(tokens[UNCOUNTED:]) / sum(seconds[UNCOUNTED - 1 :]),
        "tokens": sum(tokens[UNCOUNTED:]) / options.steps,
        "memory": max(r["memory_bytes"] for r in records),
        "losses": [records[0]["loss"], records[-1]["loss"]],
    }


def run_trl(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """The same conversations through TRL's SFTTrainer."""
    import resource

    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        TrainerCallback,
    )
    from trl import SFTConfig, SFTTrainer

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(time.time())

    cuda = torch.cuda.is_available()
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        str(options.base / "base"),
        dtype=torch.bfloat16 if cuda else torch.float32,
        quantization_config=quantised if options.method == "qlora" else None,
        device_map={"": "cuda" if cuda else "cpu"},
    )
    adapter = None
    if options.method != "sft":
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    arguments = SFTConfig(
        output_dir=str(options.folder / "trl"),
        per_device_train_batch_size=options.rows,
        max_steps=options.steps + UNCOUNTED,
        max_length=options.sequence,
        use_cpu=not cuda,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=load_dataset(
            "json", data_files=str(options.base / "conversations.jsonl"), split="train"
        ),
        processing_class=AutoTokenizer.from_pretrained(str(options.base / "base")),
        peft_config=adapter,
        callbacks=[Clock()],
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "num_tokens" in entry]
    tokens = steps[-1]["num_tokens"] - steps[UNCOUNTED - 1]["num_tokens"]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens_per_second": tokens / (times[-1] - times[UNCOUNTED - 1]),
        "tokens": tokens / options.steps,
        "memory": torch.cuda.max_memory_allocated() if cuda else memory,
        "losses": [steps[0]["loss"], steps[-1]["loss"]],
    }


def run_side(options: argparse.Namespace, base: Path, method: str, side: str) -> dict[str, Any]:
    """One side in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "side": side,
            "method": method,
            "base": base,
            "folder": folder,
            "steps": options.steps,
            "rows": options.rows,
            "sequence": options.sequence,
        }
        command = [sys.executable, __file__]
        for key, value in given.items():
            command += [f"--{key}", str(value)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        result = Path(folder) / "result.json"
        if done.returncode or not result.exists():
            sys.exit(f"{side}: {done.stderr[-3000:]}")
        return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--shape", choices=("small", "1b", "8b"), default="small")
    parser.add_argument("--only", nargs="+", choices=tuple(ADAPTERS), default=tuple(ADAPTERS))
    parser.add_argument("--data", type=Path, help="JSON of instruction, input, output")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--method", choices=tuple(ADAPTERS), help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        whose, settings = SIDES[options.side]
        if whose == "trl":
            result = run_trl(options, settings)
        else:
            result = run_trainwright(options, **settings)
        (options.folder / "result.json").write_text(json.dumps(result))
        return
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        prepare(base, options.shape, options.data)
        for method in options.only:
            results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
            for _ in range(options.rounds):
                for side, taken in results.items():
                    taken.append(run_side(options, base, method, side))
            print_table(method, results)


def print_table(method: str, results: dict[str, list[dict[str, Any]]]) -> None:
    """The best round of each side: other work on the machine only ever makes one slower."""
    print(f"\n{method:26}{'tokens/s':>10}{'ratio':>8}{'tokens/step':>13}{'peak MB':>9}{'loss':>16}")
    speeds = {side: max(r["tokens_per_second"] for r in runs) for side, runs in results.items()}
    first = next(iter(speeds.values()))
    for side, runs in results.items():
        memory = max(r["memory"] for r in runs) / 1e6
        losses = " → ".join(f"{loss:.2f}" for loss in runs[0]["losses"])
        print(
            f"{side:26}{speeds[side]:10,.0f}{speeds[side] / first:8.2f}{runs[0]['tokens']:13,.0f}"
            f"{memory:9,.0f}{losses:>16}",
            flush=True,
        )


if __name__ == "__main__":
    main()

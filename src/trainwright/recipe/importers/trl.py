"""TRL's command line (`trl sft --model_name_or_path …`) and its YAML files.

Arguments and their defaults are those of TRL's configurations (trl/trainer/*_config.py).
"""

from __future__ import annotations

from typing import Any

from trainwright.recipe.importers.hf_arguments import training_arguments
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
    batch,
    quantised,
    row_length,
)
from trainwright.recipe.importers.trl_keys import DEFAULTS, KINDS, ON_POLICY, TABLE

# The command: our kind, and TRL's default learning rate.
VERBS: dict[str, tuple[str, float]] = {
    "sft": ("sft", 2e-5),
    "dpo": ("dpo", 1e-6),
    "kto": ("kto", 1e-6),
    "orpo": ("orpo", 1e-6),
    "cpo": ("cpo", 1e-6),
    "reward": ("reward", 1e-4),
    "gkd": ("distill", 2e-5),
}
LOSSES = {
    "exo_pair": "exo",
    "nca_pair": "nca",
    "bco_pair": "bco",
    "sppo_hard": "sppo",
    "aot_pair": "aot_unpaired",
}


def translate(job: Job) -> None:
    """Take up every argument. `command` (sft, dpo, …) stands among the keys of a command line."""
    verb = str(job.get("command") or _guess(job))
    if verb not in VERBS:
        fix = f"of TRL's commands, {', '.join(VERBS)} can be imported"
        raise job.refusal("command", f"`trl {verb}`: {ON_POLICY}", fix)
    kind, rate = VERBS[verb]
    if kind == "cpo" and job.get("loss_type") in ("simpo", ["simpo"]):
        kind = "simpo"
        job.note("translated", "loss_type", "objective.kind")
    job.put("objective.kind", kind)
    if job.has("command"):
        job.note("translated", "command", "objective.kind")
    _objective(job, kind)
    _adapter(job)
    _data(job)
    workers = int(job.number("num_processes", 1) or 1)
    batch(job, "per_device_train_batch_size", "gradient_accumulation_steps", 8, workers)
    training_arguments(job, 3.0, "bf16")
    job.run(TABLE)
    job.assumed("learning_rate", "optimizer.learning_rate", rate)
    for target, (key, value) in DEFAULTS.items():
        job.assumed(key, target, value)


def _guess(job: Job) -> str:
    """The command that a YAML file without one belongs to."""
    if job.has("teacher_model_name_or_path"):
        return "gkd"
    if job.has("desirable_weight") or job.has("undesirable_weight"):
        return "kto"
    if job.has("center_rewards_coefficient"):
        return "reward"
    if job.has("cpo_alpha"):
        return "cpo"
    if job.has("num_generations") or job.has("reward_funcs"):
        return "grpo"
    return "dpo" if job.has("beta") or job.has("precompute_ref_log_probs") else "sft"


def _objective(job: Job, kind: str) -> None:
    job.run(KINDS.get(kind, {}))
    if kind == "dpo":
        _losses(job)
    elif kind in ("cpo", "simpo"):
        job.assumed("cpo_alpha", "objective.sft_weight", 1.0)
    if kind in ("dpo", "kto", "orpo", "cpo", "simpo"):
        job.assumed("beta", "objective.beta", 0.1)
    if kind == "distill":
        job.assumed("temperature", "objective.temperature", 0.9)
        if not job.has("teacher_model_name_or_path"):
            what = "distillation has no teacher"
            raise job.refusal("command", what, "give --teacher_model_name_or_path")
    if kind in ("sft", "distill"):
        _trained(job, kind)


def _losses(job: Job) -> None:
    found = job.names("loss_type") or ["sigmoid"]
    ours = [LOSSES.get(name, name) for name in found]
    weights = _weights(job)
    terms = dict.fromkeys(ours, 1.0)
    if len(weights) == len(ours):
        terms = dict(zip(ours, weights, strict=True))
    smoothing = job.number("label_smoothing", 0) or 0
    if smoothing:
        reason = "cdpo smooths, as TRL before 1.0 did; TRL 1.x smooths nothing under `sigmoid`"
        if "sigmoid" in terms:
            terms = {"cdpo" if each == "sigmoid" else each: w for each, w in terms.items()}
            job.approximated("label_smoothing", "objective.label_smoothing", smoothing, reason)
        else:
            job.translated("label_smoothing", "objective.label_smoothing", smoothing)
    if job.has("rpo_alpha"):
        terms["sft"] = job.number("rpo_alpha", 1.0) or 1.0
        job.note("translated", "rpo_alpha", "objective.loss")
    alone = len(terms) == 1 and next(iter(terms.values())) == 1
    job.put("objective.loss", next(iter(terms)) if alone else terms)
    for key in ("loss_type", "loss_weights"):
        if job.has(key):
            job.note("translated", key, "objective.loss")


def _weights(job: Job) -> list[float]:
    value = job.get("loss_weights")
    try:
        return [number(each) for each in (value if isinstance(value, list) else [value])]
    except ValueError as error:
        if job.has("loss_weights"):
            raise job.refusal("loss_weights", str(error), "write numbers") from None
        return []


def _trained(job: Job, kind: str) -> None:
    asked = {"assistant_only_loss": "assistant", "completion_only_loss": "completion"}
    for key, ours in asked.items():
        if job.has(key) and not is_off(job.get(key)):
            job.translated(key, "objective.train_on", ours)
    if kind == "distill" and job.given("objective.train_on") is None:
        job.put("objective.train_on", "completion")  # what TRL's collator for it does
    if job.given("objective.train_on") is None and job.has("completion_only_loss"):
        job.translated("completion_only_loss", "objective.train_on", "all")
    if job.given("objective.train_on") is None:
        reason = "TRL trains every token of conversations unless told; write `all` for the same"
        key = "assistant_only_loss"
        if job.has(key):
            job.approximated(key, "objective.train_on", "assistant", reason)
        else:
            job.put("objective.train_on", "assistant")
            job.note("approximated", key, "objective.train_on", f"not given; {reason}")
    for key in asked:
        if job.has(key) and not job.is_noted(key):
            job.ignored(key, "switched off")
    if job.get("loss_type") in ("dft", ["dft"]):
        job.unsupported("loss_type", "each token's loss is its own cross entropy")
    elif job.has("loss_type"):
        job.ignored("loss_type", "cross entropy, taken in pieces by itself")


def _adapter(job: Job) -> None:
    on = job.has("use_peft") and not is_off(job.get("use_peft"))
    if not on:
        if job.has("use_peft"):
            job.ignored("use_peft", "switched off")
        for key in (*_ADAPTER, "load_in_4bit", "load_in_8bit"):
            if job.has(key) and not job.is_noted(key):
                job.ignored(key, "there is no adapter without `use_peft`")
        return
    job.put("adapter", {})
    job.note("translated", "use_peft", "adapter")
    quantised(job, "load_in_4bit", "load_in_8bit")
    job.run(_ADAPTER)
    # TRL's ModelConfig; the layers are PEFT's own choice for the llama family.
    job.assumed("lora_r", "adapter.rank", 16)
    job.assumed("lora_alpha", "adapter.alpha", 32)
    job.assumed("lora_dropout", "adapter.dropout", 0.05)
    job.assumed("lora_target_modules", "adapter.targets", ["q_proj", "v_proj"])


def _targets(job: Job, key: str, value: Any) -> None:
    chosen = names(value)
    every = chosen == ["all-linear"]
    job.translated(key, "adapter.targets", "all-linear" if every else chosen)


_ADAPTER: dict[str, Rule] = {
    "lora_r": same("adapter.rank", number),
    "lora_alpha": same("adapter.alpha", number),
    "lora_dropout": same("adapter.dropout", number),
    "lora_target_modules": _targets,
    "lora_modules_to_save": same("adapter.train_also", names),
    "use_rslora": same("adapter.rslora", truth),
    "use_dora": same("adapter.dora", truth),
    "lora_target_parameters": unsupported("adapters sit on layers, not on single parameters"),
    "lora_task_type": ignored("the objective says it"),
    **each(
        "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage",
        ignored("4 bits are nf4, doubly quantised"),
    ),
}


def _data(job: Job) -> None:
    source: dict[str, Any] = {}
    for key, ours in _SOURCE.items():
        if job.has(key):
            source[ours] = str(job.get(key))
            job.note("translated", key, f"data.sources.0.{ours}")
    if job.has("dataset_text_field"):
        field = str(job.get("dataset_text_field"))
        if field != "text":
            source["columns"] = {"text": field}
        job.note("translated", "dataset_text_field", "data.sources.0.columns")
    if source.get("path"):
        job.put("data.sources", [source])
        _held_out(job, source)
    if job.has("datasets"):
        _mixture(job)
    key = next((k for k in ("max_length", "max_seq_length") if job.has(k)), "")
    row_length(job, key or "max_length", 1024)
    _packing(job)


_SOURCE = {"dataset_name": "path", "dataset_config": "subset", "dataset_train_split": "split"}


def _held_out(job: Job, source: dict[str, Any]) -> None:
    """TRL measures its test split only where `eval_strategy` is not `no`."""
    measured = job.get("eval_strategy") or job.get("evaluation_strategy") or "no"
    if measured in ("no", False):
        if job.has("dataset_test_split"):
            job.ignored("dataset_test_split", "without `eval_strategy` nothing is measured")
        return
    split = str(job.get("dataset_test_split") or "test")
    job.put("data.validation", [{**source, "split": split}])
    if job.has("dataset_test_split"):
        job.note("translated", "dataset_test_split", "data.validation.0.split")


def _mixture(job: Job) -> None:
    """YAML's `datasets`: a list of what `load_dataset` takes."""
    known = {"path": "path", "name": "subset", "split": "split", "data_files": "path"}
    sources = []
    entries = job.get("datasets")
    for index, entry in enumerate(entries if isinstance(entries, list) else ()):
        source: dict[str, Any] = {}
        for name, value in entry.items() if isinstance(entry, dict) else ():
            key = f"datasets.{index}.{name}"
            if name in known and isinstance(value, str) and value:
                source[known[name]] = value
                job.note("translated", key, f"data.sources.{index}.{known[name]}")
        if source:
            sources.append(source)
    if sources:
        job.put("data.sources", sources)


def _packing(job: Job) -> None:
    wrapped = job.get("packing_strategy") == "wrapped"
    on = job.has("packing") and not is_off(job.get("packing"))
    job.put("data.packing", ("concat" if wrapped else "best-fit") if on else "none")
    for key in ("packing", "packing_strategy"):
        if job.has(key):
            job.note("translated", key, "data.packing")

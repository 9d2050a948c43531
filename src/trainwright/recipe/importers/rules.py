"""Rules that several tools share: batch, length, precision, optimizer, schedule, trackers.

All but torchtune stand on transformers' TrainingArguments, so most values mean the same in each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trainwright.recipe.importers.job import (
    Job,
    Rule,
    display_name,
    is_off,
    names,
    number,
    section,
    truth,
)
from trainwright.recipe.objective import PAIRED

# Reasons that several keys share.
OWN_KERNELS = "the fastest kernel of the machine is chosen by itself"
OWN_LOADING = "how data is loaded is not a matter of the recipe"
OWN_PADDING = "padding is never trained on, and rows are filled as `data.packing` says"
OWN_RESUMING = "a run that is there already is resumed by itself"
OWN_CACHE = "tokens are cached by themselves, and anew when anything they depend on changes"
OWN_LAUNCH = "workers are started and joined by themselves"
HUB = "`export.push` sends the finished export to the hub, and nothing else"
PER_EPOCH = "the recipe counts steps; the default is {default}"
NO_EARLY_STOP = "training runs to its end; `checkpoint.keep_best` keeps the best model on the way"
IMAGES = "models here read text only"
WEIGHTS_FP32 = "weights and optimizer state stay fp32; the arithmetic is 16 bits wide"

# Their optimizers: ours, and what differs ("" if nothing does).
_PLAIN = "adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused adamw optimi_adamw AdamW"
_EIGHT = "adamw_8bit adamw_bnb_8bit adamw_torch_8bit ao_adamw_8bit AdamW8bit AdamW8Bit"
OPTIMIZERS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(_PLAIN.split(), ("adamw", "")),
    **dict.fromkeys(_EIGHT.split(), ("adamw-8bit", "")),
    **dict.fromkeys(("paged_adamw_8bit", "PagedAdamW8bit"), ("paged-adamw-8bit", "")),
    **dict.fromkeys(
        ("paged_adamw_32bit", "paged_adamw", "PagedAdamW", "PagedAdamW32bit"), ("paged-adamw", "")
    ),
    **dict.fromkeys(("muon", "Muon"), ("muon", "")),
}

# Their schedules: ours, and what differs.
SCHEDULES: dict[str, tuple[str, str]] = {
    "cosine": ("cosine", ""),
    "linear": ("linear", ""),
    "constant": ("constant", ""),
    "constant_with_warmup": ("constant", ""),
    "cosine_with_min_lr": ("cosine", ""),
    "warmup_stable_decay": ("wsd", "the stretch of decay is `schedule.decay`, by default a fifth"),
    "polynomial": ("linear", "there is no power: this is the polynomial of degree 1"),
    "cosine_with_restarts": ("cosine", "there are no restarts: this is one cycle"),
    "one_cycle": ("cosine", "one cycle of cosine, its warm-up as given"),
    "rex": ("linear", "there is no reflected exponential; it lies near to a straight line"),
    "inverse_sqrt": ("cosine", "there is no inverse square root; the rate falls to 0 instead"),
}


def batch(job: Job, micro: str, accumulation: str, rows: int, devices: int = 1) -> None:
    """The global batch from rows a device (`micro`) and accumulated micro-batches.

    `rows` is the tool's default for `micro`. How many devices there were is known only where a
    command line says so; else the batch is that of one device.
    """
    per_device = int(job.number(micro, rows) or rows)
    micro_batches = int(job.number(accumulation, 1) or 1)
    total = per_device * micro_batches * devices
    product = f"{_count(per_device, 'row')} × {_count(micro_batches, 'micro-batch', 'es')}"
    if devices > 1:
        product += f" × {devices} devices"
        hint = ""
    else:
        name = display_name(job.tool)
        hint = f"; on N devices {name}'s batch is N times as large, so multiply it"
    reason = f"{product}; how they are dealt out is the plan's matter{hint}"
    if not job.has(micro) and not job.has(accumulation):
        job.assumed(micro, "training.batch_sequences", total)
    for key in (micro, accumulation):
        if job.has(key):
            job.approximated(key, "training.batch_sequences", total, reason)


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what if number == 1 else what + plural}"


def length(job: Job, epochs: str, steps: str, default_epochs: float) -> None:
    """How long: `steps` where it is above 0, else `epochs`."""
    most = job.number(steps, -1) or -1
    if most > 0:
        job.translated(steps, "training.steps", int(most))
        if job.has(epochs):
            job.ignored(epochs, f"`{steps}` says how long to train")
        return
    if job.has(steps):
        job.ignored(steps, "switched off")
    passes = job.number(epochs)
    if passes is not None:
        job.translated(epochs, "training.epochs", passes)
    else:
        job.assumed(epochs, "training.epochs", default_epochs)


def row_length(job: Job, key: str, default: int) -> None:
    """The length of a row from the most tokens of a sequence, which is what other tools give.

    Where an example is two sequences (a pair of answers; KTO's answer and a mismatched one), a row
    holds both.
    """
    two = job.given("objective.kind") in (*PAIRED, "kto")
    if not job.has(key):
        job.assumed(key, "data.sequence_length", default * (2 if two else 1))
        return
    tokens = int(job.number(key, default) or default)
    if two:
        reason = f"a row holds an example's two sequences, each of at most {tokens}"
        job.approximated(key, "data.sequence_length", 2 * tokens, reason)
    else:
        job.translated(key, "data.sequence_length", tokens)


def precision(job: Job, keys: Mapping[str, str], otherwise: str) -> None:
    """The first key of `keys` that is on names the precision; `otherwise` is without any.

    `keys` maps a key to our precision. `auto` counts as on.
    """
    chosen = next((k for k in keys if job.has(k) and not is_off(job.get(k))), "")
    for key, ours in keys.items():
        if not job.has(key):
            continue
        if key == chosen:
            whole = key in ("bfloat16", "float16", "pure_bf16")
            if whole:
                job.approximated(key, "training.precision", ours, WEIGHTS_FP32)
            else:
                job.translated(key, "training.precision", ours)
        elif is_off(job.get(key)):
            job.ignored(key, "switched off")
        else:
            job.ignored(key, f"`{chosen}` says the precision")
    if not chosen:
        off = next((key for key in keys if job.has(key)), "")
        if off:
            job.put("training.precision", "fp32")
        else:
            job.assumed(next(iter(keys)), "training.precision", otherwise)


def optimizer(job: Job, key: str, value: Any) -> None:
    """The optimizer's name; those we lack become AdamW."""
    text = str(value).removeprefix("OptimizerNames.").split(".")[-1]
    if text in OPTIMIZERS:
        ours, differs = OPTIMIZERS[text]
        if differs:
            job.approximated(key, "optimizer.name", ours, differs)
        else:
            job.translated(key, "optimizer.name", ours)
        return
    eight = re.search(r"8-?bit", text, re.IGNORECASE)
    job.approximated(
        key,
        "optimizer.name",
        "adamw-8bit" if eight else "adamw",
        f"there is no {text} here; AdamW wants a learning rate of its own",
    )


def betas(job: Job, first_key: str, second_key: str) -> None:
    """Adam's two decay rates, 0.9 and 0.999 where they are left out."""
    if not job.has(first_key) and not job.has(second_key):
        job.assumed(first_key, "optimizer.betas", [0.9, 0.999])
        return
    rates = [job.number(first_key, 0.9), job.number(second_key, 0.999)]
    for key in (first_key, second_key):
        if job.has(key):
            job.translated(key, "optimizer.betas", rates)


def schedule(job: Job, key: str, value: Any) -> None:
    """The learning rate's schedule; transformers' end at 0 unless another end is given."""
    name = str(value).removeprefix("SchedulerType.").lower()
    ours, differs = SCHEDULES.get(name, ("cosine", f"there is no `{name}` here"))
    if differs:
        job.approximated(key, "schedule.name", ours, differs)
    else:
        job.translated(key, "schedule.name", ours)
    if name == "constant":
        job.put("schedule.warmup", 0)


def final_rate(job: Job, key: str, value: Any) -> None:
    """`lr_scheduler_kwargs`: the least rate, as a share or for itself."""
    for name, inner in section(value).items():
        path = f"{key}.{name}"
        rate = job.number("learning_rate", 0) or 0
        if name == "min_lr_rate":
            job.translated(path, "schedule.final", number(inner))
        elif name == "min_lr" and rate:
            job.translated(path, "schedule.final", number(inner) / rate)
        elif name in ("num_cycles", "power") and number(inner) in (0.5, 1):
            job.ignored(path, "what the schedule does anyway")
        else:
            job.unsupported(path, "schedules have no such option here")


def warmup(job: Job, steps: str, share: str) -> None:
    """Steps of warm-up, or (where those are 0 or left out) a share of the run."""
    count, part = job.number(steps, 0) or 0, job.number(share, 0) or 0
    chosen, other = (steps, share) if count or not job.has(share) else (share, steps)
    if job.has(chosen):
        job.translated(chosen, "schedule.warmup", count if chosen == steps else part)
    else:
        job.assumed(chosen, "schedule.warmup", 0)
    if job.has(other):
        job.ignored(other, f"`{chosen}` says how long the warm-up is")


def held_out(job: Job, key: str, value: Any) -> None:
    """A share of rows held out; a number of rows can only be guessed at."""
    count = number(value)
    if 0 <= count < 1:
        job.translated(key, "data.validation", count)
    else:
        reason = f"the recipe holds out a share, not {count:g} rows; choose the share"
        job.approximated(key, "data.validation", 0.05, reason)


def steps_between(target: str, default: str) -> Rule:
    """A number of steps; a share of the run (a number below 1) is left to the default."""

    def rule(job: Job, key: str, value: Any) -> None:
        count = number(value)
        if count >= 1:
            job.translated(key, target, int(count))
        elif count > 0:
            job.unsupported(
                key, f"a share of the run; `{target}` counts steps, by default {default}"
            )
        else:
            job.ignored(key, "switched off")

    return rule


def strategy(steps: str) -> Rule:
    """When to evaluate, save or log: `steps` is how it is done here."""

    def rule(job: Job, key: str, value: Any) -> None:
        if value == "steps":
            job.ignored(key, "as it is done here")
        elif is_off(value) or value == "no":
            job.ignored(key, "done now and then all the same; it costs little")
        else:
            job.unsupported(key, f"the recipe counts steps: see `{steps}`")

    return rule


def trackers(job: Job, key: str, value: Any) -> None:
    """transformers' `report_to`: a tracker, several, `all` or `none`."""
    wanted = names(value) if value is not None else []
    if wanted in (["none"], ["all"]):
        job.ignored(key, "trackers are named one by one in `tracking.to`")
        return
    known = [name for name in wanted if name in ("tensorboard", "wandb", "trackio")]
    if not known:
        job.unsupported(key, "tracking knows tensorboard, wandb and trackio")
    elif len(known) < len(wanted):
        reason = "tracking knows tensorboard, wandb and trackio"
        job.approximated(key, "tracking.to", known, reason)
    else:
        job.translated(key, "tracking.to", known)


def tracker(name: str) -> Rule:
    """A switch that turns one tracker on."""

    def rule(job: Job, key: str, value: Any) -> None:
        if is_off(value):
            job.ignored(key, "switched off")
            return
        present = job.given("tracking.to") or []
        job.translated(key, "tracking.to", [*present, name] if name not in present else present)

    return rule


def project(name: str) -> Rule:
    """A tracker's project: its being there turns the tracker on."""

    def rule(job: Job, key: str, value: Any) -> None:
        present = job.given("tracking.to") or []
        if name not in present:
            job.put("tracking.to", [*present, name])
        job.translated(key, "tracking.project", str(value))

    return rule


def run_name(job: Job, key: str, value: Any) -> None:
    """The run's name; letters that a folder's name should not have become `-`."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("-._")
    if not name:
        job.unsupported(key, "a run's name is made of letters, digits, `.`, `_` and `-`")
    elif name == value:
        job.translated(key, "name", name)
    else:
        reason = "a run's name is made of letters, digits, `.`, `_` and `-`"
        job.approximated(key, "name", name, reason)


def recompute(job: Job, key: str, value: Any) -> None:
    """Gradient checkpointing: each block's activations are recomputed."""
    if isinstance(value, str) and value.startswith(("offload", "unsloth")):
        job.put("training.activation_offload", True)
        reason = "activations are recomputed, and what is kept of them goes to the host's memory"
        job.approximated(key, "training.recompute", "full", reason)
    else:
        job.translated(key, "training.recompute", "full" if truth(value) else "none")


def quantised(job: Job, four: str, eight: str) -> None:
    """The model's own weights in 4 or 8 bits."""
    if job.has(four) and not is_off(job.get(four)):
        job.translated(four, "adapter.quantise", "nf4")
    elif job.has(eight) and not is_off(job.get(eight)):
        job.translated(eight, "adapter.quantise", "int8")
    for key in (four, eight):
        if job.has(key) and not job.is_noted(key):
            job.ignored(key, "switched off")

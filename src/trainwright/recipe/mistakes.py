"""pydantic's errors in our words: what was given, what is expected, what to write instead.

All errors about one place become one mistake, so a union does not report each of its branches.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from trainwright.errors import Mistake
from trainwright.recipe.describe import (
    KeyPath,
    dotted,
    expects,
    field_at,
    item_of,
    members,
    section_at,
    section_in,
    value_of,
)
from trainwright.recipe.schema import Recipe, Section

# What other trainers call it, and where it stands here.
_ELSEWHERE = {
    "activation_checkpointing": "training.recompute",
    "base_model": "model.path",
    "batch_size": "training.batch_sequences",
    "bf16": "training.precision",
    "block_size": "data.sequence_length",
    "context_length": "data.sequence_length",
    "context_parallel_degree": "parallel.cp",
    "context_parallel_size": "parallel.cp",
    "cutoff_len": "data.sequence_length",
    "data_parallel_replicate_degree": "parallel.dp_replicate",
    "data_parallel_shard_degree": "parallel.dp_shard",
    "dataset": "data.sources",
    "dataset_path": "data.sources",
    "datasets": "data.sources",
    "eval_steps": "evaluation.every",
    "expert_model_parallel_size": "parallel.ep",
    "expert_parallel_degree": "parallel.ep",
    "fp16": "training.precision",
    "global_batch_size": "training.batch_sequences",
    "grad_clip": "training.gradient_clip",
    "gradient_accumulation_steps": "training.batch_sequences",
    "gradient_checkpointing": "training.recompute",
    "logging_steps": "tracking.log_every",
    "lr": "optimizer.learning_rate",
    "lr_scheduler": "schedule.name",
    "lr_scheduler_type": "schedule.name",
    "max_grad_norm": "training.gradient_clip",
    "max_length": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "max_steps": "training.steps",
    "micro_batch_size": "parallel.micro_batch",
    "model_name_or_path": "model.path",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "optim": "optimizer.name",
    "output_dir": "run_directory",
    "per_device_train_batch_size": "parallel.micro_batch",
    "pipeline_model_parallel_size": "parallel.pp",
    "pipeline_parallel_degree": "parallel.pp",
    "pipeline_parallel_size": "parallel.pp",
    "pipeline_schedule": "parallel.schedule",
    "report_to": "tracking.to",
    "sample_packing": "data.packing",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "seq_len": "data.sequence_length",
    "sequence_len": "data.sequence_length",
    "tensor_model_parallel_size": "parallel.tp",
    "tensor_parallel_degree": "parallel.tp",
    "tensor_parallel_size": "parallel.tp",
    "val_set_size": "data.validation",
    "wandb_project": "tracking.project",
    "warmup_ratio": "schedule.warmup",
    "warmup_steps": "schedule.warmup",
    "zero_stage": "parallel.zero",
}

Error = Mapping[str, Any]


def mistakes_from(errors: Iterable[Error]) -> Iterator[Mistake]:
    """Pydantic's `ValidationError.errors()` as mistakes, one a place, each with its dotted key."""
    grouped: dict[KeyPath, list[Error]] = {}
    for error in errors:
        grouped.setdefault(_key_path(error["loc"]), []).append(error)
    for path, found in grouped.items():
        # A branch of a union that was entered tells more than "this is no number" about the other.
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in grouped)
        if not deeper or any(error["type"] in ("extra_forbidden", "recipe") for error in found):
            yield _translate(path, found)


def _key_path(location: tuple[str | int, ...]) -> KeyPath:
    """Pydantic's location without the names of union branches; a tuple counts as one place."""
    annotation: Any = Recipe
    path: list[str | int] = []
    parts = iter(location)
    for part in parts:
        if len(list(members(annotation))) > 1:  # `part` only names a branch
            try:
                part = next(parts)
            except StopIteration:
                break
        section = section_in(annotation)
        if isinstance(part, int):
            annotation = item_of(annotation)
            if annotation is None:
                break
        elif section is not None and part in section.model_fields:
            annotation = section.model_fields[part].annotation
        else:
            path.append(part)  # an unknown key, or a key inside free-form values
            break
        path.append(part)
    return tuple(path)


def _translate(path: KeyPath, errors: list[Error]) -> Mistake:
    own = next((error for error in errors if error["type"] == "recipe"), None)
    if own is not None:
        context = own["ctx"]
        key = ".".join(part for part in (dotted(path), context["key"]) if part)
        return Mistake(context["what"], context["fix"], key=key)
    kinds = {error["type"] for error in errors}
    if "extra_forbidden" in kinds:
        return _unknown_key(path)
    field = field_at(path)
    if kinds == {"missing"} and len(errors[0]["loc"]) == len(path):
        return Mistake(f"`{path[-1]}` is missing", f"write {_example(path, field)}", dotted(path))
    return _wrong_value(path, field, errors[0]["input"])


def _unknown_key(path: KeyPath) -> Mistake:
    """The nearest right key: in this section, under another trainer's name, or elsewhere."""
    *parents, key = path
    section = section_at(tuple(parents)) or Recipe
    return Mistake(f"unknown key `{key}`", _nearest(str(key), section), key=dotted(path))


def _nearest(key: str, section: type[Section]) -> str:
    if "." in key:
        outer, _, inner = key.rpartition(".")
        return f"dots join keys on the command line only; here write `{inner}:` inside `{outer}:`"
    if key == "gradient_accumulation_steps":
        return (
            "leave it out: `training.batch_sequences` is the whole batch of a step, and how many "
            "micro-batches make it up follows from `parallel.micro_batch`"
        )
    own = list(section.model_fields)
    close = difflib.get_close_matches(key.lower(), own, n=1, cutoff=0.7)
    if close and key not in _ELSEWHERE:
        return f"did you mean `{close[0]}`?"
    if key in _ELSEWHERE:
        return f"here it is called `{_ELSEWHERE[key]}`"
    for name, field in Recipe.model_fields.items():
        other = section_in(field.annotation) or section
        if key == name or (other is not section and key in other.model_fields):
            right = name if key == name else f"{name}.{key}"
            return f"it belongs elsewhere: `{right}`"
    loose = difflib.get_close_matches(key.lower(), own, n=1, cutoff=0.5)
    if loose:
        return f"did you mean `{loose[0]}`?"
    return "the keys here are " + ", ".join(f"`{name}`" for name in own)


def _wrong_value(path: KeyPath, field: FieldInfo | None, given: Any) -> Mistake:
    if field is not None:
        annotation, metadata = field.annotation, tuple(field.metadata)
    else:  # an item of a list, or a value under a key of any name
        parent = field_at(path[:-1])
        outer = parent.annotation if parent else None
        annotation, metadata = item_of(outer) or value_of(outer), ()
    what = f"expected {expects(annotation, metadata)}, found {show(given)}"
    return Mistake(what, _repair(path, field, annotation, given), key=dotted(path))


def _repair(path: KeyPath, field: FieldInfo | None, annotation: Any, given: Any) -> str:
    names = [
        str(name)
        for member, _ in members(annotation)
        if get_origin(member) is Literal
        for name in get_args(member)
    ]
    close = difflib.get_close_matches(str(given).lower(), names, n=1, cutoff=0.5)
    if close:
        return f"did you mean `{close[0]}`?"
    kinds = [member for member, _ in members(annotation)]
    if str in kinds and isinstance(given, int | float):
        return f'put it in quotes: `"{given}"`'
    if any(get_origin(kind) is list for kind in kinds) and isinstance(given, str | Mapping):
        items = json.dumps(given, ensure_ascii=False) if isinstance(given, str) else "..."
        return f"make it a list: `{path[-1]}: [{items}]`"
    if field is None:  # an item of a list: the list as it could be
        path, field = path[:-1], field_at(path[:-1])
    return f"write for example {_example(path, field)}" if field is not None else ""


def _example(path: KeyPath, field: FieldInfo | None) -> str:
    """How the key could be written, from the schema's examples or its default."""
    if field is None:
        return f"`{path[-1]}: ...`"
    value = field.examples[0] if field.examples else field.default
    if isinstance(value, tuple):
        value = list(value)
    text = json.dumps(value) if isinstance(value, list | bool) else None
    if isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}"
    return f"`{path[-1]}: {text or value}`"


def show(value: Any) -> str:
    """A value as a person would name it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "`true`" if value else "`false`"
    if isinstance(value, str):
        return f'the text "{value if len(value) <= 40 else value[:37] + "..."}"'
    if isinstance(value, Mapping):
        return "a section of keys"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"`{value}`"

"""From a file or a command line to keys with their places, and whose keys they are."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainwright.errors import Mistake, UserError
from trainwright.recipe.importers.notes import Tool
from trainwright.recipe.yaml_text import Document, parse, parse_value

_LARGEST_FILE = 10_000_000
COMMAND_LINE = "command line"
# A script of TRL's, or its command.
_SCRIPT = re.compile(r"(?:.*/)?(sft|dpo|kto|orpo|cpo|reward|gkd|grpo|rloo|ppo|online_dpo)\w*\.py")
_LLAMA_FACTORY = {
    *("stage", "finetuning_type", "template", "cutoff_len", "dataset_dir", "lora_target"),
    *("lora_rank", "pref_beta", "do_train"),
}
_TRL = {
    *("dataset_name", "datasets", "use_peft", "dataset_text_field", "max_length", "beta"),
    *("dataset_config", "max_seq_length", "lora_target_modules", "per_device_train_batch_size"),
}
_FIXES = (
    "Axolotl has `base_model`, LLaMA-Factory `stage`, torchtune `_component_`, TRL `dataset_name`; "
    "or say which tool it is"
)


def read_file(path: Path) -> Document:
    """A YAML file, or a text file that holds a command line.

    Raises `UserError` where it cannot be read or is neither.
    """
    text = _text(path)
    command = _command_in(text)
    if command is not None:
        return read_command(command, str(path))
    document = parse(text, str(path))
    if not isinstance(document.value, dict) or not document.value:
        what = "a configuration is a section of keys, or a command line"
        raise UserError(Mistake(what, "name a YAML file", where=str(path)))
    return document


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            what = "the file is far too large for a configuration"
            raise UserError(Mistake(what, where=str(path)))
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(Mistake("there is no such file", where=str(path))) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(Mistake(f"cannot be read: {reason}", where=str(path))) from None
    except UnicodeDecodeError:
        fix = "a configuration is YAML text"
        raise UserError(Mistake("this is not a text file in UTF-8", fix, where=str(path))) from None


def _command_in(text: str) -> list[str] | None:
    """The words of a command line that a file holds, also as a JSON list; None for YAML."""
    stripped = text.strip()
    if stripped.startswith("["):
        try:
            words = json.loads(stripped)
        except ValueError:
            return None
        return words if words and all(isinstance(each, str) for each in words) else None
    if not re.search(r"(^|\s)--\w", text) or re.search(r"^\w+:( |$)", text, re.MULTILINE):
        return None
    try:
        return shlex.split(stripped.replace("\\\n", " "), comments=True)
    except ValueError:
        return None


def read_command(words: Sequence[str], name: str = COMMAND_LINE) -> Document:
    """TRL's command line: `trl VERB --key value …`, or accelerate with one of TRL's scripts.

    The verb becomes the key `command`. A file named with `--config` is read too; what the command
    line says goes before it. Raises `UserError` for words that are no such command line.
    """
    verb, arguments = _verb(list(words), name)
    document = Document(value={}, places={})
    if verb:
        document.value["command"] = verb
        document.places["command"] = name
    key, found = "", dict[str, list[str]]()
    for word in arguments:
        if re.match(r"--?[A-Za-z_]", word):
            key, equals, value = word.lstrip("-").partition("=")
            key = key.replace("-", "_")
            found[key] = [value] if equals else []
        elif key:
            found[key].append(word)
        else:
            fix = "write `--key value`, as TRL takes it"
            raise UserError(Mistake(f"`{word}` belongs to no option", fix, where=name))
    for key, values in found.items():
        off = key.removeprefix("no_") if key.startswith("no_") and not values else ""
        document.value[off or key] = False if off else _value(values, name)
        document.places[off or key] = name
    config = document.value.get("config")
    if isinstance(config, str):
        below = read_file(Path(config))
        document.value = {**below.value, **document.value}
        document.places = {**below.places, **document.places}
    return document


def _verb(words: list[str], name: str) -> tuple[str, list[str]]:
    """TRL's verb, and all options around it (accelerate's stand before)."""
    for index, word in enumerate(words):
        script = _SCRIPT.fullmatch(word)
        after = words[index + 1 :]
        if script:
            return script[1], _options(words[:index]) + after
        if word == "trl" or word.endswith("/trl"):
            if after and not after[0].startswith("-"):
                return after[0], after[1:]
            raise UserError(Mistake("`trl` has no command", "write `trl sft …`", where=name))
    if words and words[0].startswith("--"):
        return "", words
    what = "this is not a command line of TRL's"
    raise UserError(Mistake(what, "begin with `trl sft`, or name a YAML file", where=name))


def _options(words: list[str]) -> list[str]:
    """The words from the first option on: what a launcher was told."""
    start = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
    return words[start:]


def _value(values: list[str], name: str) -> Any:
    if not values:
        return True
    read = [parse_value(each, name) if each else "" for each in values]
    return read[0] if len(read) == 1 else read


def recognise(values: dict[str, Any], name: str) -> Tool:
    """Whose keys these are. Raises `UserError` where no tool's stand out."""
    if "command" in values:
        return "trl"
    if _has_component(values):
        return "torchtune"
    if "base_model" in values:
        return "axolotl"
    if "model_name_or_path" in values:
        ours, theirs = len(_TRL & set(values)), len(_LLAMA_FACTORY & set(values))
        if ours or theirs:
            return "trl" if ours > theirs else "llama-factory"
    if "model" in values and "training" in values:
        fix = "`trainwright validate` and `train` take it as it is"
        raise UserError(Mistake("this is a recipe of Trainwright's already", fix, where=name))
    raise UserError(Mistake("no tool is known by these keys", _FIXES, where=name))


def _has_component(tree: Any) -> bool:
    if isinstance(tree, dict):
        return "_component_" in tree or any(_has_component(value) for value in tree.values())
    return isinstance(tree, list) and any(_has_component(item) for item in tree)

"""Other tools' names of chat templates as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainwright.recipe.importers.job import Job

# Their name: ours, and what differs ("" if nothing does).
_ONE_MISTRAL = "Mistral's templates differ in spaces; the tokenizer's own is the sure one"
_ONE_QWEN = "one template stands for Qwen's generations"
NAMED: dict[str, tuple[str, str]] = {
    "chatml": ("chatml", ""),
    "llama3": ("llama3", ""),
    "alpaca": ("alpaca", "one wording, with or without an input"),
    "zephyr": ("zephyr", ""),
    "gemma": ("gemma", ""),
    "gemma2": ("gemma", ""),
    "gemma3": ("gemma", "without images"),
    "mistral": ("mistral", _ONE_MISTRAL),
    "mistral_v1": ("mistral", _ONE_MISTRAL),
    "mistral_v2v3": ("mistral", _ONE_MISTRAL),
    "mistral_v3_tekken": ("mistral", _ONE_MISTRAL),
    "mistral_v7_tekken": ("mistral", _ONE_MISTRAL),
    "mistral_small": ("mistral", _ONE_MISTRAL),
    "qwen": ("qwen", _ONE_QWEN),
    "qwen_25": ("qwen", _ONE_QWEN),
    "qwen3": ("qwen", ""),
    "qwen3_nothink": ("qwen", "whether the model thinks is the data's matter"),
}
_FALLBACK = "tokenizer_default_fallback_"
OWN = "the tokenizer's own template, as by default here"


def chat_template(job: Job, key: str, value: Any) -> None:
    """A template by name. One that we lack leaves the tokenizer's own in its place."""
    name = str(value)
    if name in NAMED:
        ours, differs = NAMED[name]
        if differs:
            job.approximated(key, "tokenizer.chat_template", ours, differs)
        else:
            job.translated(key, "tokenizer.chat_template", ours)
    elif name == "tokenizer_default":
        job.ignored(key, OWN)
    elif name.startswith(_FALLBACK):
        named = name.removeprefix(_FALLBACK)
        job.ignored(key, f"{OWN}; where it has none, write `tokenizer.chat_template: {named}`")
    elif name == "jinja":
        job.ignored(key, "the template itself stands in another key")
    else:
        reason = f"there is no template `{name}` here; without the key the tokenizer's own is taken"
        job.unsupported(key, reason)


def template_file(job: Job, key: str, value: Any) -> None:
    """A Jinja template's file. Its text, or a tokenizer's directory, has no place in the recipe."""
    text = str(value)
    if "{" in text or "\n" in text:
        fix = "write the template to a file and name it in `tokenizer.chat_template`"
        job.unsupported(key, fix)
    elif Path(text).suffix in (".jinja", ".jinja2", ".j2", ".txt"):
        job.translated(key, "tokenizer.chat_template", text)
    else:
        reason = "a tokenizer's template is taken by name or from a Jinja file"
        job.unsupported(key, reason)

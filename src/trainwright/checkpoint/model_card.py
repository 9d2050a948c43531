"""README.md of what is exported: the card that the hub shows, made of facts about the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

_LOADING = """\
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")"""
_ADAPTING = """\
from peft import {loader}
from transformers import AutoTokenizer

model = {loader}.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")"""


def model_card(
    *,
    name: str,
    recipe_yaml: str | None,
    metrics: Mapping[str, float | int | str],
    facts: Mapping[str, str] | None = None,
    base_model: str | None = None,
    scores: bool = False,
    adapter: bool = False,
    gguf: Sequence[str] = (),
    tags: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> str:
    """Front matter for the hub, how to load it, what it was made from, its numbers, its recipe.

    `base_model` is a hub id, `gguf` the names of GGUF files where it is those that are exported,
    `notes` what a user of the files should know. No license is stated: that is the author's to say.
    """
    library = "gguf" if gguf else "peft" if adapter else "transformers"
    front = {
        "library_name": library,
        "pipeline_tag": "text-classification" if scores else "text-generation",
        "tags": ["trainwright", *tags],
        **({"base_model": base_model} if base_model else {}),
    }
    # JSON is YAML: quoting is taken care of.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()]
    made = "Trained with Trainwright from the recipe below."
    if recipe_yaml is None:
        made = "Converted with Trainwright."
    sections = {
        "Made from": _table(facts or {}),
        "Results": _table(metrics),
        "Notes": [f"- {note}" for note in notes],
        "Recipe": _fenced("yaml", recipe_yaml) if recipe_yaml is not None else [],
    }
    return "\n".join(
        [
            *("---", *lines, "---", ""),
            *(f"# {name}", "", made, ""),
            *_loading(scores, adapter, gguf),
            *(
                line
                for title, body in sections.items()
                if body
                for line in ("", f"## {title}", "", *body)
            ),
            "",
        ]
    )


def _loading(scores: bool, adapter: bool, gguf: Sequence[str]) -> list[str]:
    if gguf:
        return _fenced("sh", f"llama-cli -m {gguf[0]}")
    kind = "SequenceClassification" if scores else "CausalLM"
    if adapter:
        return _fenced("python", _ADAPTING.format(loader=f"AutoPeftModelFor{kind}"))
    return _fenced("python", _LOADING.format(loader=f"AutoModelFor{kind}"))


def _fenced(language: str, text: str) -> list[str]:
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{fence}{language}", text.rstrip("\n"), fence]


def _table(rows: Mapping[str, float | int | str]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {key} | {_figure(value)} |" for key, value in rows.items()]
    return ["| | |", "|---|---|", *lines]


def _figure(value: float | int | str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).replace("|", "\\|").replace("\n", " ")
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"

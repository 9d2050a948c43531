"""Recipes from other tools' configurations: Axolotl, LLaMA-Factory, torchtune and TRL.

The way: file or command line → keys with their lines (`reading`) → a tool's table of rules
(`axolotl`, `llama_factory`, `torchtune`, `trl`) → a recipe and a note on each key (`job`, `notes`)
→ YAML (`written`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from trainwright.recipe.importers import axolotl, llama_factory, torchtune, trl
from trainwright.recipe.importers.job import Job
from trainwright.recipe.importers.notes import Imported, Note, Tool
from trainwright.recipe.importers.reading import (
    COMMAND_LINE,
    read_command,
    read_file,
    recognise,
)
from trainwright.recipe.importers.written import to_yaml
from trainwright.recipe.yaml_text import Document

__all__ = ["Imported", "Note", "Tool", "import_config", "import_document", "to_yaml"]

_TRANSLATORS: dict[Tool, Callable[[Job], None]] = {
    "axolotl": axolotl.translate,
    "llama-factory": llama_factory.translate,
    "torchtune": torchtune.translate,
    "trl": trl.translate,
}


def import_config(
    source: str | os.PathLike[str] | Sequence[str], tool: Tool | None = None
) -> Imported:
    """The recipe that says what another tool's configuration says.

    `source` is a file (YAML, or a text file with TRL's command line), or a command line as a list
    of words. Whose it is is known by its keys unless `tool` says so. Data sets that LLaMA-Factory
    knows by name are looked up in a `dataset_info.json` near the file.

    Every key gets a note. Raises `UserError` for what cannot be read, is no tool's configuration,
    or is about something that no recipe can express, such as training by rewards.
    """
    if isinstance(source, str | os.PathLike):
        document, name = read_file(Path(source)), str(source)
    else:
        document, name = read_command(source), COMMAND_LINE
    return import_document(document, name, tool)


def import_document(document: Document, name: str, tool: Tool | None = None) -> Imported:
    """`import_config` of keys that have been read already; `name` is their file's."""
    found: Tool = tool or recognise(document.value, name)
    if found == "torchtune":
        document.value = torchtune.resolve(document.value)
    job = Job(found, name, document)
    _TRANSLATORS[found](job)
    return job.finish()

"""The recipe of a run: what of it all peers share, and what each machine says for itself.

Whoever joins trains by a recipe that somebody else wrote. It may say what the model is and how it
learns. It may not run code, read this machine's files or environment, write outside the run's
directory or send anything anywhere: such keys are each machine's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from trainwright.errors import Mistake, UserError
from trainwright.recipe.load import load_recipe, plain_values
from trainwright.recipe.overrides import COMMAND_LINE
from trainwright.recipe.schema import Recipe

# Not in the manifest, and refused where they are.
OWN = (
    "run_directory",
    "cluster",
    "parallel",
    "checkpoint",
    "tracking",
    "export",
    "data.cache",
    "evaluation.tasks",
    "training.compile",
    "training.recompute",
    "training.activation_offload",
)
# In the manifest, but a peer may have its own. Paths may be anywhere.
_MAY_DIFFER = ("data.sources", "data.validation", "evaluation", "name")
_PATHS = ("path", "chat_template", "reference", "teacher")


def shared_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values that are the same on all machines, as JSON. Of files of this machine only
    their names are told.

    Raises UserError where that cannot be: a model that brings its own code.
    """
    _refuse_code(recipe)
    values = plain_values(recipe)
    for key in OWN:
        _take_out(values, key)
    for _, holder, key in _files(values):
        holder[key] = f"./{Path(holder[key]).name}"
    return values


def recipe_here(values: dict[str, Any], overrides: Sequence[str], name: str) -> Recipe:
    """The recipe of these shared values, with `key=value` overrides of this machine's. `name`
    is the run's, for messages.

    Raises UserError for values that no starter may set, for files of which this machine does not
    say where it has them, and for overrides of what all peers must have alike.
    """
    rest, there = deepcopy(values), Path("/", name, "recipe")  # no machine has this folder
    mistakes = [
        Mistake(
            "whoever starts a run has no say in this", "do not join it", key=key, where=str(there)
        )
        for key in OWN
        if _take_out(rest, key) is not None
    ]
    # JSON is YAML; `$${env:` stands for itself, so that nothing is read from the environment.
    text = json.dumps(values, ensure_ascii=False).replace("${env:", "$${env:")
    shared = load_recipe(there, text=text)
    _refuse_code(shared)
    given = [override.partition("=")[0].strip() for override in overrides]
    mistakes += (
        Mistake("all peers of a run have this alike", "leave it out", key=key, where=COMMAND_LINE)
        for key in given
        if not _below(key, (*OWN, *_MAY_DIFFER)) and key.rpartition(".")[2] not in _PATHS
    )
    mistakes += (
        Mistake(
            f"the run reads {Path(holder[key]).name}, a file of who started it",
            f"say what this machine reads: `{path}=PATH`",
            key=path,
            where=str(there),
        )
        for path, holder, key in _files(plain_values(shared))
        if not any(_below(path, (each,)) for each in given)
    )
    if mistakes:
        raise UserError(mistakes)
    return load_recipe(there, overrides, text=text)


def _refuse_code(recipe: Recipe) -> None:
    if recipe.model.trust_remote_code:
        what = "a model's own code would run on the machines of all peers"
        fix = "take a model that needs none"
        raise UserError(Mistake(what, fix, key="model.trust_remote_code"))


def _files(values: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Where values name a file or folder of a machine: dotted key, what holds it, its last key."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict | list):
            yield from _files(value, here)
        elif key in _PATHS and isinstance(value, str) and (value[:1] in "/~" or "://" in value):
            yield here, values, key


def _take_out(values: dict[str, Any], key: str) -> Any:
    """Remove a dotted key; what stood there."""
    *above, last = key.split(".")
    for name in above:
        inner = values.get(name)
        if not isinstance(inner, dict):
            return None
        values = inner
    return values.pop(last, None)


def _below(key: str, prefixes: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"{each}.") for each in prefixes)

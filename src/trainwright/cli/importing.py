"""`trainwright import`: another tool's configuration as a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from trainwright.recipe.importers import Note

EXAMPLE = """
Examples:

  trainwright import axolotl.yml

  trainwright import qwen_lora_sft.yaml --from llama-factory -o recipe.yaml

  trainwright import -- trl sft --model_name_or_path ./model --dataset_name ./data.jsonl
"""

# What each kind of note means, as the table's headings say it.
MEANINGS = {
    "approximated": "means something near",
    "unsupported": "the recipe cannot say it",
    "ignored": "nothing to say",
    "translated": "means the same",
}


def import_(
    config: Annotated[
        list[str],
        typer.Argument(help="A YAML file, or TRL's command line after `--`.", metavar="CONFIG"),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; default CONFIG.recipe.yaml beside it."),
    ] = None,
    tool: Annotated[
        str | None,
        typer.Option("--from", help="axolotl, llama-factory, torchtune or trl; default its keys."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file.")] = False,
) -> None:
    """Turn a configuration of Axolotl, LLaMA-Factory, torchtune or TRL into a recipe.

    Every key is listed: translated, approximated, unsupported with the reason, or ignored.
    """
    from rich.console import Console

    from trainwright.cli.mistakes import print_mistakes
    from trainwright.errors import UserError
    from trainwright.files import write_atomically
    from trainwright.planner.check import recipe_checks
    from trainwright.recipe.importers import import_config, to_yaml
    from trainwright.recipe.importers.notes import TOOLS
    from trainwright.recipe.load import load_recipe

    chosen = next((each for each in TOOLS if each == tool), None)
    if tool is not None and chosen is None:
        raise UserError(f"there is no tool {tool}", fix=f"choose one of {', '.join(TOOLS)}")
    whole_line = len(config) > 1
    imported = import_config(config if whole_line else config[0], chosen)
    source = Path("trl" if whole_line else config[0])
    file = output or source.with_name(f"{source.stem}.recipe.yaml")
    if file.exists() and not force:
        raise UserError(
            f"{file} is there already", fix="give another name with --output, or --force"
        )
    write_atomically(file, to_yaml(imported))

    console = Console(highlight=False)
    _print_notes(imported.notes, console)
    console.print(f"Wrote {file}, from {imported.tool}'s {imported.name}.", soft_wrap=True)
    try:
        load_recipe(file, (), recipe_checks)
    except UserError as error:
        console.print("What is still to be mended in it:", style="bold")
        print_mistakes(error, console)
        return
    console.print(f"Next: trainwright data {file}  and  trainwright train {file}")


def _print_notes(notes: Sequence[Note], console: Console) -> None:
    from rich.text import Text

    for kind, meaning in MEANINGS.items():
        own = [note for note in notes if note.kind == kind]
        if not own:
            continue
        console.print(f"[bold]{kind}[/bold]: {meaning} ({len(own)})")
        for note in own:
            line = Text(f"  {note.key}", style="bold")
            line.append(f" → {note.target}" if note.target else "", style="not bold")
            line.append(f"  {note.where}" if note.where else "", style="not bold dim")
            console.print(line, soft_wrap=True)
            if note.reason:
                console.print(Text(f"      {note.reason}", style="dim"), soft_wrap=True)
        console.print()


import_.__doc__ = f"{import_.__doc__}\n{EXAMPLE}"

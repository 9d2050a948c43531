"""`trainwright init` and `validate`: a recipe to start from, and what is wrong with one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from trainwright.recipe.schema import Recipe

INIT_EXAMPLE = """
Examples:

  trainwright init quickstart

  trainwright init pretrain --output my-model.yaml

  trainwright init --presets
"""

VALIDATE_EXAMPLE = """
Examples:

  trainwright validate recipe.yaml

  trainwright validate recipe.yaml training.steps=20 --print

  trainwright validate --schema > recipe.schema.json
"""


def init(
    name: Annotated[str, typer.Argument(help="Which starter; --list lists them.")] = "quickstart",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default NAME.yaml.")
    ] = None,
    list_starters: Annotated[bool, typer.Option("--list", help="List the starters.")] = False,
    presets: Annotated[
        bool, typer.Option("--presets", help="List the sizes of new models, by family.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file.")] = False,
) -> None:
    """Write a starter recipe, every line explained."""
    from rich.console import Console

    from trainwright.errors import UserError
    from trainwright.files import write_atomically
    from trainwright.recipe.starters import STARTERS, starter_summary, starter_text

    console = Console(highlight=False)
    if presets:
        _print_presets(console)
        return
    if list_starters:
        for each in STARTERS:
            console.print(f"  [bold]{each:<12}[/bold]{starter_summary(each)}", soft_wrap=True)
        return
    text = starter_text(name)
    file = output or Path(f"{name}.yaml")
    if file.is_dir():
        file = file / f"{name}.yaml"
    if file.exists() and not force:
        raise UserError(
            f"{file} is there already", fix="give another name with --output, or --force"
        )
    try:
        write_atomically(file, text)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"{file} cannot be written: {reason}", fix="choose another --output"
        ) from None
    typer.echo(f"Wrote {file}. Next: trainwright train {file}")


def validate(
    recipe: Annotated[Path | None, typer.Argument(help="The recipe, a YAML file.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys to change, as key.path=value.")
    ] = None,
    print_recipe: Annotated[
        bool, typer.Option("--print", help="Print the whole recipe, defaults written out.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema for editors.")
    ] = False,
) -> None:
    """Report everything that is wrong with a recipe, or what it would train."""
    import json

    from rich.console import Console

    from trainwright.errors import UserError
    from trainwright.planner.check import recipe_checks
    from trainwright.recipe.load import dump_recipe, load_recipe
    from trainwright.recipe.schema_export import json_schema

    if schema:
        typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))
        return
    if recipe is None:
        raise UserError("no recipe is given", fix="`trainwright validate RECIPE.yaml`")
    loaded = load_recipe(recipe, overrides or (), recipe_checks)
    if print_recipe:
        typer.echo(dump_recipe(loaded), nl=False)
        return
    _print_summary(loaded, Console(highlight=False))


init.__doc__ = f"{init.__doc__}\n{INIT_EXAMPLE}"
validate.__doc__ = f"{validate.__doc__}\n{VALIDATE_EXAMPLE}"


def _print_presets(console: Console) -> None:
    from rich.table import Table

    from trainwright.models.families import decoder_config, new_hf_config
    from trainwright.planner.shapes import parameter_count
    from trainwright.recipe.presets import TABLE

    table = Table(title="model: {family: FAMILY, preset: PRESET}", title_justify="left", box=None)
    table.add_column("family", style="bold")
    table.add_column("preset", style="bold")
    for column in ("hidden", "layers", "heads", "kv heads", "ffn", "vocabulary", "parameters"):
        table.add_column(column, justify="right")
    for preset in TABLE:
        config = decoder_config(new_hf_config(preset.family, preset.config, preset.vocabulary))
        sizes = (
            config.hidden_size,
            config.num_layers,
            config.num_heads,
            config.num_kv_heads,
            config.intermediate_size,
            preset.vocabulary,
            parameter_count(config),
        )
        table.add_row(preset.family, preset.size, *(f"{size:,}" for size in sizes))
    console.print(table)
    console.print(
        "Parameters count the vocabulary shown; yours follows from the tokenizer.", style="dim"
    )


def _print_summary(recipe: Recipe, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    from trainwright.planner.budget import memory_budget
    from trainwright.planner.choose import choose_plan
    from trainwright.planner.cluster.load import load_cluster
    from trainwright.planner.explain import advice_lines, explain_plan, foretold, memory_lines
    from trainwright.planner.known_model import known_config
    from trainwright.planner.make import asked_workers, cluster_of, machine_of, memory_advice
    from trainwright.training.machine import detect_machine

    config = known_config(recipe.model, recipe.tokenizer, recipe.objective)
    machine = detect_machine()
    asked = asked_workers(recipe.parallel) if recipe.parallel.workers == "auto" else 0
    elsewhere = asked > max(machine.devices, 8 * machine.cores) and not machine.launched
    if recipe.cluster is not None and not machine.launched:
        machine, elsewhere = machine_of(load_cluster(recipe.cluster)), False
    elif elsewhere:
        machine = cluster_of(asked)
    choice = choose_plan(recipe, machine, config)
    plan = choice.plan
    rows = [("model", _model(recipe)), ("data", _data(recipe)), ("length", _length(recipe))]
    table = Table(box=None, show_header=False)
    budget = None if config is None else memory_budget(recipe, plan, config, machine)
    rows += [("plan", choice.reason), *explain_plan(plan, config, budget)]
    for name, value in [*rows, *foretold(choice.prediction)]:
        if name != "memory":  # told line by line below
            table.add_row(name, escape(value))
    console.print(f"[bold]{recipe.name}[/bold]: nothing is wrong with the recipe.")
    if elsewhere:
        console.print(
            f"It asks for {asked:,} workers, more than this machine has: planned for as many GPUs "
            "of 80 GB, eight in each machine.",
            soft_wrap=True,
        )
    console.print(table)
    if config is None or budget is None:
        return
    for line in ("", *memory_lines(budget)):
        console.print(line, markup=False)
    if not budget.fits():
        console.print("That may be more than there is.")
        for line in advice_lines(memory_advice(recipe, plan, machine, config)):
            console.print(line, markup=False, soft_wrap=True)


def _model(recipe: Recipe) -> str:
    if recipe.model.path is not None:
        return recipe.model.path
    size = recipe.model.preset or "of its own shape"
    return f"new {recipe.model.family}, {size}"


def _data(recipe: Recipe) -> str:
    names = [str(source.path or source.kind) for source in recipe.data.sources]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown}; rows of {recipe.data.sequence_length:,} tokens, packing {recipe.packing}"


def _length(recipe: Recipe) -> str:
    training = recipe.training
    if training.steps is not None:
        return f"{training.steps:,} steps"
    if training.tokens is not None:
        return f"{training.tokens:,} tokens"
    return "1 epoch" if training.epochs == 1 else f"{training.epochs:g} epochs"

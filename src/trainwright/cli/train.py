"""`trainwright train`: a recipe becomes a trained, exported model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = """
Examples:

  trainwright train examples/quickstart.yaml

  trainwright train recipe.yaml training.steps=200 parallel.workers=2

  trainwright train recipe.yaml --tune 4

  torchrun --nproc-per-node 8 -m trainwright train recipe.yaml

The same command continues a run that was stopped.
"""


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys to change, as key.path=value.")
    ] = None,
    from_step: Annotated[
        int | None,
        typer.Option(help="Go on from this saved step; newer ones are set aside, not deleted."),
    ] = None,
    tune: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="K",
            help="Try the K plans predicted to be best for a few steps each, and follow the "
            "quickest.",
            show_default=False,
        ),
    ] = 0,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", help="Show what each dimension of parallelism sends, and how long."
        ),
    ] = False,
) -> None:
    """Train a recipe, or continue its run, then export the model and write the report."""
    from rich.console import Console

    from trainwright.training import api
    from trainwright.training.launch import INTERRUPTED, RunInterrupted, WorkerFailed

    console = Console(highlight=False)
    try:
        result = api.train(
            recipe,
            *(overrides or []),
            say=lambda text: console.print(text, markup=False, soft_wrap=True),
            from_step=from_step,
            verbose=verbose,
            tune=tune,
        )
    except RunInterrupted as stopped:
        command = shlex.join(["trainwright", "train", str(recipe), *(overrides or [])])
        what = "Stopped and saved" if stopped.saved else "Stopped before the next step was saved"
        console.print(f"{what}. Continue with: {command}", markup=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    except WorkerFailed as failure:
        typer.echo(str(failure), err=True)
        raise typer.Exit(1) from None
    if result is None:
        return
    console.print()
    for name, value in result.figures.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
        console.print(f"  {name:<28}{shown}", markup=False, soft_wrap=True)
    if result.export is not None:
        console.print(f"  {'model':<28}{result.export}", markup=False, soft_wrap=True)
    console.print(f"  {'report':<28}{result.report}", markup=False, soft_wrap=True)


train.__doc__ = f"{train.__doc__}\n{EXAMPLE}"

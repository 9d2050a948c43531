"""The command line's front door: its verbs, and what happens to a user's mistakes.

Modules of verbs import what is heavy inside their functions, so that `--help` is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from trainwright import __version__
from trainwright.cli.data import data
from trainwright.cli.doctor import doctor
from trainwright.cli.evaluate import evaluate
from trainwright.cli.export import export
from trainwright.cli.generate import chat, generate
from trainwright.cli.importing import import_
from trainwright.cli.plan import plan
from trainwright.cli.recipes import init, validate
from trainwright.cli.report import report
from trainwright.cli.serve import serve
from trainwright.cli.swarm import app as swarm
from trainwright.cli.train import train
from trainwright.cli.verify import verify
from trainwright.errors import UserError

USER_MISTAKE, INTERRUPTED = 2, 130

# Verbs as `--help` lists them, by panel.
VERBS: dict[str, tuple[Callable[..., None], ...]] = {
    "Recipe": (init, import_, validate, data),
    "Training": (plan, train, evaluate, report, verify),
    "Model": (generate, chat, serve, export),
    "Machine": (doctor,),
}

app = typer.Typer(
    name="trainwright",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _panel, _verbs in VERBS.items():
    for _verb in _verbs:
        app.command(_verb.__name__.rstrip("_"), rich_help_panel=_panel)(_verb)
app.add_typer(swarm, name="swarm", rich_help_panel="Training")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trainwright {__version__}")
        raise typer.Exit


@app.callback()
def trainwright(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Train language models from one recipe, on whatever machines there are.

    Begin with:  trainwright init quickstart  and  trainwright train quickstart.yaml
    """


def main() -> NoReturn:
    """Run the command line. Exit code 2 for a user's mistakes, 130 when interrupted."""
    try:
        app()
    except UserError as error:
        from rich.console import Console

        from trainwright.cli.mistakes import print_mistakes

        print_mistakes(error, Console(stderr=True, highlight=False))
        sys.exit(USER_MISTAKE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has had enough; Python must not complain on the way out either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(0)


if __name__ == "__main__":
    main()

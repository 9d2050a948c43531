"""`trainwright report`: one HTML page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = """
Examples:

  trainwright report runs/quickstart

  trainwright report runs/quickstart --open

A run that is still training can be reported too.
"""


def report(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the page in the browser.")
    ] = False,
) -> None:
    """Write RUN/report.html (losses, speed, samples, recipe, machine) and print its path."""
    from trainwright.report.find import require_run
    from trainwright.report.html import write_report

    page = write_report(require_run(run))
    typer.echo(page)
    if open_page:
        import webbrowser

        if not webbrowser.open(page.absolute().as_uri()):
            typer.echo("no browser could be started; open the file by hand", err=True)


report.__doc__ = f"{report.__doc__}\n{EXAMPLE}"

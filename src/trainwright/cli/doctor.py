"""`trainwright doctor`: what this machine has, what is missing, how fast it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from trainwright.training.checkup import Finding

EXAMPLE = """
Examples:

  trainwright doctor

  trainwright doctor --quick

  trainwright doctor --json > machine.json
"""

SIGNS = {
    "good": "[green]✓[/]",
    "note": "[yellow]![/]",
    "missing": "[dim]–[/]",
    "broken": "[red]✗[/]",
}


def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out what takes seconds: measuring, compiling.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look this machine over for training, and measure it. Exit code 1 if it cannot train."""
    import json
    from dataclasses import asdict

    from rich.console import Console

    from trainwright.training.checkup import can_train, examine

    console, waiting = Console(), Console(stderr=True)
    if as_json:
        findings = examine(quick)
        fit = can_train(findings)
        typer.echo(
            json.dumps(
                {"can_train": fit, "findings": [asdict(finding) for finding in findings]}, indent=2
            )
        )
    else:
        with waiting.status("looking around") as status:
            findings = examine(quick, say=lambda text: status.update(text))
        fit = can_train(findings)
        show(findings, fit, console)
    if not fit:
        raise typer.Exit(1)


def show(findings: list[Finding], fit: bool, console: Console) -> None:
    """Print the findings by group, then the advice, then the verdict."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for group in dict.fromkeys(finding.group for finding in findings):
        table.add_row("", f"[bold]{group}[/]", "")
        for finding in findings:
            if finding.group == group:
                table.add_row(SIGNS[finding.state], escape(finding.name), escape(finding.value))
    console.print(table)
    advised = [finding for finding in findings if finding.advice]
    if advised:
        console.print()
    for finding in advised:
        console.print(f"{SIGNS[finding.state]} [bold]{escape(finding.name)}[/]: ", end="")
        console.print(finding.advice, markup=False, highlight=False)
    console.print()
    console.print(
        "[green]This machine can train.[/]" if fit else "[red]Training cannot work here yet.[/]"
    )


doctor.__doc__ = f"{doctor.__doc__}\n{EXAMPLE}"

"""`trainwright doctor`: what this machine has, what is missing, how fast it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainwright.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from trainwright.training.checkup import Finding

EXAMPLE = """
Examples:

  trainwright doctor

  trainwright doctor --quick

  trainwright doctor --json > machine.json

  trainwright doctor --calibrate

  trainwright doctor --calibrate recipe.yaml
"""

SIGNS = {
    "good": "[green]✓[/]",
    "note": "[yellow]![/]",
    "missing": "[dim]–[/]",
    "broken": "[red]✗[/]",
}


def doctor(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="With --calibrate: a recipe whose shapes are measured first."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out what takes seconds: measuring, compiling.")
    ] = False,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure kernels and collectives for the planner, in under five minutes, and keep "
            "them. Interrupted, it goes on where it was the next time.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look this machine over for training, and measure it. Exit code 1 if it cannot train."""
    if calibrate:
        calibrate_machine(recipe, as_json)
        return
    if recipe is not None:
        raise UserError(
            "a recipe is of use to `--calibrate` only",
            fix="write `trainwright doctor --calibrate RECIPE`",
        )
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


def calibrate_machine(recipe: Path | None, as_json: bool) -> None:
    """Measure what the planner wants to know of this machine, and keep it."""
    import json
    from dataclasses import asdict

    from rich.console import Console

    from trainwright.planner.cluster.calibration import calibration_folder
    from trainwright.planner.cluster.this_machine import this_machine
    from trainwright.report.tables import rate_text
    from trainwright.training.calibration import calibrate, job_of, obstacles
    from trainwright.training.machine import detect_machine

    console, waiting = Console(highlight=False), Console(stderr=True)
    machine, wanted = detect_machine(), job_of(recipe)
    for words in obstacles():
        waiting.print(f"{SIGNS['note']} {words}")
    try:
        with waiting.status("starting; this takes up to five minutes") as status:
            found = calibrate(machine, *wanted, say=status.update)
    except KeyboardInterrupt:
        waiting.print("Interrupted; what was measured is kept. The same command goes on.")
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    for crowd in found.crowds:
        device = this_machine(machine, found, workers=crowd.workers).pools[0].device
        rates = (f"{name} {rate_text(rate, 'FLOP/s')}" for name, rate in device.peak_flops.items())
        console.print(
            f"{crowd.workers} at once: {len(crowd.samples)} measurements; products "
            f"{', '.join(rates)}; memory {rate_text(device.memory_bandwidth, 'B/s')}"
        )
    console.print(f"kept in {calibration_folder() / found.fingerprint}.json", soft_wrap=True)


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

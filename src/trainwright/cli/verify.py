"""`trainwright verify`: proof that plans train the same model as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = """
Examples:

  trainwright verify examples/quickstart.yaml

  trainwright verify recipe.yaml --world-size 8 --plans 100

  trainwright verify recipe.yaml training.dropout=0.1 --plans 0

  trainwright verify recipe.yaml parallel.dp_shard=64 parallel.tp=8 --simulate 512
"""


def verify(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys to change, as key.path=value.")
    ] = None,
    world_size: Annotated[int, typer.Option(min=1, help="Worker processes to spread over.")] = 4,
    plans: Annotated[
        int, typer.Option(min=0, help="Plans to try, as different as can be; 0 tries all.")
    ] = 100,
    seed: Annotated[int, typer.Option(help="Which plans are tried.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON a plan.")] = False,
    simulate: Annotated[
        int,
        typer.Option(
            min=0,
            help="Instead, take a step of one rank of so many GPUs here, without values, and "
            "compare what it sends with the planner's formulas.",
            show_default=False,
        ),
    ] = 0,
    rank: Annotated[int, typer.Option(min=0, help="The rank that --simulate is.")] = 0,
) -> None:
    """Train a small model of the recipe's family on many plans, and compare with one process.

    Every step's loss and every parameter's gradient are compared, in fp32, on this machine's CPU.
    Exit code 1 if any plan differs, or any collective from its formula.
    """
    import json
    import time

    from rich.console import Console

    from trainwright.planner.check import recipe_checks
    from trainwright.recipe.load import load_recipe
    from trainwright.training.verify import as_record, in_words
    from trainwright.training.verify import verify as run

    console = Console(highlight=False)

    def say(line: str) -> None:
        if not as_json:
            console.print(line, markup=False, soft_wrap=True)

    loaded = load_recipe(recipe, overrides or [], recipe_checks)
    if simulate:
        from trainwright.cli.simulated import simulate_rank

        if not simulate_rank(loaded, simulate, rank, as_json):
            raise typer.Exit(1)
        return
    started, passed, failed = time.monotonic(), 0, 0
    outcomes = run(loaded, world_size=world_size, plans=plans or None, seed=seed, say=say)
    for number, outcome in enumerate(outcomes):
        if number == 0:
            say(f"\n{'plan':<62}{'loss':>9}{'gradient':>10}  parameter")
        passed, failed = passed + outcome.passed, failed + (not outcome.passed)
        if as_json:
            typer.echo(json.dumps(as_record(outcome)))
            continue
        figures = f"{outcome.loss:>9.1e}{outcome.gradient:>10.1e}  {outcome.name}"
        if outcome.error:
            figures = f"  {outcome.error}"
        verdict = "[green]pass[/]" if outcome.passed else "[bold red]FAIL[/]"
        console.print(f"{in_words(outcome.plan):<62}", end="", markup=False, soft_wrap=True)
        console.print(figures, end=" ", markup=False, soft_wrap=True)
        console.print(verdict, soft_wrap=True)
    seconds = time.monotonic() - started
    say(f"\n{passed} passed, {failed} failed, in {seconds:.0f} s")
    if failed:
        raise typer.Exit(1)


verify.__doc__ = f"{verify.__doc__}\n{EXAMPLE}"

"""`trainwright verify --simulate`: what one rank of many sends, beside the formulas."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.console import Console
from rich.table import Table

from trainwright.planner.explain import explain_plan
from trainwright.planner.known_model import known_config
from trainwright.recipe.schema import Recipe
from trainwright.report.tables import bytes_text, duration_text


def simulate_rank(recipe: Recipe, world_size: int, rank: int, as_json: bool) -> bool:
    """Simulate and print; whether every collective sent what its formula says."""
    from trainwright.training.simulate import plan_for, simulate

    config = known_config(recipe.model, recipe.tokenizer, recipe.objective)
    plan = plan_for(recipe, config, world_size)
    assert config is not None  # or there would be no plan
    done = simulate(recipe, config, plan, rank)
    if as_json:
        for line in done.lines:
            typer.echo(json.dumps({**asdict(line), "equal": line.equal}))
        return done.equal
    console = Console(highlight=False)
    console.print(f"rank {rank} of {world_size}, one step, simulated")
    for name, value in explain_plan(plan, config):
        console.print(f"  {name:<15}{value}", markup=False, soft_wrap=True)
    table = Table("group", "collective", box=None)
    for title in ("calls", "bytes sent", "formula"):
        table.add_column(title, justify="right")
    table.add_column("")
    for line in done.lines:
        verdict = "[green]equal[/]" if line.equal else "[bold red]DIFFERENT[/]"
        counts = (line.calls, line.sent, round(line.formula))
        table.add_row(line.group, line.collective, *(f"{n:,}" for n in counts), verdict)
    console.print(table)
    resident = bytes_text(done.resident)
    console.print(f"in {duration_text(done.seconds)} and {resident} of this process's memory")
    return done.equal

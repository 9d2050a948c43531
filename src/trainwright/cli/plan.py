"""`trainwright plan`: the best ways to spread a recipe over a machine, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from trainwright.planner.explaining.answer import Answer
    from trainwright.planner.plan import Machine
    from trainwright.planner.search.ranking import Ranked

EXAMPLE = """
Examples:

  trainwright plan recipe.yaml

  trainwright plan recipe.yaml --cluster examples/clusters/h100-64.yaml --objective cost

  trainwright plan recipe.yaml --cluster h100-64.yaml parallel.tp=8 parallel.pp=2

  trainwright plan recipe.yaml --cluster h100-64.yaml --what-if "pools.h100.nodes=16"
"""


def plan(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys to change, as key.path=value.")
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(help="The machine, a YAML file (docs/cluster.md); default the one at hand."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many plans to show.")] = 10,
    objective: Annotated[
        str,
        typer.Option(help="time, cost, energy, carbon, or a mix such as time=0.7,energy=0.3."),
    ] = "time",
    what_if: Annotated[
        list[str] | None,
        typer.Option(help="A key of the machine or the recipe to change, as key=value."),
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            help="Write your plan's step, or the best's: a trace for Perfetto; to .svg a picture."
        ),
    ] = None,
    operators: Annotated[
        bool,
        typer.Option("--operators", help="Show how your plan, or the best, cuts each operator."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Rank the ways to spread a recipe over a machine, without running anything."""
    from trainwright.planner.explaining.answer import answer
    from trainwright.planner.explaining.json_text import json_text

    found = answer(
        recipe,
        overrides or (),
        cluster,
        top=top,
        objective=objective,
        changes=what_if or (),
        machine=_machine,
    )
    if timeline is not None:
        _write_timeline(timeline, found)
    typer.echo(json_text(found) if as_json else "\n".join(found.lines()))
    if operators and not as_json:
        typer.echo("\n".join(_operators(found)))
    if found.ranking.winner is None:
        raise typer.Exit(2)  # as for every mistake in what was given


def _shown(found: Answer) -> Ranked | None:
    """The plan that the user names, where it is possible; else the best."""
    return (found.named.ranked if found.named else None) or found.ranking.winner


def _operators(found: Answer) -> list[str]:
    from trainwright.planner.search.sharding_words import sharding_lines

    shown = _shown(found)
    if shown is None:
        return []
    lines = sharding_lines(found.question.job, shown.plan, shown.cluster)
    return ["", *(lines or ["No operator is cut: workers differ in their rows or their layers."])]


def _machine() -> Machine:
    """The machine at hand; finding out imports torch."""
    from trainwright.training.machine import detect_machine

    return detect_machine()


def _write_timeline(path: Path, found: Answer) -> None:
    """A picture where the name ends in .svg, else a trace."""
    from trainwright.errors import UserError
    from trainwright.files import write_atomically
    from trainwright.planner.cost.memory import memory_timeline
    from trainwright.planner.perfetto import write_trace
    from trainwright.planner.plan_record import PlanRecord
    from trainwright.planner.step_slices import step_timeline
    from trainwright.report.step_pictures import step_svg

    shown = _shown(found)
    if shown is None:
        raise UserError("there is no plan to draw", fix="leave --timeline out to see why")
    steps = step_timeline(shown.prediction)
    memory = memory_timeline(found.question.job, shown.plan, steps, shown.cluster)
    try:
        if path.suffix == ".svg":
            record = PlanRecord(
                shown.plan,
                "searched",
                prediction=shown.prediction,
                memory=tuple(map(tuple, memory)),
            )
            write_atomically(path, step_svg(record))
        else:
            write_trace(path, shown.prediction, memory)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{path} cannot be written: {reason}", fix="name another file") from None


plan.__doc__ = f"{plan.__doc__}\n{EXAMPLE}"

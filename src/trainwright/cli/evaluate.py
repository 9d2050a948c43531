"""`trainwright evaluate`: held-out loss, perplexity and bits per byte."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLE = """
Examples:

  trainwright evaluate runs/quickstart

  trainwright evaluate runs/quickstart --step 200 --data notes.txt

  trainwright evaluate ./some-model --data 'texts/*.txt' --sequence-length 512
"""


def evaluate(
    model: Annotated[str, typer.Argument(help="A run, a Hugging Face directory, or a hub id.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="File, folder or glob to score, not the run's held-out documents."),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Saved step; default the newest.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of context; default the recipe's, else 1,024.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Most rows to score.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a model on held-out text."""
    import json

    from rich.console import Console
    from rich.table import Table

    from trainwright.training.score import score

    results = score(
        model, data or [], step=step, sequence_length=sequence_length, most_rows=rows, batch=batch
    )
    if as_json:
        typer.echo(json.dumps({name: vars(result) for name, result in results.items()}))
        return
    table = Table(title=str(model), title_justify="left")
    for column in ("data", "loss", "perplexity", "bits per byte", "targets"):
        table.add_column(column, justify="left" if column == "data" else "right")
    for name, result in results.items():
        bits = "–" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        table.add_row(
            name, f"{result.loss:.4f}", f"{result.perplexity:,.2f}", bits, f"{result.targets:,}"
        )
    Console().print(table)


evaluate.__doc__ = f"{evaluate.__doc__}\n{EXAMPLE}"

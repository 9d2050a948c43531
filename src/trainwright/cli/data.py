"""`trainwright data`: what a recipe's data looks like to the model, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from trainwright.data.batches import Batches
    from trainwright.data.encode import Encoder
    from trainwright.data.opening import PreparedData
    from trainwright.recipe.schema import Recipe

LOST = {  # what became of rows of examples, in words
    "cut": "were cut to fit (`data.too_long: drop` leaves them out)",
    "too long": "are too long and left out (a larger `data.sequence_length` keeps them)",
    "bad": "are no example and left out",
}
_FEW_TARGETS = 5_000

EXAMPLE = """
Examples:

  trainwright data examples/quickstart.yaml

  trainwright data recipe.yaml data.packing=best-fit --rows 4 --split validation

  trainwright data recipe.yaml --json > data.json
"""


def data(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys to change, as key.path=value.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows to show, token by token.")] = 2,
    documents: Annotated[int, typer.Option(min=0, help="Documents to list.")] = 5,
    split: Annotated[
        Literal["train", "validation"], typer.Option(help="Which documents and rows to show.")
    ] = "train",
    plain: Annotated[
        bool, typer.Option("--plain", help="No colours, as where output is not a terminal.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a recipe's documents, tokens, packing and masks."""
    import json

    from rich.console import Console

    from trainwright.cli.token_text import print_row
    from trainwright.data.encode import Encoder
    from trainwright.data.prepare import prepare_data
    from trainwright.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    messages = Console(stderr=True)
    prepared = prepare_data(loaded, progress=lambda text: messages.print(text, style="dim"))
    encoder = Encoder(prepared.tokenizer_directory)
    shown = _of_split(prepared, split)
    if as_json:
        content = as_values(loaded, prepared, encoder, shown, rows, documents)
        typer.echo(json.dumps(content, ensure_ascii=False))
        return

    console = Console(highlight=False)
    if plain or not console.is_terminal:
        plain = True
        console = Console(highlight=False, color_system=None, width=max(console.width, 120))
    _print_sources(prepared, console)
    _print_facts(loaded, prepared, encoder, console)
    for warning in warnings(loaded, prepared, encoder):
        console.print(f"[yellow]! {warning}[/yellow]", soft_wrap=plain)
    for name, batches in shown.items():
        if documents:
            _print_documents(name, batches, documents, encoder, console)
        for row in range(min(rows, batches.rows_per_epoch)):
            console.print()
            print_row(batches, row, f"row {row} of {name}", encoder, console, plain=plain)


data.__doc__ = f"{data.__doc__}\n{EXAMPLE}"


def warnings(recipe: Recipe, prepared: PreparedData, encoder: Encoder) -> list[str]:
    """What looks wrong in a set-up that is legal."""
    train = prepared.train
    figures = train.packing_figures()
    found = []
    if figures.filled < 0.8:
        found.append(
            f"{1 - figures.filled:.0%} of the positions are padding"
            + (": try `data.packing: best-fit`" if recipe.packing == "none" else "")
        )
    if figures.rows < recipe.batch_sequences:
        found.append(
            f"an epoch has {figures.rows} rows, fewer than the {recipe.batch_sequences} of a "
            "batch: a batch holds documents several times"
        )
    for each in prepared.summary:
        for what, count in each.lost.items():
            names = ", ".join(each.lost_rows[what][:5])
            more = f" and {count - 5:,} more" if count > 5 else ""
            found.append(f"{count:,} of {each.name}'s rows {LOST[what]}: {names}{more}")
        if each.also_trained:
            found.append(
                f"{each.also_trained:,} of the {each.documents:,} documents of {each.name} that "
                "are held out are also in the training data"
            )
        if encoder.vocabulary > 1000 and each.documents and each.bytes_per_token < 2:
            found.append(
                f"{each.name} ({each.split}) has {each.bytes_per_token:.2f} bytes a token: the "
                "tokenizer does not know this kind of text"
            )
    for name, batches in prepared.validation.items():
        if batches.targets < _FEW_TARGETS:
            found.append(
                f"{name} has only {batches.targets:,} targets held out: its loss will be noisy"
            )
    if not prepared.validation:
        found.append("nothing is held out: no evaluation will tell how well the model generalises")
    return found


def as_values(
    recipe: Recipe,
    prepared: PreparedData,
    encoder: Encoder,
    shown: dict[str, Batches],
    rows: int,
    documents: int,
) -> dict[str, Any]:
    """All that the verb shows as JSON values."""
    from dataclasses import asdict

    from trainwright.cli.token_text import token_text

    def row_values(batches: Batches, row: int) -> dict[str, Any]:
        batch = batches.read([row])
        segments = batch.segment_ids
        return {
            "row": row,
            "documents": batch.documents[0],
            "input_ids": batch.input_ids[0].tolist(),
            "labels": batch.labels[0].tolist(),
            "position_ids": batch.position_ids[0].tolist(),
            "segment_ids": None if segments is None else segments[0].tolist(),
            "tokens": [token_text(encoder, token) for token in batch.input_ids[0].tolist()],
        }

    figures = {name: asdict(batches.packing_figures()) for name, batches in shown.items()}
    return {
        "sources": [
            {**asdict(each), "bytes_per_token": each.bytes_per_token} for each in prepared.summary
        ],
        "tokenizer": {
            "vocabulary": encoder.vocabulary,
            "bos": encoder.bos_id,
            "eos": encoder.eos_id,
            "pad": encoder.pad_id,
            "prefix": encoder.prefix,
            "suffix": encoder.suffix,
        },
        "packing": recipe.packing,
        "sequence_length": recipe.data.sequence_length,
        "figures": figures,
        "warnings": warnings(recipe, prepared, encoder),
        "documents": {
            name: [asdict(each) for each in batches.listed(documents)]
            for name, batches in shown.items()
        },
        "rows": {
            name: [row_values(batches, row) for row in range(min(rows, batches.rows_per_epoch))]
            for name, batches in shown.items()
        },
    }


def _of_split(prepared: PreparedData, split: str) -> dict[str, Batches]:
    from trainwright.errors import Mistake, UserError

    if split == "train":
        return {"train": prepared.train}
    if not prepared.validation:
        fix = "set `data.validation` to a share, or to sources of its own"
        raise UserError(Mistake("nothing is held out", fix, key="data.validation"))
    return prepared.validation


def _print_sources(prepared: PreparedData, console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("source", "split"):
        table.add_column(column, overflow="fold")
    for column in ("documents", "empty", "tokens", "text", "bytes/token"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in prepared.summary:
        table.add_row(
            _literal(each.name),
            each.split,
            f"{each.documents:,}",
            f"{each.dropped:,}" if each.dropped else "–",
            f"{each.tokens:,}",
            size(each.text_bytes),
            f"{each.bytes_per_token:.2f}",
        )
    console.print(table)
    console.print()


def _print_facts(
    recipe: Recipe, prepared: PreparedData, encoder: Encoder, console: Console
) -> None:
    from rich.table import Table

    from trainwright.cli.token_text import token_text

    def tokens(ids: list[int]) -> list[str]:
        return [token_text(encoder, token) for token in ids]

    document = " ".join([*tokens(encoder.prefix), "text", *tokens(encoder.suffix)])
    train = prepared.train
    figures = train.packing_figures()
    steps = train.epoch_steps()
    pad = token_text(encoder, prepared.pad_id)
    facts = {
        "tokenizer": f"{encoder.vocabulary:,} tokens; a document is: {document}; padding is {pad}",
        "rows": f"{figures.rows:,} an epoch, of {train.sequence_length:,} tokens: {steps:,} steps "
        f"of {train.batch_rows} rows",
        "packing": f"{recipe.packing}: {figures.filled:.2%} of the positions hold tokens, "
        "the rest is padding",
        "documents": f"{figures.split:,} of {train.documents:,} go over several rows (the longest "
        f"has {figures.longest:,} tokens); none is truncated",
        "targets": f"{train.targets:,} of {train.tokens:,} tokens, all but each document's first",
    }
    if train.are_examples:
        facts["tokenizer"] = f"{encoder.vocabulary:,} tokens; padding is {pad}"
        facts["documents"] = (
            f"{train.documents:,} examples, each whole in one row (the longest has "
            f"{figures.longest:,} tokens)"
        )
        facts["targets"] = f"{train.targets:,} of {train.tokens:,} tokens are trained"
    grid = Table.grid(padding=(0, 2))
    for name, text in facts.items():
        grid.add_row(f"[bold]{name}[/bold]", _literal(text))
    console.print(grid)


def _print_documents(
    name: str, batches: Batches, count: int, encoder: Encoder, console: Console
) -> None:
    from rich.table import Table

    from trainwright.cli.token_text import token_text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(f"document of {name}", overflow="fold")
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("text", justify="right", no_wrap=True)
    table.add_column("begins", no_wrap=True)
    for each in batches.listed(count):
        begins = "".join(token_text(encoder, token) for token in each.first_tokens)
        table.add_row(
            _literal(each.name), f"{each.tokens:,}", size(each.text_bytes), _literal(begins[:48])
        )
    console.print()
    console.print(table)
    if count < batches.documents:
        console.print(f"[dim]… and {batches.documents - count:,} more[/dim]")


def _literal(text: str) -> Any:
    """Text whose square brackets are not taken for markup."""
    from rich.text import Text

    return Text(text)


def size(count: int) -> str:
    """Bytes for people: "12.1 MB"."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:.1f} {unit}"
    return f"{count} B"

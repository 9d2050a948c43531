"""Tokens for people: a row as text in which borders, masks and special tokens can be seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from trainwright.data.batches import Batches
    from trainwright.data.encode import Encoder

# Two shades a document, token by token; documents alternate between the pairs.
_SHADES = (("cyan", "bright_cyan"), ("yellow", "bright_yellow"))
_BORDER = "┃"
_VISIBLE = {"\n": "⏎", "\r": "␍", "\t": "⇥"}
_MOST_TOKENS = 400  # of a row are shown, spread over its documents
_FEWEST_TOKENS = 24  # of a document
_MOST_NAMES = 6


def token_text(encoder: Encoder, token: int) -> str:
    """What a token stands for, on one line: control characters as signs, half characters as hex."""
    if token in encoder.specials:
        return encoder.specials[token]
    text = encoder.token_bytes(token).decode(errors="backslashreplace")
    return "".join(
        _VISIBLE.get(character, character if character.isprintable() else ascii(character)[1:-1])
        for character in text
    )


def print_row(
    batches: Batches, row: int, title: str, encoder: Encoder, console: Console, *, plain: bool
) -> None:
    """Print a row: its documents by name, then its tokens.

    Colours show documents and tokens, dim tokens are nobody's target in this row. `plain` uses
    signs instead: `│` between tokens, `‹ ›` around those that are not targets.
    """
    batch = batches.read([row])
    ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
    segments = [0] * len(ids) if batch.segment_ids is None else batch.segment_ids[0].tolist()
    padding = sum(segment < 0 for segment in segments)
    names = list(batch.documents[0])
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    documents = "1 document" if len(names) == 1 else f"{len(names):,} documents"
    head = Text(title, style="bold")
    head.append(
        f" · {documents} · {batch.weight:,} targets · {padding:,} padding", style="not bold"
    )
    head.append(f"\n{', '.join(names[:_MOST_NAMES])}{more}", style="not bold dim")
    console.print(head, soft_wrap=plain)

    body = Text()
    pieces = _shown(segments, len(names))
    for number, piece in enumerate(pieces):
        if isinstance(piece, str):
            body.append(piece, style="dim italic")
            continue
        segment = segments[piece]
        begins = piece == 0 or segments[piece - 1] != segment
        is_target = not begins and labels[piece - 1] == ids[piece]
        text = token_text(encoder, ids[piece])
        if begins and piece > 0:
            body.append(f" {_BORDER} ", style="bold magenta")
        elif plain and number > 0:
            body.append("│")
        if plain:
            body.append(text if is_target else f"‹{text}›")
            continue
        style = _SHADES[segment % 2][piece % 2]
        if ids[piece] in encoder.specials:
            style += " reverse"
        body.append(text, style=style if is_target else f"{style} dim")
    if padding:
        body.append(f" {_BORDER} ", style="bold magenta")
        body.append(f"[{padding:,} × {token_text(encoder, ids[-1])}]", style="dim")
    console.print(body, soft_wrap=plain)


def _shown(segments: list[int], documents: int) -> Iterator[int | str]:
    """Positions to show, without padding; where a document's middle is left out, how much of it."""
    most = max(_FEWEST_TOKENS, _MOST_TOKENS // max(documents, 1))
    begin = 0
    while begin < len(segments) and segments[begin] >= 0:
        end = begin
        while end < len(segments) and segments[end] == segments[begin]:
            end += 1
        if end - begin <= most:
            yield from range(begin, end)
        else:
            tail = most // 4
            yield from range(begin, begin + most - tail)
            yield f" … {end - begin - most:,} tokens … "
            yield from range(end - tail, end)
        begin = end

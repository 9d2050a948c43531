"""A user's mistakes on the screen: where, what, and what to write instead. No traceback."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from trainwright.errors import Mistake, UserError


def print_mistakes(error: UserError, console: Console) -> None:
    """Print every mistake in `error`, one below the other."""
    count = len(error.mistakes)
    for mistake in error.mistakes:
        console.print(_in_colour(mistake), soft_wrap=True)
    if count > 1:
        console.print(Text(f"{count} mistakes", style="bold red"))


def _in_colour(mistake: Mistake) -> Text:
    """As `str(mistake)` says it, so that logs and screen can be searched alike."""
    text = Text()
    if mistake.where:
        text.append(mistake.where, style="bold").append(": ")
    if mistake.key:
        text.append(mistake.key, style="cyan").append(": ")
    text.append(mistake.what if text else f"error: {mistake.what}", style="red")
    if mistake.fix:
        text.append("\n    fix: ", style="dim").append(mistake.fix, style="green")
    return text

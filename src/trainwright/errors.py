"""What a user got wrong, said so that they can put it right.

Every room raises `UserError` for bad input; the command line prints it without a traceback and
exits with code 2. Anything else that escapes is a fault of Trainwright and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong: what, where, and what to write instead.

    `key` is the dotted recipe key ("model.config.hidden_size") where there is one; the recipe
    loader turns it into `where` ("recipe.yaml:12"). Other rooms may set `where` themselves
    ("data.jsonl:4711").
    """

    what: str
    fix: str = ""
    key: str = ""
    where: str = ""

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.where, self.key) if part)
        text = f"{place}: {self.what}" if place else self.what
        return f"{text}\n    fix: {self.fix}" if self.fix else text


class UserError(Exception):
    """One or more mistakes in what the user gave; shown without a traceback, exit code 2."""

    def __init__(self, mistakes: str | Mistake | Iterable[Mistake], fix: str = "") -> None:
        if isinstance(mistakes, str):
            mistakes = Mistake(mistakes, fix)
        self.mistakes: tuple[Mistake, ...] = (
            (mistakes,) if isinstance(mistakes, Mistake) else tuple(mistakes)
        )
        super().__init__("\n".join(str(mistake) for mistake in self.mistakes))

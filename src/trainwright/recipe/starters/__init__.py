"""Starter recipes, commented for a newcomer; `trainwright init` writes them."""

from __future__ import annotations

import difflib
from pathlib import Path

from trainwright.errors import UserError

STARTERS = ("quickstart", "pretrain", "continue", "sft")


def starter_text(name: str) -> str:
    """The YAML of a starter. Raises `UserError` with the nearest name for one that there is not."""
    if name not in STARTERS:
        close = difflib.get_close_matches(name, STARTERS, n=1, cutoff=0.5)
        known = ", ".join(f"`{each}`" for each in STARTERS)
        fix = f"did you mean `{close[0]}`? There are {known}" if close else f"there are {known}"
        raise UserError(f"there is no starter `{name}`", fix=fix)
    return (Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8")


def starter_summary(name: str) -> str:
    """The starter's first line: what it is for."""
    return starter_text(name).splitlines()[0].removeprefix("# ")

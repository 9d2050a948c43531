"""Trainwright: one recipe, planned, trained and exported on whatever machines there are.

    from trainwright import Recipe, train, load_model, generate, export

Names are looked up on first use, so that importing the package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainwright.models.weights import save_model
    from trainwright.recipe.schema import Recipe
    from trainwright.training.api import export, generate, load_model, train

__version__ = "0.1.0"

_HOMES = {
    "Recipe": "trainwright.recipe.schema",
    "train": "trainwright.training.api",
    "load_model": "trainwright.training.api",
    "generate": "trainwright.training.api",
    "save_model": "trainwright.models.weights",
    "export": "trainwright.training.api",
}

__all__ = ["Recipe", "__version__", "export", "generate", "load_model", "save_model", "train"]


def __getattr__(name: str) -> Any:
    """The public names, from their rooms (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""A run's manifest: the recipe, the rules and the first weights' hash, signed by who started it.

The run's id is the digest of its content, so that all who name the same run mean the same rules.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from trainwright.errors import Mistake, UserError
from trainwright.recipe.schema import Recipe
from trainwright.swarm.events import Rules
from trainwright.swarm.identity import Identity
from trainwright.swarm.message import (
    RUN_BYTES,
    BadMessage,
    read_json,
    read_message,
    write_json,
    write_message,
)
from trainwright.swarm.settings import Settings
from trainwright.swarm.shared_recipe import recipe_here, shared_values

if TYPE_CHECKING:
    from trainwright.swarm.layout import Layout

MANIFEST_BYTES = 4 * 2**20
_VALUES = 2**18
_MOST_WEIGHTS = 2**45
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """What all peers of a run have alike. `genesis` is the agreed hash before round 0.

    `values` are the recipe's, as plain JSON; `salt` makes two runs of one recipe two.
    """

    starter: str
    values: dict[str, Any]
    shapes: Shapes
    settings: Settings
    rules: Rules
    genesis: str
    salt: str = field(default_factory=lambda: secrets.token_hex(8))

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        layout: Layout,
        settings: Settings,
        rules: Rules,
        genesis: str,
        starter: str,
    ) -> Manifest:
        """A new run's. Raises UserError for a recipe that cannot be shared."""
        return cls(starter, shared_values(recipe), layout.shapes, settings, rules, genesis)

    @cached_property
    def run(self) -> str:
        """The run's id: 32 hex digits of the SHA-256 of all this."""
        return hashlib.sha256(self._text()).hexdigest()[: 2 * RUN_BYTES]

    @property
    def layout(self) -> Layout:
        """Which tensor lies where in the vector of all weights."""
        from trainwright.swarm.layout import Layout  # torch, which `swarm status` does without

        return Layout(self.shapes)

    def recipe(self, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe on this machine, see `recipe_here`. Raises UserError."""
        return recipe_here(self.values, overrides, f"run-{self.run[:8]}")

    def write(self, identity: Identity) -> bytes:
        """The manifest as a message of who started the run. Raises UserError if those who join
        could not read it.
        """
        if identity.peer != self.starter:
            raise ValueError(f"the manifest is {self.starter}'s, and not {identity.peer}'s to sign")
        text = self._text()
        try:
            _read_text(text)
        except BadMessage as error:
            what = f"others could not read this recipe: {error.reason}"
            raise UserError(Mistake(what, "leave that out of the recipe")) from None
        return write_message("manifest", self.run, 0, {}, [text], identity)

    @classmethod
    def read(cls, data: bytes, *, run: str, starter: str) -> Manifest:
        """The manifest of this run in a message of its starter's. Raises BadMessage."""
        message = read_message(
            data, run=run, kind="manifest", limit=MANIFEST_BYTES, peer=starter, round=0
        )
        if len(message.planes) != 1:
            raise BadMessage("a manifest has one plane")
        found = _read_text(message.planes[0].tobytes())
        if found.run != run:
            raise BadMessage(f"it is the manifest of run {found.run}")
        if found.starter != starter:
            raise BadMessage(f"{found.starter} started that run")
        return found

    def _text(self) -> bytes:
        parts = {each.name: getattr(self, each.name) for each in fields(self)}
        parts |= {"settings": asdict(self.settings), "rules": asdict(self.rules)}
        return write_json(parts)


def _read_text(text: bytes) -> Manifest:
    tree = read_json(text, limit=MANIFEST_BYTES, values=_VALUES, lines=True)
    if not isinstance(tree, dict) or set(tree) != {each.name for each in fields(Manifest)}:
        raise BadMessage("it is not of a manifest's parts")
    if not isinstance(tree["values"], dict):
        raise BadMessage("it has no recipe")
    if not all(isinstance(tree[name], str) for name in ("starter", "genesis", "salt")):
        raise BadMessage("its starter, genesis and salt are not words")
    return Manifest(
        tree["starter"],
        tree["values"],
        _shapes(tree["shapes"]),
        _filled(Settings, tree["settings"]),
        _filled(Rules, tree["rules"]),
        tree["genesis"],
        tree["salt"],
    )


def _shapes(tree: Any) -> Shapes:
    """Names, each once, and sizes from 1 whose sum is no more than a machine could ever hold."""
    found: dict[str, tuple[int, ...]] = {}
    total = 0
    for item in tree if isinstance(tree, list) else [None]:
        match item:
            case [str(name), [*sizes]] if name not in found:
                count = 1
                for size in sizes:
                    count *= size if type(size) is int and 0 < size <= _MOST_WEIGHTS else 0
                total += count
                if not 0 < count <= _MOST_WEIGHTS or total > _MOST_WEIGHTS:
                    raise BadMessage(f"a tensor {name!r} of shape {sizes} cannot be")
                found[name] = tuple(sizes)
            case _:
                raise BadMessage("its layout is not names, each once, with shapes")
    return tuple(found.items())


def _filled(kind: type[T], tree: Any) -> T:
    """A flat dataclass of words, counts and numbers from 0."""
    types = {each.name: each.type for each in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(tree, dict) or set(tree) != set(types):
        raise BadMessage(f"its {kind.__name__.lower()} are not {', '.join(types)}")
    for name, value in tree.items():
        allowed = {"int": (int,), "float": (int, float)}.get(str(types[name]), (str,))
        if type(value) not in allowed or (not isinstance(value, str) and value < 0):
            raise BadMessage(f"its {kind.__name__.lower()} say {name} is {value!r}")
    return kind(**tree)

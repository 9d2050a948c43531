"""One configuration on its way into a recipe: tables of rules, and the bookkeeping around them.

A tool's module is a table from its keys to rules. A `Job` runs the table over the keys that a file
has and sees to it that each key gets a note: what no rule has taken up is unsupported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trainwright.errors import Mistake, UserError
from trainwright.recipe.importers.notes import Imported, Kind, Note, Tool, leaves
from trainwright.recipe.yaml_text import Document

Rule = Callable[["Job", str, Any], None]
Table = Mapping[str, Rule]
# A value of theirs as one of ours; ValueError where it cannot be.
Convert = Callable[[Any], Any]

UNKNOWN = "not known"
EMPTY = "empty"
_NOTHING: tuple[Any, ...] = (None, "", [], {})


class Job:
    """A configuration, the recipe that is made from it, and the notes taken on the way."""

    def __init__(self, tool: Tool, name: str, document: Document) -> None:
        self.tool = tool
        self.name = name
        self.document = document
        self.values: dict[str, Any] = document.value
        self.recipe: dict[str, Any] = {}
        self.notes: list[Note] = []
        self._noted: set[str] = set()

    def get(self, key: str) -> Any:
        """The value at dotted `key`; None where there is none."""
        here: Any = self.values
        for part in key.split("."):
            if isinstance(here, list) and part.isdecimal() and int(part) < len(here):
                here = here[int(part)]
            elif isinstance(here, Mapping):
                here = here.get(part)
            else:
                return None
        return here

    def has(self, key: str) -> bool:
        """Whether there is anything but emptiness at dotted `key`."""
        value = self.get(key)
        return not any(value is each or value == each for each in _NOTHING)

    def number(self, key: str, default: float | None = None) -> float | None:
        """The number at dotted `key`, or `default` where there is none; `UserError` for others."""
        if not self.has(key):
            return default
        try:
            return number(self.get(key))
        except ValueError as error:
            raise self.refusal(key, str(error), "write a number") from None

    def names(self, key: str) -> list[str]:
        """The names at dotted `key`, none where there is nothing; `UserError` for other values."""
        if not self.has(key):
            return []
        try:
            return names(self.get(key))
        except ValueError as error:
            raise self.refusal(key, str(error), "write names with commas between") from None

    def put(self, target: str, value: Any) -> None:
        """Set dotted `target` of the recipe."""
        *sections, last = target.split(".")
        here = self.recipe
        for section in sections:
            here = here.setdefault(section, {})
        here[last] = value

    def given(self, target: str) -> Any:
        """What the recipe has at dotted `target`; None where there is nothing yet."""
        here: Any = self.recipe
        for part in target.split("."):
            here = here.get(part) if isinstance(here, dict) else None
        return here

    def note(self, kind: Kind, key: str, target: str = "", reason: str = "") -> None:
        """Say what became of dotted `key`, with its value and line."""
        where = self.document.places.get(key, "")
        self.notes.append(Note(kind, key, self.get(key), target, reason, where))
        self._noted.add(key)

    def translated(self, key: str, target: str, value: Any, reason: str = "") -> None:
        """Set `target` to `value`, which means what `key` means."""
        self.put(target, value)
        self.note("translated", key, target, reason)

    def approximated(self, key: str, target: str, value: Any, reason: str) -> None:
        """Set `target` to `value`, which is near to what `key` means."""
        self.put(target, value)
        self.note("approximated", key, target, reason)

    def unsupported(self, key: str, reason: str) -> None:
        """Say why `key` has no place in the recipe."""
        self.note("unsupported", key, "", reason)

    def ignored(self, key: str, reason: str) -> None:
        """Say why nothing needs to be said in `key`'s place."""
        self.note("ignored", key, "", reason)

    def assumed(self, key: str, target: str, value: Any) -> None:
        """Set `target`, unless the file has, to the default that the other tool gives `key`."""
        if self.given(target) is None:
            self.put(target, value)
            reason = f"left out; {value!r} is {_NAMES[self.tool]}'s default"
            self.notes.append(Note("translated", key, value, target, reason))

    def refusal(self, key: str, what: str, fix: str) -> UserError:
        """The error for a configuration whose very purpose no recipe can express."""
        return UserError(Mistake(what, fix, key=key, where=self.document.place(key) or self.name))

    def is_noted(self, key: str) -> bool:
        """Whether `key` or a section around it has a note."""
        parts = key.split(".")
        return any(".".join(parts[:depth]) in self._noted for depth in range(1, len(parts) + 1))

    def run(self, table: Table, section: str = "") -> None:
        """Apply `table` to the keys of dotted `section` (the whole file if "") without a note."""
        values = self.get(section) if section else self.values
        for name in list(values) if isinstance(values, Mapping) else ():
            key = f"{section}.{name}" if section else name
            if self.is_noted(key):
                continue
            if not self.has(key):
                self.ignored(key, EMPTY)
            elif name in table:
                try:
                    table[name](self, key, self.get(key))
                except ValueError as error:  # from `number`, `truth` and `names`
                    self.unsupported(key, str(error))

    def finish(self) -> Imported:
        """The recipe with its notes in the file's order; every key without a note gets one."""
        for key in leaves(self.values):
            if not self.is_noted(key):
                # Nested lists are told of as a whole: their items mean nothing by themselves.
                self.unsupported(key, UNKNOWN)
        for mistake in self.document.mistakes:
            self.notes.append(
                Note("unsupported", mistake.key, None, "", mistake.what, mistake.where)
            )
        order = {key: index for index, key in enumerate(self.document.places)}
        last = len(order)
        self.notes.sort(key=lambda note: order.get(note.key, last))
        return Imported(self.tool, self.name, self.recipe, tuple(self.notes))


_NAMES: dict[Tool, str] = {
    "axolotl": "Axolotl",
    "llama-factory": "LLaMA-Factory",
    "torchtune": "torchtune",
    "trl": "TRL",
}


def display_name(tool: Tool) -> str:
    """The tool's name as its makers write it."""
    return _NAMES[tool]


def number(value: Any) -> float | int:
    """A number, also one in quotes (YAML 1.1 reads `1e-4` as text). ValueError for others."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        value = float(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError(f"{value!r} is not a number") from None
    return int(value) if float(value).is_integer() and abs(value) >= 1 else value


def truth(value: Any) -> bool:
    """A truth value, also as YAML 1.1 writes it (`yes`, `off`). ValueError for others."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    words = {"true": True, "yes": True, "on": True, "1": True}
    words |= {"false": False, "no": False, "off": False, "0": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError(f"{value!r} is neither true nor false")


def names(value: Any) -> list[str]:
    """A list of names, also as text with commas."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"{value!r} is not a list of names")
    return list(dict.fromkeys(item.strip() for item in items if item.strip()))


def section(value: Any) -> dict[str, Any]:
    """A section of keys. ValueError for others."""
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a section of keys")
    return value


def is_off(value: Any) -> bool:
    """Whether a value says "not used": false, 0 or none, however it is written."""
    try:
        return not truth(value)
    except ValueError:
        return value == 0 or (isinstance(value, str) and value.lower() in ("none", "null"))


def same(target: str, convert: Convert = lambda value: value, reason: str = "") -> Rule:
    """The key is `target` under another name, its value converted."""

    return lambda job, key, value: job.translated(key, target, convert(value), reason)


def near(target: str, reason: str, convert: Convert = lambda value: value) -> Rule:
    """The key is nearly `target`; `reason` says what differs."""

    return lambda job, key, value: job.approximated(key, target, convert(value), reason)


def ignored(reason: str) -> Rule:
    """The key needs nothing in the recipe, for `reason`."""
    return lambda job, key, value: job.ignored(key, reason)


def unsupported(reason: str) -> Rule:
    """The recipe cannot say this, for `reason`; where it is switched off nothing needs saying."""

    def rule(job: Job, key: str, value: Any) -> None:
        if is_off(value):
            job.ignored(key, "switched off")
        else:
            job.unsupported(key, reason)

    return rule


def when_on(rule: Rule, off: str = "switched off") -> Rule:
    """`rule` where the key's value is not false, 0 or none; else the key is ignored."""

    def either(job: Job, key: str, value: Any) -> None:
        if is_off(value):
            job.ignored(key, off)
        else:
            rule(job, key, value)

    return either


def each(keys: str, rule: Rule) -> dict[str, Rule]:
    """One rule for several keys, written with spaces between."""
    return dict.fromkeys(keys.split(), rule)

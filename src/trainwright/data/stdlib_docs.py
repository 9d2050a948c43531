"""Conversations made from the standard library's own documentation: data that is always there.

The sources of this Python are parsed, never imported. Every function, method and class that has a
docstring becomes a question or two; which, is decided by a hash of its name, so that the same
Python gives the same rows on every machine.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from trainwright.data.digests import text_hash
from trainwright.data.locate import locate
from trainwright.recipe.objective import PAIRED, Kind
from trainwright.recipe.schema import Source

RowKind = Literal["messages", "preference", "kto"]

# Programs and tables of the library rather than what one calls; they would take half the time.
_LEFT_OUT = {
    *("idlelib", "turtledemo", "lib2to3", "pydoc_data", "ensurepip", "encodings", "site-packages"),
    *("antigravity", "this", "pydoc", "turtle", "test", "msilib", "__phello__"),
}
# Decorators of what is read like a value.
_NOT_CALLED = {"property", "abstractproperty", "cached_property", "setter", "getter", "deleter"}
_SHORTEST, _LONGEST = 24, 320  # characters of a summary that is worth learning

_SYSTEM = "You answer questions about Python's standard library from its documentation, briefly."
_WHAT = (
    "What does {name} do?",
    "What is {name} for?",
    "Explain {name} in a few words.",
    "In Python, what does {name} do?",
    "Tell me what {name} does.",
)
_HOW = (
    "How do I call {name}?",
    "What is the signature of {name}?",
    "Show me the signature of {name}.",
)
_THEN_HOW = ("And how do I call it?", "What is its signature?", "Which arguments does it take?")
_WHICH = (
    'Which {kind} of the module {module} is documented as "{summary}"?',
    'The documentation of {module} says: "{summary}" Which {kind} is meant?',
)


@dataclass(frozen=True)
class Documented:
    """A function, method or class with a docstring.

    `name` is the dotted one ("textwrap.dedent"); `call` shows its arguments without self and cls;
    `summary` is the docstring's first paragraph on one line.
    """

    name: str
    module: str
    kind: str  # "function", "method" or "class"
    call: str
    summary: str


def rows_for(objective: Kind) -> Iterator[tuple[str, dict[str, Any]]]:
    """`stdlib_rows` of the kind that an objective learns from."""
    kinds: dict[Kind, RowKind] = dict.fromkeys(PAIRED, "preference")
    kinds["kto"] = "kto"
    return stdlib_rows(kinds.get(objective, "messages"))


def stdlib_rows(kind: RowKind) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a format with their names, in a fixed order.

    "messages": a conversation each, some of several turns, some with a system message.
    "preference": the right summary against one of something else in the same module, or against
    its own beginning. "kto": one of the two with its label. Raises UserError where this Python has
    no library sources.
    """
    documented = read_documented()
    others = _others(documented)
    for each, other in zip(documented, others, strict=True):
        if kind == "messages":
            yield each.name, {"messages": _conversation(each)}
        elif kind == "preference":
            yield (
                each.name,
                {
                    "prompt": _asked(each),
                    "chosen": [_said(each.summary)],
                    "rejected": [_said(_wrong(each, other))],
                },
            )
        else:
            right = _choice(each, "label", 2) == 0
            answer = each.summary if right else _wrong(each, other)
            yield each.name, {"prompt": _asked(each), "completion": [_said(answer)], "label": right}


@cache  # some 1 MB; parsing takes seconds, and a recipe may ask for several kinds of rows
def read_documented() -> tuple[Documented, ...]:
    """What the library documents, module by module; every name and every summary once."""
    located = locate(Source(kind="python-stdlib"))
    found: list[Documented] = []
    seen: set[str] = set()
    for file in located.files:
        parts = Path(located.name_of(file)).with_suffix("").parts
        if any(
            part in _LEFT_OUT or (part.startswith("_") and part != "__init__") for part in parts
        ):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        for each in _documented_in(file.read_bytes(), module):
            if not seen & {each.summary, each.name}:
                seen |= {each.summary, each.name}
                found.append(each)
    return tuple(found)


def _documented_in(source: bytes, module: str) -> Iterator[Documented]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _described(node, module, module, "function")
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            owner = f"{module}.{node.name}"
            methods = [
                each
                for each in node.body
                if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
            ]
            made = next((each.args for each in methods if each.name == "__init__"), None)
            yield from _described(node, module, module, "class", made)
            for method in methods:
                yield from _described(method, module, owner, "method")


def _described(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef,
    module: str,
    owner: str,
    kind: str,
    arguments: ast.arguments | None = None,
) -> Iterator[Documented]:
    """The node's entry, if it is public and its docstring says enough but not too much."""
    text = ast.get_docstring(node, clean=False)
    if node.name.startswith("_") or not text or _NOT_CALLED & _decorators(node):
        return
    summary = " ".join(re.split(r"\n\s*\n", inspect.cleandoc(text).strip())[0].split())
    if not _SHORTEST <= len(summary) <= _LONGEST or ">>>" in summary or summary.endswith(":"):
        return
    if not isinstance(node, ast.ClassDef):
        arguments = node.args
    is_bound = kind != "function" and "staticmethod" not in _decorators(node)
    shown = _shown(arguments, bound=is_bound)
    name = f"{owner}.{node.name}"
    yield Documented(name, module, kind, f"{name}({shown})", summary)


def _shown(arguments: ast.arguments | None, *, bound: bool) -> str:
    """Arguments as they are written; for what is bound, without the first one."""
    if arguments is None:
        return ""
    if bound:
        # `self` may be positional-only, where a method takes any keyword.
        positional = list(arguments.posonlyargs), list(arguments.args)
        (positional[0] or positional[1])[:1] = []
        arguments = ast.arguments(
            posonlyargs=positional[0],
            args=positional[1],
            vararg=arguments.vararg,
            kwonlyargs=arguments.kwonlyargs,
            kw_defaults=arguments.kw_defaults,
            kwarg=arguments.kwarg,
            defaults=arguments.defaults,
        )
    return ast.unparse(arguments)


def _decorators(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> set[str]:
    """The last names of a node's decorators: "cached_property" for `functools.cached_property`."""
    called = [each.func if isinstance(each, ast.Call) else each for each in node.decorator_list]
    return {getattr(each, "attr", getattr(each, "id", "")) for each in called}


def _conversation(each: Documented) -> list[dict[str, str]]:
    kind = _choice(each, "kind", 6)
    if kind == 0:
        turns = [*_asked(each, _HOW), _said(each.call)]
    elif kind == 1:
        turns = [*_asked(each, _WHICH), _said(each.name)]
    else:
        turns = [*_asked(each), _said(each.summary)]
        if kind == 2:
            turns += [*_asked(each, _THEN_HOW), _said(each.call)]
    if _choice(each, "system", 5) == 0:
        turns.insert(0, {"role": "system", "content": _SYSTEM})
    return turns


def _asked(each: Documented, phrasings: Sequence[str] = _WHAT) -> list[dict[str, str]]:
    phrasing = phrasings[_choice(each, phrasings[0], len(phrasings))]
    question = phrasing.format(
        name=each.name, kind=each.kind, module=each.module, summary=each.summary
    )
    return [{"role": "user", "content": question}]


def _said(answer: str) -> dict[str, str]:
    return {"role": "assistant", "content": answer}


def _wrong(each: Documented, other: Documented) -> str:
    """The summary of something else, or the beginning of the right one."""
    words = each.summary.split()
    if _choice(each, "wrong", 3) == 0 and len(words) >= 4:
        return " ".join(words[: len(words) // 2])
    return other.summary


def _others(documented: Sequence[Documented]) -> list[Documented]:
    """For each entry another one: the next of its module, or of the library if it is alone."""
    by_module: dict[str, list[int]] = {}
    for number, each in enumerate(documented):
        by_module.setdefault(each.module, []).append(number)
    others = []
    for number, each in enumerate(documented):
        beside = by_module[each.module]
        place = beside[(beside.index(number) + 1) % len(beside)]
        others.append(documented[place if place != number else number - 1])
    return others


def _choice(each: Documented, purpose: str, count: int) -> int:
    return text_hash(f"{purpose}:{each.name}") % count

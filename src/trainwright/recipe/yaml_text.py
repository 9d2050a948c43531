"""YAML text to plain values, with the line of every key, and all that is wrong with it.

YAML 1.2: `3e-4` is a number, `yes` and `off` are text, a date is text. Nothing is constructed but
sections, lists, text, numbers, truth values and null, so a document cannot run code.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.resolver import VersionedResolver

from trainwright.errors import Mistake, UserError
from trainwright.recipe.describe import KeyPath, dotted

_TAG = "tag:yaml.org,2002:"
_KINDS = {"null", "bool", "int", "float", "str", "timestamp"}
_MOST_NODES = 100_000
_ENVIRONMENT = re.compile(r"(\$?)\$\{env:([^}:]*)(?::-([^}]*))?\}")


@dataclass
class Document:
    """A YAML document as plain values.

    `places` says where each dotted key stands ("training.steps": "recipe.yaml:12"), and `unfilled`
    are the keys whose environment variable is not set.
    """

    value: Any = None
    places: dict[str, str] = field(default_factory=dict)
    unfilled: set[str] = field(default_factory=set)
    mistakes: list[Mistake] = field(default_factory=list)

    def place(self, key: str) -> str:
        """Where dotted `key` is given, or else the nearest section around it; "" if nowhere."""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places.get(key, "")


def parse(text: str, name: str) -> Document:
    """Read one YAML document. `name` stands before the line numbers in every message.

    Raises `UserError` where the YAML itself is broken; what can be read past (a duplicate key, an
    unset environment variable) goes into `Document.mistakes`.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(text)
        reader = _Reader(name)
        if node is not None:
            reader.document.value = reader.read(node, ())
    except (YAMLError, RecursionError) as error:
        raise UserError(_explain(error, text, name)) from None
    return reader.document


def parse_value(text: str, name: str) -> Any:
    """One value as it would stand behind a key: `1e-3`, `[a, b]`, `{path: x}`, plain text.

    Raises `UserError` where it is broken.
    """
    try:
        document = parse(text, name)
    except UserError as error:
        what = f"the value `{text}` is not valid YAML"
        raise UserError(Mistake(what, "put it in quotes", where=name)) from error
    if document.mistakes:
        raise UserError(Mistake(each.what, each.fix, where=name) for each in document.mistakes)
    return document.value


class _Reader:
    """Turns a tree of YAML nodes into values, noting lines and mistakes as it goes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.document = Document()
        self.nodes = 0
        self.open: set[int] = set()
        self.resolver = VersionedResolver(version="1.2")

    def where(self, node: Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def note(self, what: str, fix: str, path: KeyPath, node: Node) -> None:
        mistake = Mistake(what, fix, key=dotted(path), where=self.where(node))
        self.document.mistakes.append(mistake)

    def read(self, node: Node, path: KeyPath) -> Any:
        self.nodes += 1
        # Aliases let a short text stand for a huge or an endless one.
        if self.nodes > _MOST_NODES or id(node) in self.open:
            raise YAMLError("aliases unfold without end")
        self.document.places.setdefault(dotted(path), self.where(node))
        if isinstance(node, ScalarNode):
            return self.scalar(node, path)
        self.open.add(id(node))
        try:
            if isinstance(node, MappingNode):
                return self.mapping(node, path)
            return [self.item(child, (*path, index)) for index, child in enumerate(node.value)]
        finally:
            self.open.discard(id(node))

    def item(self, node: Node, path: KeyPath) -> Any:
        self.document.places[dotted(path)] = self.where(node)
        return self.read(node, path)

    def mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                self.note("a key must be plain text", "write `key: value`", path, key_node)
                continue
            here = (*path, key)
            if key == "<<" and key_node.style is None:
                merged |= self.merge(value_node, path)
                continue
            if key in lines:
                self.note(
                    f"`{key}` is given twice (first on line {lines[key]})",
                    "keep one of the two",
                    here,
                    key_node,
                )
                continue
            lines[key] = key_node.start_mark.line + 1
            self.document.places[dotted(here)] = self.where(key_node)
            result[key] = self.read(value_node, here)
        return {**merged, **result}

    def merge(self, node: Node, path: KeyPath) -> dict[str, Any]:
        """`<<: *base` and `<<: [*one, *two]`: keys that the section itself does not give."""
        sources = [node] if isinstance(node, MappingNode) else node.value
        result: dict[str, Any] = {}
        for source in sources:
            if not isinstance(source, MappingNode):
                self.note("`<<` merges sections", "write `<<: *name`", path, node)
                continue
            result = {**self.read(source, path), **result}
        return result

    def scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        tag, text = str(node.tag), node.value
        if tag.removeprefix(_TAG) not in _KINDS:
            short = tag.replace(_TAG, "!!")
            self.note(f"the YAML tag `{short}` is not read here", "leave it out", path, node)
            return text
        filled = self.environment(text, node, path)
        if node.style is None and filled != text:
            tag = str(self.resolver.resolve(ScalarNode, filled, (True, False)))
        return _plain(tag.removeprefix(_TAG), filled)

    def environment(self, text: str, node: Node, path: KeyPath) -> str:
        """Fill `${env:NAME}` and `${env:NAME:-default}`; `$${env:` stands for itself."""

        def fill(match: re.Match[str]) -> str:
            escaped, name, default = match.groups()
            if escaped:
                return match[0][1:]
            # As in a shell, `:-` also fills in for a variable that is set but empty.
            value = os.environ.get(name) or default
            if value is None and name not in os.environ:
                self.document.unfilled.add(dotted(path))
                self.note(
                    f"the environment variable `{name}` is not set",
                    f"set it, or give a default: `${{env:{name}:-default}}`",
                    path,
                    node,
                )
            return value or ""

        return _ENVIRONMENT.sub(fill, text)


def _plain(kind: str, text: str) -> Any:
    """A scalar of the YAML 1.2 core schema."""
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            digits = text.replace("_", "")
            based = re.fullmatch(r"[-+]?0[xbo].*", digits)
            return int(digits, 0) if based else int(digits)
        if kind == "float":
            return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        pass  # "1__" and the like resolve as numbers but are none
    return text


# What the parser says, and what a person should hear. The first that fits is taken.
_EXPLANATIONS = (
    ("found duplicate", "a key is given twice", "keep one of the two"),
    ("aliases unfold", "the aliases (`*name`) unfold without end", "write the values out"),
    ("maximum recursion", "brackets or lists are nested too deeply", "check the brackets"),
    (
        "mapping values are not allowed",
        "a `:` stands where no key can be",
        "put text that has `: ` in it in quotes, or check the indentation of the line above",
    ),
    (
        "sequence entries are not allowed",
        "a list begins on the same line as its key",
        "put each `- item` on a line of its own below the key",
    ),
    (
        "unknown escape",
        "in double quotes a backslash begins an escape",
        "use single quotes, or write the backslash twice",
    ),
    (
        "could not find expected ':'",
        "a line is neither `key: value` nor part of a list",
        "write `key: value`, with a space after the colon",
    ),
    ("did not find expected", "the structure breaks off here", "check indentation and brackets"),
    ("found unexpected end of stream", "a quote is opened and never closed", "close the quote"),
    ("while scanning a quoted", "a quote is opened and never closed", "close the quote"),
    ("while parsing a flow", "a bracket is opened and not closed rightly", "check the brackets"),
    (
        "while parsing a block",
        "the line does not line up with the lines above it",
        "indent the keys of one section alike",
    ),
    ("undefined alias", "an alias (`*name`) has no anchor (`&name`)", "define the anchor above it"),
    ("but found another document", "there is more than one document", "keep one; remove `---`"),
    (
        "cannot start any token",
        "a value begins with a character that YAML keeps for itself",
        "put the value in quotes",
    ),
    ("special characters", "the file holds control characters", "save it as plain UTF-8 text"),
)


def _explain(error: Exception, text: str, name: str) -> Mistake:
    """A parser's error as one message of ours, with its line."""
    said = str(error)
    line = 0
    if isinstance(error, MarkedYAMLError):
        said = f"{error.problem or ''} {error.context or ''}"
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 0
        # An unclosed quote or bracket shows at the end of the file but lies where it was opened.
        opened = error.context and ("quoted" in error.context or "flow" in error.context)
        if opened and error.context_mark is not None:
            line = error.context_mark.line + 1
    where = f"{name}:{line}" if line else name
    lines = text.splitlines()
    faulty = lines[line - 1] if 0 < line <= len(lines) else ""
    if "\t" in faulty[: len(faulty) - len(faulty.lstrip())]:
        return Mistake("the line is indented with a tab", "indent with spaces", where=where)
    above = lines[line - 2] if 1 < line <= len(lines) else ""
    if "mapping values are not allowed" in said and re.match(r"\s*[\w.-]+(:[^\s:]+)?$", above):
        # The parser only notices on the next line that this one was no `key: value`.
        return Mistake(
            f"broken YAML: `{above.strip()}` is not `key: value`",
            "write a colon and a space between key and value",
            where=f"{name}:{line - 1}",
        )
    for sign, what, fix in _EXPLANATIONS:
        if sign in said:
            return Mistake(f"broken YAML: {what}", fix, where=where)
    return Mistake(f"broken YAML: {said.strip()}", "check the line and those above", where=where)

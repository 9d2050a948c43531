"""Conversations from the standard library, held against what `inspect` says of the real objects."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from itertools import groupby, islice

import pytest

from trainwright.data.examples import Conversation
from trainwright.data.formats import example_of, recognise
from trainwright.data.stdlib_docs import read_documented, rows_for, stdlib_rows

# Modules that do nothing when they are imported.
_HARMLESS = ("textwrap", "json.decoder", "statistics", "shlex", "string", "difflib", "fractions")


@pytest.fixture(scope="module")
def documented():
    before = set(sys.modules)
    entries = read_documented()
    # Sources are parsed: nothing that is described is imported for it.
    assert not {each.module for each in entries} & (set(sys.modules) - before)
    return entries


def test_as_inspect_sees_it(documented):
    compared = 0
    for each in documented:
        if each.module not in _HARMLESS:
            continue
        thing = importlib.import_module(each.module)
        for part in each.name.removeprefix(f"{each.module}.").split("."):
            thing = inspect.getattr_static(thing, part)
        thing = getattr(thing, "__func__", thing)
        text = inspect.cleandoc(thing.__doc__)
        assert each.summary.split() == re.split(r"\n\s*\n", text.strip())[0].split()
        if each.kind != "class":
            parameters = list(inspect.signature(thing).parameters)
            if each.kind == "method":
                parameters = parameters[1:]
            shown = each.call.removeprefix(each.name)
            [function] = ast.parse(f"def f{shown}: pass").body
            given = function.args
            some = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
            assert [one.arg for one in some if one is not None] == parameters
        compared += 1
    assert compared >= 40


def test_there_is_enough_of_it(documented):
    assert len(documented) >= 2000
    assert len({each.name for each in documented}) == len(documented)
    assert len({each.summary for each in documented}) == len(documented)
    assert all(24 <= len(each.summary) <= 320 for each in documented)
    assert not any(part.startswith("_") for each in documented for part in each.name.split("."))


def test_rows_are_understood(documented):
    by_name = {each.name: each for each in documented}
    answers = {"what": 0, "how": 0, "which": 0}
    systems = several = 0
    for name, row in stdlib_rows("messages"):
        [conversation] = example_of(row).sequences
        assert isinstance(conversation, Conversation)
        each = by_name[name]
        said = [m["content"] for m in conversation.messages if m["role"] == "assistant"]
        answers["what"] += said[0] == each.summary
        answers["how"] += each.call in said
        answers["which"] += said == [name]
        assert set(said) <= {each.summary, each.call, name}
        systems += conversation.messages[0]["role"] == "system"
        several += len(said) > 1
    rows = len(documented)
    assert answers["what"] > rows / 2 and answers["how"] > rows / 5 and answers["which"] > rows / 9
    assert rows / 7 < systems < rows / 3 and rows / 9 < several < rows / 4


def test_the_wrong_answer_is_wrong(documented):
    by_name = {each.name: each for each in documented}
    summaries = {each.summary for each in documented}
    cut = 0
    for name, row in stdlib_rows("preference"):
        assert recognise(row) == "preference"
        chosen, rejected = (s.messages[-1]["content"] for s in example_of(row).sequences)
        assert chosen == by_name[name].summary != rejected
        cut += chosen.startswith(rejected)
        assert chosen.startswith(rejected) or rejected in summaries
    assert len(documented) / 5 < cut < len(documented) / 2
    assert next(rows_for("dpo")) == next(stdlib_rows("preference"))
    assert next(rows_for("kto")) == next(stdlib_rows("kto"))
    assert next(rows_for("sft")) == next(stdlib_rows("messages"))
    labels = {True: 0, False: 0}
    for name, row in stdlib_rows("kto"):
        example = example_of(row)
        answer = example.sequences[0].messages[-1]["content"]
        assert example.label is (answer == by_name[name].summary)
        labels[example.label] += 1
    assert min(labels.values()) > len(documented) / 3


def test_the_same_every_time(documented):
    once = list(islice(stdlib_rows("messages"), 50))
    assert once == list(islice(stdlib_rows("messages"), 50))
    assert len({str(row) for _, row in once}) == 50
    # Whatever was read before: the order is that of the files' names.
    modules = [module for module, _ in groupby(each.module for each in documented)]
    assert len(set(modules)) == len(modules)
    files = [module.split(".") for module in modules if "." not in module]
    assert files == sorted(files)

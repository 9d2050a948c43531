"""Rows out of files of every kind; broken files and what is said of them."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

from tests.data.expected_formats import assistant, call, conversation, user
from trainwright.data.formats import example_of
from trainwright.data.formats_rows import read_rows
from trainwright.errors import UserError

FOUR = [{"text": "one"}, {"text": 'two, "quoted"\nand a line'}, {"text": "drei ß"}, {"text": "4"}]


def test_one_content_in_every_kind_of_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_text("\ufeff\n" + "\n\n".join(map(json.dumps, FOUR)) + "\n")
    (tmp_path / "wrong_ending.json").write_text("\n".join(map(json.dumps, FOUR)))
    (tmp_path / "compact.json").write_text(json.dumps(FOUR))
    (tmp_path / "pretty.json").write_text("\n" + json.dumps(FOUR, indent=2, ensure_ascii=False))
    with gzip.open(tmp_path / "a.json.gz", "wt") as packed:
        packed.write(json.dumps(FOUR))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text"])
        writer.writeheader()
        writer.writerows(FOUR)
    table = pyarrow.Table.from_pylist(FOUR)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as arrow:
        arrow.write_table(table)
    names = {}
    for file in tmp_path.iterdir():
        found = list(read_rows(file))
        assert [row for _, row in found] == FOUR, file.name
        names[file.name] = [name for name, _ in found]
    assert names["a.jsonl"] == ["a.jsonl:2", "a.jsonl:4", "a.jsonl:6", "a.jsonl:8"]
    assert names["wrong_ending.json"][3] == "wrong_ending.json:4"
    assert names["pretty.json"] == [f"pretty.json[{i}]" for i in range(4)]
    assert names["a.csv"] == ["a.csv:2", "a.csv:3", "a.csv:5", "a.csv:6"]
    assert names["a.parquet"][3] == "a.parquet[3]"


def test_files_of_one_conversation(tmp_path):
    turns = [user("a"), assistant("b")]
    for content in (json.dumps({"messages": turns}, indent=1), json.dumps(turns, indent=1)):
        (tmp_path / "one.json").write_text(content)
        [(name, row)] = read_rows(tmp_path / "one.json", name="shown")
        assert name == "shown"
        assert example_of(row).sequences == (conversation(*turns, first=1),)
    (tmp_path / "lists.jsonl").write_text(f"{json.dumps(turns)}\n{json.dumps(turns)}\n")
    assert [row for _, row in read_rows(tmp_path / "lists.jsonl")] == [turns, turns]


def test_nulls_of_parquet_are_no_keys(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": [user("a"), assistant("", tool_calls=[{"name": "f", "arguments": {"x": 1}}])]},
        {"messages": [user("a"), assistant("", tool_calls=[{"name": "g", "arguments": {"y": 2}}])]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    examples = [example_of(row) for _, row in read_rows(tmp_path / "a.parquet")]
    assert [example.sequences[0].messages[1]["tool_calls"] for example in examples] == [
        [call("f", x=1)],
        [call("g", y=2)],
    ]


@pytest.mark.parametrize(
    ("file", "content", "where", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', ":2", "is not valid JSON"),
        ("a.jsonl", '{"text": "a",}\n{"text": "b"}\n', ":1", "is not valid JSON"),
        ("a.json", '[\n{"text": "a"},\n{"text" "b"}\n]', ":3", "in element 1"),
        ("a.json", '[\n{"text": "a"}\n{"text": "b"}]', ":3", "is missing after element 0"),
        ("a.json", '[{"text": "a"}] x', ":1", "more text after the end"),
        ("a.json", "", "", "holds no rows"),
        ("a.csv", 'a,b\n1,2\n"x,3\n', "", "is not valid CSV"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", ":3", "has 3 fields, but the first line names 2"),
        ("a.parquet", "no parquet", "", "cannot be read"),
    ],
)
def test_broken_files(tmp_path, file, content, where, words):
    path = tmp_path / file
    path.write_text(content)
    with pytest.raises(UserError) as refused:
        list(read_rows(path))
    assert words in str(refused.value)
    assert f"{path}{where}" in str(refused.value)

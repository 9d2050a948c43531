"""The verb `data`: what it prints of a made-up recipe, plain, in colour and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.data.made import TEXTS, write_texts
from trainwright.cli.data import data
from trainwright.errors import UserError

app = typer.Typer()
app.command()(data)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    write_texts(folder, [*TEXTS, ""])
    path = folder / "recipe.yaml"
    path.write_text(
        """
model: {family: llama, preset: 4m}
tokenizer: bytes
data: {sources: [texts], validation: 0.25, sequence_length: 48, cache: cache, shuffle: false}
training: {steps: 10, batch_sequences: 4}
"""
    )
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_plain(recipe):
    shown = run(recipe, "--rows", 3)
    assert "texts   train" in shown and "texts   validation" in shown
    assert "259 tokens; a document is: <s> text </s>; padding is <pad>" in shown
    assert "concat: " in shown and "documents  " in shown and "targets " in shown
    assert "document of train" in shown and "000.txt" in shown
    # The first row, token by token: BOS is nobody's target, the border is marked, then a new BOS.
    first = shown.split("row 0 of train")[1]
    assert "‹<s>›│d│e│f│ │a│d│d│(│a│,│ │b│)│:│⏎│ │ │" in first
    assert "│</s> ┃ ‹<s>›│S│t│r│a│\\xc3│\\x9f│e" in first
    assert "\x1b" not in shown


def test_padding_is_shown_in_short(recipe):
    shown = run(recipe, "data.packing=none", "--rows", 1)
    assert "14 padding" in shown and "┃ [14 × <pad>]" in shown
    assert shown.count("<pad>") == 2  # once in the facts, once in the row
    sparse = run(recipe, "data.packing=none", "data.sequence_length=600", "--rows", 0)
    assert "% of the positions are padding: try `data.packing: best-fit`" in sparse


def test_long_documents_are_shown_in_part(recipe):
    shown = run(recipe, "data.sequence_length=600", "--rows", 1, "--documents", 0)
    row = shown.split("row 0 of train")[1]
    assert " tokens … " in row and "document of train" not in shown
    assert row.count("┃") >= 3


def test_validation_rows(recipe):
    shown = run(recipe, "--split", "validation", "--rows", 1)
    assert "row 0 of validation" in shown and "of train" not in shown.split("targets")[1]
    with pytest.raises(UserError, match="nothing is held out"):
        run(recipe, "data.validation=0", "--split", "validation")


def test_colours(recipe, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = run(recipe, "--rows", 1)
    assert "\x1b[7;2;36m<s>" in coloured or "\x1b[2;7;36m<s>" in coloured  # dim: no target
    assert "\x1b[36m" in coloured and "\x1b[96m" in coloured  # two shades of the first document
    assert "\x1b[1;35m ┃ " in coloured and "\x1b[93m" in coloured  # a border, and the next one's
    assert "\x1b" not in run(recipe, "--rows", 1, "--plain")


def test_json(recipe):
    values = json.loads(run(recipe, "--json", "--rows", 2, "--documents", 3))
    assert [each["split"] for each in values["sources"]] == ["train", "validation"]
    assert values["sources"][0]["dropped"] == 1
    assert values["tokenizer"] == {
        "vocabulary": 259,
        "bos": 256,
        "eos": 257,
        "pad": 258,
        "prefix": [256],
        "suffix": [257],
    }
    rows = values["rows"]["train"]
    assert len(rows) == 2 and len(rows[0]["input_ids"]) == 48
    assert rows[0]["tokens"][:4] == ["<s>", "d", "e", "f"]
    assert rows[0]["labels"][0] == ord("d") and -100 in rows[0]["labels"]
    assert [each["name"] for each in values["documents"]["train"]][:1] == ["000.txt"]
    assert values["figures"]["train"]["filled"] > 0.9


def test_a_leak_is_told(recipe, tmp_path):
    (tmp_path / "copy.txt").write_bytes(TEXTS[0].encode())
    shown = run(recipe, f"data.validation=[{tmp_path / 'copy.txt'}]")
    assert "1 of the 1 documents of copy that are held out are also in the training data" in shown


def test_too_little_data_is_told(recipe):
    shown = run(recipe, "training.batch_sequences=100", "--rows", 0)
    assert "fewer than the 100 of a batch" in shown
    assert "validation has only" in shown and "will be noisy" in shown
    assert "nothing is held out" in run(recipe, "data.validation=0", "--rows", 0)


@pytest.mark.shared
def test_an_unsuited_tokenizer_is_told(recipe, shared, tmp_path):
    (tmp_path / "odd.txt").write_text("ꙮ꙰꙱ ⳁⲀⲁ " * 500)
    shown = run(
        recipe,
        f"tokenizer={shared / 'tokenizers' / 'smollm2'}",
        f"data.sources=[{tmp_path / 'odd.txt'}]",
        "data.validation=0",
    )
    assert "does not know this kind of text" in shown


def test_help_has_an_example():
    shown = run("--help")
    assert "trainwright data recipe.yaml" in shown and "--split" in shown

"""Every kind of mistake in a recipe: its line, its key, what is wrong and what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainwright.errors import UserError
from trainwright.recipe.load import load_recipe

# A whole recipe with a marker on each line that a case replaces.
BASE = """\
name: good
model:
  family: llama
  preset: 4m
tokenizer: bytes
data:
  sources:
    - python-stdlib
  sequence_length: 64
training:
  steps: 10
  batch_sequences: 4
optimizer:
  name: adamw
  learning_rate: 1e-3
schedule: cosine
"""

# What is replaced, by what, the line of the mistake, its key, and what the message must say.
CASES: dict[str, tuple[str, str, int, str, list[str]]] = {
    "unknown key, near one": (
        "  preset: 4m", "  presett: 4m\n  preset: 4m", 4, "model.presett",
        ["unknown key `presett`", "did you mean `preset`?"],
    ),
    "unknown key, other trainers' name": (
        "name: good", "name: good\nlr: 3e-4", 2, "lr",
        ["unknown key `lr`", "here it is called `optimizer.learning_rate`"],
    ),
    "unknown key, belongs elsewhere": (
        "  steps: 10", "  steps: 10\n  weight_decay: 0.1", 12, "training.weight_decay",
        ["unknown key", "it belongs elsewhere: `optimizer.weight_decay`"],
    ),
    "unknown key, near nothing": (
        "  steps: 10", "  steps: 10\n  zzz: 1", 12, "training.zzz",
        ["unknown key `zzz`", "the keys here are `steps`"],
    ),
    "unknown key, other trainers' parallelism": (
        "schedule: cosine", "schedule: cosine\nparallel: {tensor_parallel_size: 2}", 17,
        "parallel.tensor_parallel_size", ["here it is called `parallel.tp`"],
    ),
    "a stage of ZeRO that there is not": (
        "schedule: cosine", "schedule: cosine\nparallel: {zero: 4}", 17, "parallel.zero",
        ["expected `1`, `2` or `3`, found `4`", "`zero: 3`"],
    ),
    "a pipeline schedule, misspelt": (
        "schedule: cosine", "schedule: cosine\nparallel: {schedule: zero-bubble}", 17,
        "parallel.schedule", ["did you mean `zero_bubble`?"],
    ),
    "recompute, neither a name nor a share": (
        "  steps: 10", "  steps: 10\n  recompute: 1.5", 12, "training.recompute",
        ["expected `none`, `full`, `selective`, a number from 0 to 1 or `auto`", "found `1.5`"],
    ),
    "recompute of a stage": (
        "schedule: cosine", "schedule: cosine\nparallel: {recompute_by_stage: [full, all]}", 17,
        "parallel.recompute_by_stage.1", ["`none`, `full`, `selective` or a number"],
    ),
    "a stage without layers": (
        "schedule: cosine", "schedule: cosine\nparallel: {stage_layers: [4, 0]}", 17,
        "parallel.stage_layers.1", ["expected a whole number above 0"],
    ),
    "gradient accumulation": (
        "  steps: 10", "  steps: 10\n  gradient_accumulation_steps: 4", 12,
        "training.gradient_accumulation_steps",
        ["`training.batch_sequences` is the whole batch", "parallel.micro_batch"],
    ),
    "dotted key in the file": (
        "name: good", "name: good\ntraining.precision: fp32", 2, "training.precision",
        ["unknown key", "write `precision:` inside `training:`"],
    ),
    "text for a number": (
        "  steps: 10", "  steps: many", 11, "training.steps",
        ["expected a whole number above 0", 'found the text "many"', "`steps: 1000`"],
    ),
    "fraction for a whole number": (
        "  steps: 10", "  steps: 10.5", 11, "training.steps",
        ["expected a whole number above 0", "found `10.5`"],
    ),
    "number out of bounds": (
        "  sequence_length: 64", "  sequence_length: -64", 9, "data.sequence_length",
        ["expected a whole number above 0", "found `-64`", "`sequence_length: 1024`"],
    ),
    "not finite": (
        "  learning_rate: 1e-3", "  learning_rate: .inf", 15, "optimizer.learning_rate",
        ["expected a number above 0", "found `inf`"],
    ),
    "true for a number": (
        "  steps: 10", "  steps: true", 11, "training.steps",
        ["true and false are not numbers"],
    ),
    "number for text": (
        "name: good", "name: 2024", 1, "name",
        ["expected text", "found `2024`", '`"2024"`'],
    ),
    "name with a space": (
        "name: good", "name: my run", 1, "name",
        ["letters, digits, dots, dashes and underscores", 'found the text "my run"'],
    ),
    "none of the choices, near one": (
        "  name: adamw", "  name: adamv", 14, "optimizer.name",
        ["`muon`, `adamw-8bit`, `paged-adamw`", "did you mean `adamw`?"],
    ),
    "none of the choices in a shorthand": (
        "schedule: cosine", "schedule: cosinus", 16, "schedule.name",
        ["expected `cosine`, `linear`, `constant` or `wsd`", "did you mean `cosine`?"],
    ),
    "union of number and word": (
        "schedule: cosine", "parallel:\n  workers: lots", 17, "parallel.workers",
        ["expected a whole number above 0 or `auto`", 'found the text "lots"', "`workers: auto`"],
    ),
    "union of number and list": (
        "  sequence_length: 64", "  sequence_length: 64\n  validation: some", 10,
        "data.validation",
        ["expected a number from 0 to below 1 or a list of sources", 'found the text "some"'],
    ),
    "inside the list branch of a union": (
        "  sequence_length: 64", "  sequence_length: 64\n  validation:\n    - pth: x", 11,
        "data.validation.0.pth",
        ["unknown key `pth`", "did you mean `path`?"],
    ),
    "text for a list": (
        "schedule: cosine", "evaluation: {samples: {prompts: 'Hello, you'}}", 16,
        "evaluation.samples.prompts",
        ["expected a list of texts", '`prompts: ["Hello, you"]`'],
    ),
    "list of the wrong length": (
        "  name: adamw", "  name: adamw\n  betas: [0.9]", 15, "optimizer.betas",
        ["expected a list of 2 numbers from 0 to below 1", "`betas: [0.9, 0.95]`"],
    ),
    "item of the wrong type": (
        "schedule: cosine", "tracking:\n  to: [tensorbord]", 17, "tracking.to.0",
        ["expected `tensorboard`, `wandb` or `trackio`", "did you mean `tensorboard`?"],
    ),
    "list for a section": (
        "schedule: cosine", "checkpoint: [1, 2]", 16, "checkpoint",
        ["expected a section of keys", "found a list of 2"],
    ),
    "empty list of sources": (
        "    - python-stdlib", "    []", 7, "data.sources",
        ["expected a list of sources", "found an empty list"],
    ),
    "source without a path": (
        "    - python-stdlib", "    - kind: jsonl", 8, "data.sources.0",
        ["the source has no `path`", "kind: python-stdlib"],
    ),
    "weight for some sources only": (
        "    - python-stdlib", "    - {kind: python-stdlib, weight: 2}\n    - a.txt", 9,
        "data.sources.1",
        ["this source has no `weight`", "every source or to none"],
    ),
    "pretrained and new": (
        "  family: llama", "  family: llama\n  path: ./x", 3, "model.family",
        ["exclude each other", "keep one of them"],
    ),
    "new without a shape": (
        "  preset: 4m\n", "", 2, "model",
        ["the new llama model has no shape", "`preset: 4m`"],
    ),
    "two lengths": (
        "  steps: 10", "  steps: 10\n  tokens: 5000", 12, "training.tokens",
        ["`steps` and `tokens` all say how long", "keep one"],
    ),
    "no length": (
        "  steps: 10\n", "", 10, "training",
        ["nothing says how long to train", "`steps: 1000`"],
    ),
    "two batches": (
        "  batch_sequences: 4", "  batch_sequences: 4\n  batch_tokens: 256", 13,
        "training.batch_tokens",
        ["both give the batch", "keep one"],
    ),
    "key given twice": (
        "name: good", "name: good\nname: other", 2, "name",
        ["`name` is given twice (first on line 1)"],
    ),
    "environment variable not set": (
        "  steps: 10", "  steps: ${env:TRAINWRIGHT_NOT_SET}", 11, "training.steps",
        ["`TRAINWRIGHT_NOT_SET` is not set", "${env:TRAINWRIGHT_NOT_SET:-default}"],
    ),
    "key that is no text": (
        "name: good", "? [a, b]\n: 1", 1, "",
        ["a key must be plain text"],
    ),
    "YAML tag": (
        "name: good", "name: !!python/object:os.system good", 1, "name",
        ["the YAML tag `!!python/object:os.system` is not read"],
    ),
}  # fmt: skip


def mistakes_of(folder: Path, text: str, *overrides: str) -> UserError:
    file = folder / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(file, overrides)
    return caught.value


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_mistake_names_line_key_and_fix(
    case: tuple[str, str, int, str, list[str]], tmp_path: Path
) -> None:
    old, new, line, key, says = case
    assert BASE.count(old) == 1
    error = mistakes_of(tmp_path, BASE.replace(old, new))
    [mistake] = error.mistakes
    assert mistake.where == f"{tmp_path / 'recipe.yaml'}:{line}"
    assert mistake.key == key
    assert mistake.fix
    for words in says:
        assert words in str(mistake)
    for jargon in ("Input should", "function-", "constrained", "pydantic", "Value error"):
        assert jargon not in str(mistake)


def test_sections_that_are_missing(tmp_path: Path) -> None:
    error = mistakes_of(tmp_path, "name: bare\n")
    assert [(each.key, each.what) for each in error.mistakes] == [
        ("model", "`model` is missing"),
        ("training", "`training` is missing"),
    ]
    assert "`model: {family: llama, preset: 4m}`" in error.mistakes[0].fix
    assert "`training: {steps: 1000}`" in error.mistakes[1].fix


# Broken YAML: text, line, what the message says.
BROKEN = {
    "tab": ("model:\n\tfamily: llama\n", 2, "indented with a tab"),
    "two colons": ("name: a: b\n", 1, "a `:` stands where no key can be"),
    "no space after the colon": ("seed:3\nname: a\n", 1, "`seed:3` is not `key: value`"),
    "open quote": ("seed: 1\nname: 'a\nmodel: 3\n", 2, "quote is opened and never closed"),
    "open bracket": ("seed: 1\nname: [a\nmodel: 3\n", 2, "a bracket is opened"),
    "indentation": ("model:\n    path: x\n  family: y\n", 3, "does not line up"),
    "list on the key's line": ("data: - x\n", 1, "list begins on the same line"),
    "no key": ("name: x\nhello\n", 3, "neither `key: value` nor part of a list"),
    "reserved character": ("name: @x\n", 1, "a character that YAML keeps for itself"),
    "unknown alias": ("name: *x\n", 1, "has no anchor"),
    "two documents": ("name: x\n---\nname: y\n", 2, "more than one document"),
    "backslash": ('name: "a\\q"\n', 1, "a backslash begins an escape"),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=list(BROKEN))
def test_broken_yaml_is_told_with_its_line(case: tuple[str, int, str], tmp_path: Path) -> None:
    text, line, says = case
    [mistake] = mistakes_of(tmp_path, text).mistakes
    assert mistake.where == f"{tmp_path / 'recipe.yaml'}:{line}"
    assert says in mistake.what
    assert mistake.fix


def test_endless_and_exploding_aliases_are_refused(tmp_path: Path) -> None:
    [endless] = mistakes_of(tmp_path, "a: &a [*a]\n").mistakes
    assert "unfold without end" in endless.what
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    [exploding] = mistakes_of(tmp_path, "\n".join(lines)).mistakes
    assert "unfold without end" in exploding.what


def test_all_mistakes_come_in_one_report_in_the_order_of_lines(tmp_path: Path) -> None:
    text = """\
name: my run
model:
  family: llama
  presett: 4m
data:
  sources: [{kind: jsonll, path: x}, {kind: jsonl}]
  sequence_length: 0
training:
  steps: ten
  precision: bf17
seed: -1
seed: 3
evaluation:
  rows: ${env:TRAINWRIGHT_NOT_SET}
"""
    error = mistakes_of(tmp_path, text, "optimizer.lr=3", "training.recompute=some")
    found = [
        (each.where.removeprefix(f"{tmp_path / 'recipe.yaml'}:"), each.key)
        for each in error.mistakes
    ]
    assert found == [
        ("1", "name"),
        ("4", "model.presett"),
        ("6", "data.sources.0.kind"),
        ("6", "data.sources.1"),
        ("7", "data.sequence_length"),
        ("9", "training.steps"),
        ("10", "training.precision"),
        ("11", "seed"),
        ("12", "seed"),
        ("14", "evaluation.rows"),
        ("command line", "training.recompute"),
        ("command line", "optimizer.lr"),
    ]
    for where, key in found:
        assert f"{where}: {key}: " in str(error)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    def complaint(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            load_recipe(path)
        return str(caught.value)

    (tmp_path / "quickstart.yaml").write_text(BASE)
    missing = complaint(tmp_path / "quikstart.yaml")
    assert "there is no such file" in missing
    assert f"did you mean `{tmp_path / 'quickstart.yaml'}`?" in missing
    assert "recipes there: `quickstart.yaml`" in complaint(tmp_path / "zebra.yml")
    assert f"no folder `{tmp_path / 'no'}`" in complaint(tmp_path / "no" / "recipe.yaml")

    folder = complaint(tmp_path)
    assert "a directory, not a recipe" in folder
    assert "`quickstart.yaml`" in folder

    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing but a comment\n")
    assert "the recipe is empty" in complaint(empty)
    assert "trainwright init" in complaint(empty)

    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"name: a\nb: \xff\xfe\x00")
    assert f"{binary}:2: this is not a text file in UTF-8" in complaint(binary)
    zero = tmp_path / "zero.yaml"
    zero.write_bytes(b"name: a\0b\n")
    assert "this is not a text file" in complaint(zero)

    listing = tmp_path / "list.yaml"
    listing.write_text("- a\n- b\n")
    assert "a recipe is a section of keys, found a list of 2" in complaint(listing)

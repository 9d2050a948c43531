"""What the schema cannot see: each semantic mistake with its line, its key and its fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainwright.errors import UserError
from trainwright.planner import check
from trainwright.planner.check import recipe_checks
from trainwright.recipe.load import load_recipe

BASE = """\
model:
  family: llama
  preset: 4m
tokenizer:
  train: {vocab_size: 4096}
data:
  sources:
    - texts.txt
  sequence_length: 64
training:
  steps: 100
  batch_sequences: 4
"""
TINY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts.txt").write_text("some text\n")
    return tmp_path


def make_model(folder: Path, entries: int = 300, **config: Any) -> None:
    """A pretrained model's directory as far as checks look at it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**TINY, **config}))
    (folder / "model.safetensors").write_bytes(b"")
    vocabulary = {f"t{index}": index for index in range(entries - 1)}
    added = [{"id": entries - 1, "content": "<pad>"}]
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added})
    )


def found(folder: Path, text: str, *overrides: str) -> list[tuple[str, str, str]]:
    """Line (or place), key, and words of each mistake in a recipe with `text`."""
    file = folder / "recipe.yaml"
    file.write_text(text)
    try:
        load_recipe(file, overrides, recipe_checks)
    except UserError as error:
        return [
            (each.where.removeprefix(f"{file}:"), each.key, f"{each.what} | {each.fix}")
            for each in error.mistakes
        ]
    return []


def test_a_sound_recipe_passes(folder: Path) -> None:
    assert found(folder, BASE) == []


CASES: dict[str, tuple[str, str, str, str, list[str]]] = {
    "heads do not divide": (
        "  preset: 4m", "  preset: 4m\n  config:\n    num_attention_heads: 3", "5",
        "model.config.num_attention_heads", ["3", "hidden_size 256", "one of 1, 2, 4"],
    ),
    "key-value heads do not divide": (
        "  preset: 4m", "  preset: 4m\n  config:\n    num_key_value_heads: 3", "5",
        "model.config.num_key_value_heads", ["4 attention heads", "one of 1, 2, 4"],
    ),
    "unknown config key": (
        "  preset: 4m", "  preset: 4m\n  config: {hiden_size: 128}", "4",
        "model.config.hiden_size", ["no such key", "hidden_size"],
    ),
    "shape left out": (
        "  preset: 4m", "  config: {hidden_size: 64}", "3",
        "model.config.num_attention_heads", ["is missing"],
    ),
    "unknown family": (
        "  family: llama", "  family: lama", "2", "model.family", ["did you mean `llama`?"],
    ),
    "unknown preset": (
        "  preset: 4m", "  preset: 8bb", "3", "model.preset",
        ["llama has no preset `8bb`", "did you mean `8b`?"],
    ),
    "rows longer than the model's positions": (
        "  sequence_length: 64", "  sequence_length: 4096", "9", "data.sequence_length",
        ["longer than the model's 2,048 positions", "`sequence_length: 2048`",
         "`model.config.max_position_embeddings: 4096`"],
    ),
    "vocabulary too small": (
        "  preset: 4m", "  preset: 4m\n  config:\n    vocab_size: 1000", "5",
        "model.config.vocab_size", ["4,096 tokens", "1,000", "`vocab_size: 4096`"],
    ),
    "no tokenizer for a new model": (
        "tokenizer:\n  train: {vocab_size: 4096}\n", "", "1", "tokenizer",
        ["a new model needs a tokenizer", "`tokenizer: bytes`"],
    ),
    "tokenizer's directory is missing": (
        "  train: {vocab_size: 4096}", "  path: ./tok", "5", "tokenizer.path",
        ["there is no directory"],
    ),
    "missing file, near one": (
        "    - texts.txt", "    - text.txt", "8", "data.sources.0.path",
        ["there is no file or folder", "did you mean", "texts.txt"],
    ),
    "missing validation file": (
        "  sequence_length: 64", "  sequence_length: 64\n  validation: [held.txt]", "10",
        "data.validation.0.path", ["there is no file or folder"],
    ),
    "batch is no whole number of rows": (
        "  batch_sequences: 4", "  batch_tokens: 100", "12", "training.batch_tokens",
        ["no whole number of rows of 64", "`batch_tokens: 64` or `batch_tokens: 128`"],
    ),
    "batch does not divide over the workers": (
        "  batch_sequences: 4", "  batch_sequences: 4\nparallel: {workers: 3}", "12",
        "training.batch_sequences", ["4 rows", "3 workers", "`batch_sequences: 3`"],
    ),
    "tensor degree against heads, vocabulary and key-value heads at once": (
        "  batch_sequences: 4", "  batch_sequences: 4\nparallel: {tp: 8}", "13", "parallel.tp",
        ["`whole: [attention]`"],
    ),
    "a pipeline of more stages than layers": (
        "  batch_sequences: 4", "  batch_sequences: 4\nparallel: {pp: 8}", "13", "parallel.pp",
        ["8 pipeline stages are more than the model's 4 layers", "`pp: 4`"],
    ),
    "a budget without the compiler": (
        "  batch_sequences: 4", "  batch_sequences: 4\n  recompute: 0.5\n  compile: false", "13",
        "training.recompute", ["needs torch.compile, which is off", "`compile: auto`"],
    ),
    "a router in a dense model": (
        "  batch_sequences: 4", "  batch_sequences: 4\n  router_z_loss: 0.1", "13",
        "training.router_z_loss", ["no router", "leave `router_z_loss` out"],
    ),
    "degrees do not make the workers": (
        "  batch_sequences: 4",
        "  batch_sequences: 4\nparallel: {workers: 4, dp_shard: 4, dp_replicate: 2}", "13",
        "parallel.dp_replicate", ["make 8 workers", "`dp_replicate: 1`"],
    ),
    "micro-batch does not divide": (
        "  batch_sequences: 4", "  batch_sequences: 4\nparallel: {workers: 1, micro_batch: 3}",
        "13", "parallel.micro_batch", ["`micro_batch: 4`"],
    ),
    "warm-up as long as the run": (
        "  steps: 100", "  steps: 100\nschedule: {warmup: 100}\n#", "12", "schedule.warmup",
        ["100 steps is as long as the run (100 steps)", "`warmup: 0.03`"],
    ),
    "warm-up and decay longer than the run": (
        "  batch_sequences: 4",
        "  batch_sequences: 4\nschedule: {name: wsd, warmup: 0.5, decay: 0.6}", "13",
        "schedule.decay", ["more than the run"],
    ),
    "texts to show of a model that writes none": (
        "  train: {vocab_size: 4096}", "  path: bytes\nobjective: reward\n"
        "evaluation: {samples: {prompts: [hello]}}", "7", "evaluation.samples.prompts",
        ["writes no text"],
    ),
    "best of nothing": (
        "  sequence_length: 64", "  sequence_length: 64\n  validation: 0\n"
        "checkpoint: {keep_best: true}", "11", "checkpoint.keep_best",
        ["nothing is held out", "`data.validation: 0.01`"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_semantic_mistake(case: tuple[str, str, str, str, list[str]], folder: Path) -> None:
    old, new, line, key, says = case
    text = BASE.replace(old, new)
    if "#" in new:  # the section replaced was cut in two
        text = text.replace("#\n  batch_sequences: 4\n", "")
    assert text != BASE
    by_key = {each[1]: each for each in found(folder, text)}
    assert key in by_key
    where, _, message = by_key[key]
    assert where == line
    for words in says:
        assert words in message
    if key != "model.config.num_attention_heads":
        assert len(by_key) == 1


def test_warm_up_against_a_run_given_in_tokens(folder: Path) -> None:
    text = BASE.replace("  steps: 100", "  tokens: 2560") + "schedule: {warmup: 10}\n"
    [(_, key, message)] = found(folder, text)
    assert key == "schedule.warmup"
    assert "(10 steps)" in message
    assert found(folder, text, "schedule.warmup=9") == []


def test_empty_and_broken_sources(folder: Path) -> None:
    (folder / "texts.txt").write_text("")
    [(where, key, message)] = found(folder, BASE)
    assert key == "data.sources.0"
    assert "is empty" in message

    (folder / "rows.jsonl").write_text('{"txt": "a"}\n')
    [(where, _, message)] = found(folder, BASE.replace("texts.txt", "rows.jsonl"))
    assert where == f"{folder / 'rows.jsonl'}:1"
    assert "no key `text`" in message


PRETRAINED = """\
model:
  path: ./model
data:
  sources: [texts.txt]
  sequence_length: 64
training:
  steps: 100
"""


def test_a_sound_pretrained_model_passes(folder: Path) -> None:
    make_model(folder / "model")
    assert found(folder, PRETRAINED) == []


def test_pretrained_directory_that_is_missing_or_no_model(folder: Path) -> None:
    (folder / "models").mkdir()
    [(where, key, message)] = found(folder, PRETRAINED)
    assert (where, key) == ("2", "model.path")
    assert f"did you mean `{folder / 'models'}`?" in message

    messages = [message for _, _, message in found(folder, PRETRAINED, f"model.path={folder}")]
    assert any("has no config.json" in message for message in messages)
    assert any("has no weights in safetensors" in message for message in messages)
    assert any("has no tokenizer of its own" in message for message in messages)

    make_model(folder / "model")
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")
    [(_, key, message)] = found(folder, PRETRAINED)
    assert key == "model.path"
    assert "pickles" in message

    [(_, _, message)] = found(folder, PRETRAINED, f"model.path={folder / 'texts.txt'}")
    assert "is a file" in message


def test_pretrained_model_against_tokenizer_and_rows(folder: Path) -> None:
    make_model(folder / "model")
    [(where, key, message)] = found(folder, PRETRAINED, "data.sequence_length=129")
    assert (where, key) == ("command line", "data.sequence_length")
    assert "longer than the model's 128 positions" in message
    assert "`sequence_length: 128`" in message

    make_model(folder / "large", entries=301)
    [(_, key, message)] = found(folder, PRETRAINED, f"tokenizer={folder / 'large'}")
    assert key == "tokenizer"
    assert "301 tokens" in message
    assert "300" in message
    [(_, key, message)] = found(
        folder, PRETRAINED, f"model.path={folder / 'model'}", "tokenizer.train.vocab_size=280"
    )
    assert key == "tokenizer.train"
    assert "its own tokenizer" in message
    assert found(folder, PRETRAINED, "tokenizer=bytes") == []  # 259 entries fit into 300

    make_model(folder / "short", entries=310)
    [(_, key, message)] = found(folder, PRETRAINED, f"model.path={folder / 'short'}")
    assert key == "model.path"
    assert "310 tokens" in message


def test_pretrained_config_that_is_illegal_or_unknown(folder: Path) -> None:
    make_model(folder / "model", num_attention_heads=3)
    [(where, key, message)] = found(folder, PRETRAINED)
    assert (where, key) == ("2", "model.path")
    assert "`num_attention_heads` in" in message
    assert "config.json" in message

    make_model(folder / "strange", model_type="rwkv9", num_attention_heads=3)
    # Unknown families are transformers' business, but rows are ours.
    assert found(folder, PRETRAINED, f"model.path={folder / 'strange'}") == []
    [(_, key, _)] = found(
        folder, PRETRAINED, f"model.path={folder / 'strange'}", "data.sequence_length=500"
    )
    assert key == "data.sequence_length"

    (folder / "model" / "config.json").write_text("{")
    [(_, _, message)] = found(folder, PRETRAINED)
    assert "is not a JSON object" in message


def test_models_with_another_head_than_the_objective_asks_for(folder: Path) -> None:
    make_model(folder / "ranks", architectures=["LlamaForSequenceClassification"], id2label={0: ""})
    make_model(folder / "writes")
    make_model(folder / "granite", model_type="granite")
    make_model(folder / "other", model_type="gpt2")
    for name, objective, says in (
        ("ranks", "sft", "it is a reward model, which writes no text"),
        ("ranks", "reward", None),
        ("writes", "reward", None),
        ("granite", "reward", "no class for reward models of the family granite"),
        ("other", "reward", "no class for reward models of the family gpt2"),
    ):
        text = PRETRAINED.replace("./model", f"./{name}") + f"objective: {objective}\n"
        messages = [message for _, key, message in found(folder, text) if key == "model"]
        assert len(messages) == (says is not None)
        assert all(says in message for message in messages)
    text = (
        PRETRAINED.replace("./model", "./writes") + "objective: {kind: dpo, reference: ./ranks}\n"
    )
    assert [key for _, key, _ in found(folder, text)] == ["objective.reference"]


def test_packages_that_are_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_is_installed", lambda package: False)
    text = BASE + "optimizer: adamw-8bit\ntracking:\n  to:\n    - wandb\n    - tensorboard\n"
    assert [(where, key) for where, key, _ in found(folder, text)] == [
        ("13", "optimizer.name"),
        ("16", "tracking.to.0"),
        ("17", "tracking.to.1"),
    ]
    messages = " ".join(message for _, _, message in found(folder, text))
    assert "trainwright[quant]" in messages
    assert "pip install wandb" in messages
    monkeypatch.setattr(check, "_is_installed", lambda package: True)
    assert found(folder, text) == []


def test_semantic_and_schema_mistakes_come_together(folder: Path) -> None:
    text = """\
model:
  family: llama
  preset: 4m
  config: {num_attention_heads: 8, num_key_value_heads: 3}
data:
  sources: [missing.txt]
  sequence_length: 64
training:
  steps: many
schedule: {name: wsd, warmup: 0.9}
"""
    assert [(where, key) for where, key, _ in found(folder, text, "parallel.workers=0")] == [
        ("1", "tokenizer"),
        ("4", "model.config.num_key_value_heads"),
        ("6", "data.sources.0.path"),
        ("9", "training.steps"),
        ("10", "schedule.decay"),
        ("command line", "parallel.workers"),
    ]


def test_checkpoints_and_evaluations_that_never_meet_cannot_find_the_best(tmp_path):
    from trainwright.recipe.load import load_recipe

    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {family: llama, preset: 4m}\ntokenizer: bytes\ntraining: {steps: 600}\n"
        "checkpoint: {keep_best: true, every: 150}\nevaluation: {every: 100}\n"
    )
    with pytest.raises(UserError, match="rarely meet"):
        load_recipe(file, (), recipe_checks)
    load_recipe(file, ["evaluation.every=75"], recipe_checks)

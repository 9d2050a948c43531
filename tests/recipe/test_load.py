"""Loading a recipe that is right: YAML 1.2, shorthands, overrides, environment, paths, dumping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainwright.errors import Mistake, UserError
from trainwright.recipe.load import Draft, different_keys, dump_recipe, load_recipe
from trainwright.recipe.schema import Recipe

BASE = """\
model: {family: llama, preset: 4m}
tokenizer: bytes
training:
  tokens: 1_000_000
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(BASE)
    return file


def loaded(file: Path, text: str, *overrides: str) -> Recipe:
    file.write_text(text)
    return Recipe.load(file, *overrides)


def test_scalars_are_yaml_1_2(recipe_file: Path) -> None:
    recipe = loaded(
        recipe_file,
        BASE + "optimizer: {learning_rate: 3e-4, eps: 1E-8}\nname: off\nseed: 0x1F\n"
        "evaluation: {samples: {prompts: [yes, 2024-01-01, '10', \"a\\nb\"]}}\n",
    )
    assert recipe.training.tokens == 1_000_000
    assert recipe.optimizer.learning_rate == 3e-4
    assert recipe.optimizer.eps == 1e-8
    assert recipe.name == "off"
    assert recipe.seed == 31
    assert recipe.evaluation.samples.prompts == ["yes", "2024-01-01", "10", "a\nb"]


def test_shorthands_and_empty_sections(recipe_file: Path) -> None:
    recipe = loaded(
        recipe_file,
        BASE + "optimizer: muon\nschedule: wsd\nobjective: next_token\ncheckpoint:\nexport:\n"
        "data:\n  sources: [python-stdlib, books/*.txt]\n",
    )
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.path == "bytes"
    assert (recipe.optimizer.name, recipe.schedule.name) == ("muon", "wsd")
    assert recipe.checkpoint.keep_last == 2
    assert [source.kind for source in recipe.data.sources] == ["python-stdlib", None]


def test_merge_keys(recipe_file: Path) -> None:
    recipe = loaded(
        recipe_file,
        BASE + "optimizer: &base {learning_rate: 1e-3, weight_decay: 0.3}\n"
        "data:\n  sources:\n    - &one {path: a.txt, limit: 5}\n"
        "    - {<<: *one, path: b.txt}\n",
    )
    first, second = recipe.data.sources
    assert (first.limit, second.limit) == (5, 5)
    assert second.path is not None
    assert second.path.endswith("b.txt")


def test_overrides(recipe_file: Path) -> None:
    recipe = Recipe.load(
        recipe_file,
        "optimizer=muon",
        "optimizer.learning_rate=1e-2",
        "optimizer.betas=[0.8, 0.9]",
        "data.sources.0.path=books.txt",
        "data.sources.1=python-stdlib",
        "evaluation.samples.prompts=[a, 'b: c']",
        "training.gradient_clip=null",
        "name=x.y-z",
        "model.config={hidden_size: 128}",
        "model.config.rope_theta=500.0",
    )
    assert recipe.optimizer.name == "muon"
    assert recipe.optimizer.learning_rate == 0.01
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert [source.kind for source in recipe.data.sources] == [None, "python-stdlib"]
    assert recipe.evaluation.samples.prompts == ["a", "b: c"]
    assert recipe.training.gradient_clip is None
    assert recipe.training.tokens == 1_000_000
    assert recipe.model.config == {"hidden_size": 128, "rope_theta": 500.0}


def test_overrides_displace_alternatives_that_only_the_file_gives(recipe_file: Path) -> None:
    recipe = Recipe.load(recipe_file, "training.steps=20", "tokenizer.train.vocab_size=300")
    assert (recipe.training.steps, recipe.training.tokens) == (20, None)
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.path is None
    assert Recipe.load(recipe_file, "model.path=./m").model.family is None
    with pytest.raises(UserError, match="`steps` and `epochs` all say how long"):
        Recipe.load(recipe_file, "training.steps=20", "training.epochs=1")


def test_shorthand_override_keeps_the_sections_other_keys(recipe_file: Path) -> None:
    recipe = loaded(recipe_file, BASE + "optimizer: {learning_rate: 0.5}\n", "optimizer=muon")
    assert (recipe.optimizer.name, recipe.optimizer.learning_rate) == ("muon", 0.5)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training", "`training` is not an override"),
        ("=3", "is not an override"),
        ("name=[a", "the value `[a` is not valid YAML"),
        ("data.sources.4=x", "`data.sources.0` adds one"),
        ("training.tokens.x=3", "`training.tokens` is a single value"),
        ("training.0=3", "is not a list"),
        ("training.stepz=3", "did you mean `steps`?"),
        ("seed=${env:TRAINWRIGHT_NOT_SET}", "`TRAINWRIGHT_NOT_SET` is not set"),
    ],
)
def test_broken_overrides_are_the_command_lines(
    override: str, says: str, recipe_file: Path
) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.load(recipe_file, override)
    [mistake] = caught.value.mistakes
    assert mistake.where == "command line"
    assert says in str(mistake)


def test_environment(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "30")
    monkeypatch.setenv("EMPTY", "")
    text = """\
model: {family: llama, preset: "${env:UNSET_SIZE:-4m}"}
training:
  steps: ${env:STEPS}
optimizer:
  learning_rate: ${env:UNSET_RATE:-1e-2}
  weight_decay: ${env:EMPTY:-0.25}
name: "run-${env:STEPS}"
evaluation: {samples: {prompts: ["${env:STEPS}", "$${env:STEPS}", "${HOME}"]}}
"""
    recipe = loaded(recipe_file, text, "seed=${env:STEPS}")
    assert recipe.model.preset == "4m"
    assert recipe.training.steps == 30
    assert recipe.optimizer.learning_rate == 0.01
    assert recipe.optimizer.weight_decay == 0.25
    assert recipe.name == "run-30"
    assert recipe.seed == 30
    assert recipe.evaluation.samples.prompts == ["30", "${env:STEPS}", "${HOME}"]


def test_paths_count_from_where_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    (folder / "org" / "model").mkdir(parents=True)
    (folder / "saved").mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", "/home/somebody")
    text = """\
model: {path: org/model}
tokenizer: org/other
run_directory: out
cluster: machines/gpus.yaml
training: {steps: 1}
data:
  cache: cache
  sources:
    - ../texts/*.txt
    - {kind: jsonl, path: plain-name}
    - {kind: dataset, path: saved}
    - owner/dataset-1.5
    - owner/file.jsonl
    - ~/x.txt
    - s3://bucket/x.txt
  validation: [held.txt]
"""
    recipe = loaded(folder / "recipe.yaml", text)
    assert recipe.model.path == str(folder / "org" / "model")
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.path == "org/other"  # no such directory: a name on the hub
    assert recipe.run_directory == elsewhere / "out"
    assert recipe.cluster == folder / "machines" / "gpus.yaml"
    assert recipe.data.cache == folder / "cache"
    assert [source.path for source in recipe.data.sources] == [
        str(tmp_path / "texts" / "*.txt"),
        str(folder / "plain-name"),
        str(folder / "saved"),
        "owner/dataset-1.5",
        str(folder / "owner" / "file.jsonl"),
        "/home/somebody/x.txt",
        "s3://bucket/x.txt",
    ]
    assert isinstance(recipe.data.validation, list)
    assert recipe.data.validation[0].path == str(folder / "held.txt")

    typed = Recipe.load("../recipes/recipe.yaml", "data.sources.0.path=a.txt", "model.path=./m")
    assert typed.data.sources[0].path == str(elsewhere / "a.txt")
    assert typed.model.path == str(elsewhere / "m")
    assert typed.data.cache == folder / "cache"


FULL: dict[str, Any] = {
    "model": {"family": "gemma2", "preset": "4m", "config": {"rope_theta": 1e4, "x": [1, None]}},
    "tokenizer": {"train": {"vocab_size": 300}},
    "data": {
        "sources": [{"kind": "python-stdlib", "weight": 1.0}, {"path": "/a b/*.txt", "weight": 2}],
        "validation": [{"path": "/held.txt", "limit": 3}],
    },
    "training": {"epochs": 1e-3, "gradient_clip": None, "batch_tokens": 4096},
    "evaluation": {
        "samples": {"prompts": ["${env:HOME}", "$${env:X}", "true", "1e3", "", "é\n\t'\"", "null"]}
    },
    "run_directory": "/runs/x",
    "name": "1e5",
}


def test_a_dumped_recipe_loads_to_an_equal_one(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(FULL)
    file = tmp_path / "dumped.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    again = load_recipe(file)
    assert again == recipe
    assert different_keys(recipe, again) == []
    assert again.training.gradient_clip is None
    assert dump_recipe(again) == dump_recipe(recipe)


@pytest.mark.parametrize(
    ("text", "overrides", "searched"),
    [
        ("", (), True),
        ("parallel: auto\n", (), True),
        ("parallel: {workers: 2, micro_batch: 4, threads: 1}\n", (), True),
        ("parallel: {tp: 1}\n", (), False),  # given, though it is the default
        ("parallel: {workers: 2, schedule: 1f1b}\n", (), False),
        ("parallel: {dp_shard: 2}\n", ("parallel=auto",), True),
        ("", ("parallel.zero=1",), False),
        ("parallel: auto\n", ("parallel.workers=2",), True),
        ("parallel: auto\n", ("parallel.pp=2",), False),
        ("", ("parallel=auto", "parallel.threads=2"), True),
    ],
)
def test_a_layout_is_searched_until_one_of_its_keys_is_given(
    recipe_file: Path, text: str, overrides: tuple[str, ...], searched: bool
) -> None:
    recipe = loaded(recipe_file, BASE + text, *overrides)
    assert recipe.parallel.is_searched is searched
    # What is written out says the same when it is read again.
    again = load_recipe(recipe_file, text=dump_recipe(recipe))
    assert again == recipe
    assert again.parallel.is_searched is searched
    assert Recipe.model_validate(recipe.model_dump(mode="json")).parallel.is_searched is searched
    changed = recipe.parallel.model_copy(update={"dp_shard": 2})
    assert not changed.is_searched


def test_words_for_a_section_are_its_own_only(recipe_file: Path) -> None:
    with pytest.raises(UserError, match="`auto`") as caught:
        loaded(recipe_file, BASE + "parallel: fast\n")
    assert [mistake.key for mistake in caught.value.mistakes] == ["parallel"]
    with pytest.raises(UserError):
        loaded(recipe_file, BASE + "checkpoint: auto\n")


def test_different_keys_name_what_differs(recipe_file: Path) -> None:
    recipe = Recipe.load(recipe_file)
    other = Recipe.load(
        recipe_file,
        "optimizer.betas=[0.9, 0.99]",
        "training.steps=5",
        "data.sources=[python-stdlib, a.txt]",
    )
    assert different_keys(recipe, other) == [
        "training.steps",
        "training.tokens",
        "optimizer.betas.1",
        "data.sources.1.kind",
        "data.sources.1.path",
        "data.sources.1.field",
        "data.sources.1.format",
        "data.sources.1.columns",
        "data.sources.1.subset",
        "data.sources.1.split",
        "data.sources.1.limit",
        "data.sources.1.weight",
    ]


def test_checks_run_beside_schema_errors_and_get_lines(recipe_file: Path) -> None:
    recipe_file.write_text(BASE + "optimizer:\n  learning_rate: -1\nseed: 7\n")
    seen: list[Draft] = []

    def check(draft: Draft) -> list[Mistake]:
        seen.append(draft)
        return [
            Mistake("too few", "take more", key="training.tokens"),
            Mistake("seven", key="seed"),
            Mistake("inside", key="model.config.hidden_size"),
            Mistake("bad line", where="/data.jsonl:4711"),
        ]

    def failing(draft: Draft) -> list[Mistake]:
        raise UserError(Mistake("raised", key="tokenizer"))

    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, checks=[check, failing])
    [draft] = seen
    assert draft.optimizer is None
    assert draft.broken == {"optimizer"}
    assert draft.training is not None
    assert draft.seed == 7
    found = [(each.where.rpartition("/")[2], each.what) for each in caught.value.mistakes]
    assert found == [
        ("recipe.yaml:1", "inside"),
        ("recipe.yaml:2", "raised"),
        ("recipe.yaml:4", "too few"),
        ("recipe.yaml:6", "expected a number above 0, found `-1`"),
        ("recipe.yaml:7", "seven"),
        ("data.jsonl:4711", "bad line"),
    ]


def test_batch_sequences() -> None:
    assert Recipe.model_validate(FULL).batch_sequences == 4
    plain = {"model": FULL["model"], "training": {"steps": 1}}
    assert Recipe.model_validate(plain).batch_sequences == 8

"""Manifests, and what a recipe by a stranger may and may not say."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.swarm.made import ALICE, BOB, LAYOUT, RECIPE, SETTINGS, manifest, recipe
from trainwright.errors import UserError
from trainwright.swarm.manifest import Manifest
from trainwright.swarm.message import BadMessage, write_json, write_message
from trainwright.swarm.shared_recipe import OWN, recipe_here, shared_values


def read(made: Manifest, **changes) -> Manifest:
    asked = {"run": made.run, "starter": made.starter} | changes
    return Manifest.read(made.write(ALICE), **asked)


def planted(tree: dict) -> bytes:
    """A manifest's message with this content, of whatever kind, and the run that it makes."""
    text = write_json(tree)
    run = hashlib.sha256(text).hexdigest()[:32]
    return write_message("manifest", run, 0, {}, [text], ALICE)


def refused(tree: dict) -> str:
    data = planted(tree)
    with pytest.raises(BadMessage) as caught:
        Manifest.read(data, run=data[132:148].hex(), starter=ALICE.peer)
    return caught.value.reason


def tree() -> dict:
    made = manifest()
    return json.loads(made._text())


def test_a_manifest_is_read_as_it_was_written():
    made = manifest()
    found = read(made)
    assert found == made and found.run == made.run
    assert found.layout == LAYOUT and found.settings == SETTINGS
    assert found.recipe() == recipe()


def test_the_run_is_the_digest_of_what_all_must_have_alike():
    made = manifest()
    assert made.run == hashlib.sha256(write_json(tree() | {"salt": made.salt})).hexdigest()[:32]
    others = [
        dataclasses.replace(made, genesis="cd" * 16),
        dataclasses.replace(made, rules=dataclasses.replace(made.rules, quorum=3)),
        dataclasses.replace(made, settings=dataclasses.replace(SETTINGS, inner_steps=11)),
        dataclasses.replace(made, shapes=made.shapes[:-1]),
        dataclasses.replace(made, values=shared_values(recipe(RECIPE + "seed: 7\n"))),
        dataclasses.replace(made, starter=BOB.peer),
        manifest(),  # the same recipe, started again
    ]
    assert len({each.run for each in [made, *others]}) == 8


def test_a_manifest_is_its_starters_and_its_runs():
    made = manifest()
    with pytest.raises(BadMessage, match="signed by"):
        read(made, starter=BOB.peer)
    with pytest.raises(BadMessage, match="another run"):
        read(made, run="0" * 32)
    with pytest.raises(ValueError, match="to sign"):
        made.write(BOB)
    other = manifest()
    data = write_message("manifest", made.run, 0, {}, [other._text()], ALICE)
    with pytest.raises(BadMessage, match=other.run):
        Manifest.read(data, run=made.run, starter=ALICE.peer)


def test_a_manifest_has_one_plane():
    made = manifest()
    data = write_message("manifest", made.run, 0, {}, [made._text(), b""], ALICE)
    with pytest.raises(BadMessage, match="one plane"):
        Manifest.read(data, run=made.run, starter=ALICE.peer)


@pytest.mark.parametrize(
    "part, value, reason",
    [
        ("more", 1, "parts"),
        ("starter", "../../alice", "climbs"),
        ("starter", None, "words"),
        ("starter", BOB.peer, "started that run"),
        ("values", [], "no recipe"),
        ("genesis", 7, "words"),
        ("salt", None, "words"),
        ("shapes", {}, "layout"),
        ("shapes", [["a"]], "layout"),
        ("shapes", [[7, [4]]], "layout"),
        ("shapes", [["a", [4]], ["a", [4]]], "layout"),
        ("shapes", [["a", [0]]], "cannot be"),
        ("shapes", [["a", [-4]]], "cannot be"),
        ("shapes", [["a", [-4, -4]]], "cannot be"),
        ("shapes", [["a", [True]]], "cannot be"),
        ("shapes", [["a", [2**30, 2**30]]], "cannot be"),
        ("shapes", [[name, [2**44]] for name in "abc"], "cannot be"),
        ("settings", {}, "settings are not"),
        ("settings", dataclasses.asdict(SETTINGS) | {"inner_steps": -1}, "inner_steps is -1"),
        ("settings", dataclasses.asdict(SETTINGS) | {"inner_steps": 1.5}, "inner_steps is 1.5"),
        ("settings", dataclasses.asdict(SETTINGS) | {"inner_steps": True}, "inner_steps is True"),
        ("settings", dataclasses.asdict(SETTINGS) | {"density": "high"}, "density is 'high'"),
        ("settings", dataclasses.asdict(SETTINGS) | {"method": 3}, "method is 3"),
        ("rules", {"quorum": 2}, "rules are not"),
    ],
)
def test_manifests_of_another_make_are_refused(part, value, reason):
    assert reason in refused(tree() | {part: value})


def test_shapes_are_names_and_sizes():
    made = dataclasses.replace(manifest(), shapes=(("scalar", ()), ("m", (2, 3))))
    assert read(made).layout.count == 1 + math.prod((2, 3))


# Recipes of strangers


def here(changes: dict, overrides=()):
    values = shared_values(recipe())
    for key, value in changes.items():
        *above, last = key.split(".")
        inner = values
        for name in above:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return recipe_here(values, overrides, "manifest")


def test_what_each_machine_says_for_itself_is_not_in_the_manifest(tmp_path):
    own = f"run_directory: {tmp_path}\ncheckpoint: {{every: 5}}\ntracking: {{to: [wandb]}}\n"
    own += "export: {push: me/model}\nparallel: {dp_shard: 2}\n"
    values = shared_values(recipe(RECIPE + own))
    assert not {key.split(".")[0] for key in OWN if "." not in key} & set(values)
    assert str(tmp_path) not in json.dumps(values) and "wandb" not in json.dumps(values)
    assert recipe_here(values, [], "manifest") == recipe()


@pytest.mark.parametrize(
    "key, value",
    [
        ("run_directory", "/etc"),
        ("data.cache", "/home"),
        ("export", {"push": "thief/model"}),
        ("tracking", {"to": ["wandb"]}),
        ("checkpoint", {"every": 1}),
        ("cluster", "/etc/passwd"),
        ("evaluation.tasks", ["/etc/passwd"]),
        ("parallel", {"tp": 2}),
    ],
)
def test_no_starter_writes_or_sends_from_another_machine(key, value):
    with pytest.raises(UserError, match=key.split(".")[0]):
        here({key: value})


def test_no_code_of_a_model_is_run():
    with pytest.raises(UserError, match="own code"):
        here({"model": {"path": "owner/name", "trust_remote_code": True}})
    text = RECIPE.replace("{family: llama, preset: 4m}", "{path: a/b, trust_remote_code: true}")
    with pytest.raises(UserError, match="own code"):
        shared_values(recipe(text))


def test_nothing_is_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    found = here({"tracking": None, "evaluation.samples": {"prompts": ["${env:SECRET}"]}})
    assert found.evaluation.samples.prompts == ["${env:SECRET}"]
    found = here({"evaluation.samples": {"prompts": ["$${env:SECRET}", "$$${env:SECRET}"]}})
    assert found.evaluation.samples.prompts == ["$${env:SECRET}", "$$${env:SECRET}"]


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.sources", [{"path": "/etc/passwd", "kind": "text"}]),
        ("data.sources", [{"path": "~/.ssh/id_ed25519", "kind": "text"}]),
        ("data.sources", [{"path": "secrets.txt"}]),
        ("data.sources", [{"path": "a/b", "kind": "text"}]),
        ("data.sources", [{"path": "file:///etc/passwd"}]),
        ("data.validation", [{"path": "/etc/passwd", "kind": "text"}]),
        ("model", {"path": "/home/alice/model"}),
        ("tokenizer", {"path": "./tokenizer"}),
        ("objective", {"kind": "distill", "teacher": "/home/alice/model"}),
    ],
)
def test_no_file_of_this_machine_is_read_unless_it_says_so(key, value):
    with pytest.raises(UserError, match="a file of who started it"):
        here({key: value})


def test_a_machine_names_its_own_files(tmp_path):
    (tmp_path / "texts.txt").write_text("words")
    found = here(
        {"data.sources": [{"path": "/home/alice/texts.txt", "kind": "text"}]},
        [f"data.sources=[{tmp_path}/texts.txt]", "run_directory=mine", "checkpoint.every=3"],
    )
    assert found.data.sources[0].path == str(tmp_path / "texts.txt")
    assert found.run_directory == Path.cwd() / "mine" and found.checkpoint.every == 3
    found = here(
        {"data.sources": [{"path": "/home/alice/texts.txt", "kind": "text"}]},
        [f"data.sources.0.path={tmp_path}/texts.txt"],
    )
    assert found.data.sources[0].path == str(tmp_path / "texts.txt")


def test_only_names_of_files_are_told(tmp_path):
    text = RECIPE.replace("[python-stdlib]", f"[{{path: {tmp_path}/texts.txt, kind: text}}]")
    values = shared_values(recipe(text))
    assert str(tmp_path) not in json.dumps(values)
    with pytest.raises(UserError, match=r"reads texts\.txt"):
        recipe_here(values, [], "manifest")


@pytest.mark.parametrize(
    "override", ["training.steps=5", "optimizer.learning_rate=1", "swarm.quorum=1", "seed=3"]
)
def test_what_all_have_alike_cannot_be_overridden(override):
    with pytest.raises(UserError, match="alike"):
        here({}, [override])


def test_texts_of_any_kind_go_through():
    prompts = ["two\nlines", "tab\there", "naïve 🙂", 'quote " and \\', "# : {} [] & * ! | > %"]
    text = RECIPE + "evaluation: {samples: {prompts: " + json.dumps(prompts, ensure_ascii=False)
    made = manifest(values=shared_values(recipe(text + "}}")))
    assert read(made).recipe().evaluation.samples.prompts == prompts


@pytest.mark.parametrize("text", ["\x1b[2J", "a/../b", "\u202e"])
def test_a_recipe_that_nobody_could_read_is_not_started(text):
    values = shared_values(recipe()) | {"evaluation": {"samples": {"prompts": [text]}}}
    with pytest.raises(UserError, match="others could not read"):
        manifest(values=values).write(ALICE)


def test_a_manifest_is_read_without_torch():
    code = "import sys, trainwright.swarm.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""`trainwright plan` as a user meets it: real recipes, real machines' files, the screen, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from trainwright.cli.main import app
from trainwright.errors import UserError
from trainwright.planner.cluster.load import load_cluster
from trainwright.planner.cost.step import predict
from trainwright.planner.explaining.answer import answer
from trainwright.planner.explaining.question import ask
from trainwright.planner.explaining.why import differences, step_terms
from trainwright.planner.plan import Machine, Plan
from trainwright.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "examples" / "clusters" / "h100-64.yaml"

RECIPE = """
name: small
model: {family: llama, preset: 1b}
tokenizer: {train: {vocab_size: 128_256}}
data: {sources: [python-stdlib], sequence_length: 2048}
training: {steps: 1000, batch_sequences: 64, precision: bf16}
"""
MACHINE = """
pools:
  eight:
    device: A100-40G-SXM
    nodes: 2
    devices_per_node: 4
    inside: NVLink-3
    between: Ethernet-100
    price: 1.0
"""
ONE = "pools: {one: {device: RTX-4090, price: 0.5}}\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a recipe, its machine, and one GPU that is too small for much."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "machine.yaml").write_text(MACHINE)
    (tmp_path / "one.yaml").write_text(ONE)
    return tmp_path


def plan(folder: Path, *words: str, machine: str = "machine.yaml") -> Result:
    command = ["plan", str(folder / "recipe.yaml"), "--cluster", str(folder / machine), *words]
    return CliRunner().invoke(app, command)


def as_json(result: Result, code: int = 0) -> dict[str, Any]:
    assert result.exit_code == code, result.exception
    return json.loads(result.stdout)


def test_ranked_plans_fit_the_screen_and_add_up(files):
    done = plan(files, "--top", "3")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert "small on machine: 8 × A100-40G-SXM" in lines[0]
    for word in ("step", "tokens/s", "MFU", "fullest device", "exposed", "idle", "J/token"):
        assert word in lines[3]
    assert "$/M tokens" in lines[3]
    assert [line[:2] for line in lines[4:10:2]] == ["1.", "2.", "3."]
    assert any(line.startswith("Why not the second:") for line in lines)
    assert "Your plan" not in done.stdout


def test_json_is_what_the_cost_model_says_of_each_plan(files):
    document = as_json(plan(files, "--json", "--top", "4"))
    question = ask(load_recipe(files / "recipe.yaml"), [load_cluster(files / "machine.yaml")])
    assert len(document["plans"]) == 4
    for each in document["plans"]:
        own = Plan.from_json(json.dumps(each["plan"]))
        assert own.world_size == 8 and own.batch_sequences == 64
        found = predict(question.job, own, question.clusters[0])
        seconds = found.step_seconds.value
        assert each["step_seconds"]["value"] == pytest.approx(seconds)
        assert sum(each["terms"].values()) == pytest.approx(seconds)
        assert each["tokens_per_second"] == pytest.approx(64 * 2048 / seconds)
        assert each["dollars"] == pytest.approx(8 * 1.0 * seconds / 3600)
        assert each["memory_bytes"]["value"] <= each["memory_bytes"]["limit"] == 40 * 2**30
    scores = [each["score"] for each in document["plans"]]
    assert scores[0] <= 1.01 * min(scores)


def test_the_terms_of_a_loss_are_the_difference(files):
    document = as_json(plan(files, "--json", "--top", "6", "parallel.tp=4"))
    question = ask(load_recipe(files / "recipe.yaml"), [load_cluster(files / "machine.yaml")])
    best, other = (
        predict(question.job, Plan.from_json(json.dumps(each["plan"])), question.clusters[0])
        for each in (document["plans"][0], document["named"]["plan"])
    )
    told = differences(best, other)
    difference = other.step_seconds.value - best.step_seconds.value
    assert sum(each.seconds for each in told) == pytest.approx(difference)
    assert abs(told[0].seconds) == max(
        abs(step_terms(other).get(term, 0) - step_terms(best).get(term, 0))
        for term in {*step_terms(best), *step_terms(other)}
    )
    # Four ways to cut every product cost messages in every layer.
    assert any(each.term == "tp traffic" and each.seconds > 0 for each in told)


def test_a_plan_that_the_recipe_names_gets_its_place(files):
    document = as_json(plan(files, "--json", "--top", "3"))
    first = document["plans"][0]["plan"]
    keys = ("pp", "tp", "cp", "dp_replicate", "dp_shard", "zero", "micro_batch")
    layout = [f"parallel.{key}={first[key]}" for key in keys if first[key]]
    layout += [f"training.recompute={first['recompute']}"]
    named = as_json(plan(files, "--json", "--top", "3", *layout))["named"]
    assert named["position"] == 1
    assert named["plan"]["hash"] == document["plans"][0]["hash"]
    worse = as_json(plan(files, "--json", "--top", "3", "parallel.pp=8"))["named"]
    assert worse["position"] is None
    assert worse["plan"]["plan"]["pp"] == 8
    assert worse["plan"]["score"] > max(each["score"] for each in document["plans"])
    told = plan(files, "--top", "3", "parallel.pp=8").stdout
    assert "Your plan (pp 8) is not among the best 3" in told


def test_a_plan_that_does_not_fit_gets_its_smallest_change(files):
    layout = ["parallel.dp_replicate=8", "parallel.micro_batch=8", "training.recompute=none"]
    done = plan(files, *layout)
    assert done.exit_code == 0  # others fit
    assert "does not fit" in done.stdout
    named = as_json(plan(files, "--json", *layout))["named"]
    assert named["plan"] is None
    assert named["nearest"]["memory_bytes"]["value"] > named["nearest"]["memory_bytes"]["limit"]
    assert named["mends"]
    kept = {"dp_replicate": 8, "micro_batch": 8, "recompute": "none", "tp": 1, "offload": "none"}
    for mend in named["mends"]:
        (changed,) = mend["changes"]  # a single key is enough here
        own = mend["plan"]
        assert own["memory_bytes"]["value"] <= own["memory_bytes"]["limit"]
        for name, value in kept.items():
            assert name == changed or own["plan"][name] == value


def test_what_if_of_the_machine_and_of_the_recipe(files):
    slower = as_json(plan(files, "--json", "--what-if", "pools.eight.between.bandwidth=100 Mbit/s"))
    (files / "slow.yaml").write_text(
        MACHINE.replace("Ethernet-100", "{like: Ethernet-100, bandwidth: 100 Mbit/s}")
    )
    alone = as_json(plan(files, "--json", machine="slow.yaml"))
    after = slower["what_if"]["after"]
    assert after["plan"] == alone["plans"][0]["plan"]
    assert after["score"] == pytest.approx(alone["plans"][0]["score"])
    assert after["step_seconds"]["value"] > 1.5 * slower["plans"][0]["step_seconds"]["value"]
    longer = as_json(plan(files, "--json", "--what-if", "data.sequence_length=1024"))
    assert longer["what_if"]["after"]["plan"]["sequence_length"] == 1024
    told = plan(files, "--what-if", "pools.eight.nodes=4").stdout
    assert "What if pools.eight.nodes=4:" in told
    assert ("The same plan stays the best" in told) != ("Another plan is the best" in told)


def test_what_if_that_changes_nothing(files):
    found = as_json(plan(files, "--json", "--what-if", "pools.eight.nodes=2"))["what_if"]
    assert not found["winner_changes"]


def test_objectives(files):
    by_time = as_json(plan(files, "--json", "--top", "1"))["plans"][0]
    by_cost = as_json(plan(files, "--json", "--top", "1", "--objective", "cost"))["plans"][0]
    tokens = 64 * 2048
    assert by_cost["dollars"] / tokens <= 1.01 * by_time["dollars"] / tokens
    with pytest.raises(UserError, match="is no aim"):
        raise plan(files, "--objective", "fame").exception  # type: ignore[misc]
    with pytest.raises(UserError, match="grams_per_kwh"):
        raise plan(files, "--objective", "carbon").exception  # type: ignore[misc]


@pytest.fixture
def large(files: Path) -> Path:
    """A recipe that tunes all of a model of 8 billion parameters; only its shape is here."""
    model = files / "model"
    model.mkdir()
    shape = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    }
    (model / "config.json").write_text(json.dumps(shape))
    recipe = RECIPE.replace("{family: llama, preset: 1b}", "{path: model}")
    recipe = recipe.replace("tokenizer: {train: {vocab_size: 128_256}}\n", "")
    (files / "recipe.yaml").write_text(recipe.replace("batch_sequences: 64", "batch_sequences: 8"))
    return files


def test_an_impossible_recipe_gets_the_three_cheapest_ways(large):
    done = plan(large, machine="one.yaml")
    assert done.exit_code == 2
    assert "What would make it possible, the cheapest first:" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    document = as_json(plan(large, "--json", machine="one.yaml"), code=2)
    assert document["plans"] == []
    nearest = document["nearest"]["memory_bytes"]
    assert nearest["value"] > 100e9 > nearest["limit"]
    ways = document["ways"]
    assert len(ways) == 3
    prices = [way["run_dollars"] for way in ways]
    assert prices == sorted(prices) and prices[0] > 0
    assert any("adapter" in way["change"] for way in ways)
    assert any(not way["change"] for way in ways)
    for way in ways:
        own = way["plan"]
        assert own["memory_bytes"]["value"] <= own["memory_bytes"]["limit"]
        seconds = 1000 * own["step_seconds"]["value"]
        assert way["run_seconds"] == pytest.approx(seconds)
        assert way["run_dollars"] == pytest.approx(1000 * own["dollars"])


def test_where_only_more_devices_help_they_are_of_different_kinds(files):
    recipe = RECIPE.replace("preset: 1b", "preset: 70b").replace("sequences: 64", "sequences: 8")
    (files / "recipe.yaml").write_text(recipe)  # a new model: there is nothing to adapt
    ways = as_json(plan(files, "--json", machine="one.yaml"), code=2)["ways"]
    assert len({way["devices"].split(" × ")[1] for way in ways}) == len(ways) == 3
    prices = [way["run_dollars"] for way in ways]
    assert prices == sorted(prices)


def test_a_trace_of_the_best_plan(files):
    target = files / "step.json"
    assert plan(files, "--top", "1", "--timeline", str(target)).exit_code == 0
    events = json.loads(target.read_text())["traceEvents"]
    assert any(event["ph"] == "X" for event in events)


def test_a_picture_of_the_plan_that_the_user_names(files):
    target = files / "step.svg"
    named = ("parallel.pp=4", "parallel.dp_shard=2", "parallel.micro_batch=4")
    assert plan(files, "--top", "1", "--timeline", str(target), *named).exit_code == 0
    drawing = ElementTree.parse(target).getroot()
    texts = [each.text for each in drawing.iter() if each.tag.endswith("text")]
    assert [f"rank {rank}" in texts for rank in range(5)] == [True] * 4 + [False]
    # Eight micro-batches there and back on each of the ranks, whose boxes are a path for each kind.
    rows = {
        each.get("class"): each.get("d", "").count("M")
        for each in drawing.iter()
        if each.tag.endswith("path") and "slice F" in each.get("class", "")
    }
    assert rows["slice F"] == 8
    assert {"forward", "backward", "memory"} <= set(texts)


def test_how_each_operator_is_cut(files):
    """Columns, then rows: Megatron-LM's cut, with the stream between cut along the tokens."""
    shown = plan(files, "--top", "1", "--operators", "parallel.tp=4", "parallel.dp_shard=2")
    cut = {line.split("  ")[0].split(" ×")[0]: line for line in shown.stdout.splitlines()}
    assert " heads " in cut["self_attn.q_proj"] + " "
    assert "channels" in cut["mlp.up_proj"] and "channels" in cut["mlp.down_proj"]
    assert "vocabulary" in cut["lm_head"]
    alone = plan(files, "--top", "1", "--operators", "parallel.dp_shard=8")
    assert "No operator is cut" in alone.stdout


def test_mistakes_are_told_together(files):
    (files / "machine.yaml").write_text("pools: {a: {device: A100, nodes: none}}")
    error = plan(files).exception
    assert isinstance(error, UserError)
    assert {mistake.key for mistake in error.mistakes} == {"pools.a.device.like", "pools.a.nodes"}
    (files / "machine.yaml").write_text(MACHINE)
    error = plan(files, "--what-if", "pools.eight.nods=3").exception
    assert isinstance(error, UserError) and "did you mean `nodes`?" in str(error)
    error = plan(files, "parallel.tp=3").exception
    assert isinstance(error, UserError)


def test_without_a_file_the_machine_at_hand_is_planned_for(files):
    asked = []

    def machine() -> Machine:
        asked.append(1)
        return Machine(1, "cpu", 2, 16 * 10**9)

    recipe = files / "recipe.yaml"
    small = ["model.preset=4m", "model.config.vocab_size=512", "tokenizer=bytes"]
    shorter = ["data.sequence_length=256"]
    found = answer(recipe, small, top=1, changes=shorter, machine=machine)
    assert len(asked) == 1
    assert "this machine" in found.lines()[0]
    winner = found.ranking.winner
    assert winner is not None and winner.plan.device == "cpu" and winner.plan.world_size <= 2
    assert found.changed is not None and found.changed.after.winner is not None
    with pytest.raises(UserError, match="is of a machine's file, and none is given"):
        answer(recipe, small, changes=["pools.here.nodes=2"], machine=machine)

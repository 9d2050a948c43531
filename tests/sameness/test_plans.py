"""A choice of plans of several families, each against one process: `trainwright verify`'s work."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tests.conftest import REPOSITORY
from tests.sameness.checks import config_of, plan_of, recipe_of
from trainwright.cli.main import app
from trainwright.errors import UserError
from trainwright.planner.combinations import dimensions
from trainwright.recipe.load import load_recipe
from trainwright.recipe.schema import Recipe
from trainwright.training import verify
from trainwright.training.sameness import Outcome
from trainwright.training.shrink import shrunk

QUICKSTART = REPOSITORY / "examples" / "quickstart.yaml"
MIXTURE = REPOSITORY / "examples" / "mixture-of-experts.yaml"
SCHEDULES = {"gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"}

# Family, keys of its config, settings, workers, plans. Together: every axis, schedule and method,
# tied and untied embeddings, windows, soft caps, fused projections, latent attention, dropout.
CASES = [
    ("llama", {"tie_word_embeddings": True}, {}, 4, 4),
    ("llama", {}, {"dropout": 0.2}, 4, 3),
    ("gemma2", {"sliding_window": 16}, {}, 4, 3),
    ("phi3", {}, {}, 2, 3),
    ("olmo2", {}, {}, 2, 3),
    ("mixtral", {"num_local_experts": 8}, {"router_balance_loss": 0.01}, 4, 3),
    ("deepseek_v3", {}, {"router_z_loss": 0.001}, 4, 2),
]


def outcomes(recipe: Recipe, config: dict, workers: int, count: int, monkeypatch) -> list[Outcome]:
    """What `verify` finds for a config of the test's own."""
    monkeypatch.setattr(verify, "small_config", lambda recipe: config)
    return list(verify.verify(recipe, world_size=workers, plans=count))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "keys", "training", "workers", "count"),
    CASES,
    ids=[
        f"{family} {'+'.join([*keys, *training])}".strip() for family, keys, training, *_ in CASES
    ],
)
def test_plans_train_as_one_process_does(family, keys, training, workers, count, monkeypatch):
    recipe, config = recipe_of(family, **training), config_of(family, **keys)
    found = outcomes(recipe, config, workers, count, monkeypatch)
    assert len(found) == count
    for outcome in found:
        assert outcome.passed, f"{verify.in_words(outcome.plan)}: {outcome}"


# Objective, adapter, workers, plans.
FINE_TUNING = [
    ({"kind": "sft"}, {"rank": 4}, 4, 3),
    ({"kind": "dpo", "loss": {"sigmoid": 1.0, "sft": 0.3}}, None, 4, 3),
    (
        {"kind": "dpo"},
        {"rank": 4, "dora": True, "targets": ["q_proj", "o_proj", "down_proj"]},
        2,
        3,
    ),
    ({"kind": "kto"}, {"rank": 4, "init": "pissa"}, 2, 2),
    ({"kind": "simpo"}, {"rank": 4, "quantise": "int8", "dropout": 0.1}, 2, 2),
    ({"kind": "distill", "teacher": "unread", "mix": 0.3}, None, 4, 3),
    ({"kind": "distill", "teacher": "unread", "beta": 0}, {"rank": 4}, 2, 2),
    ({"kind": "orpo"}, {"rank": 4, "quantise": "nf4", "train_also": ["lm_head"]}, 2, 2),
    ({"kind": "reward", "center": 0.1}, None, 4, 3),
    ({"kind": "reward"}, {"rank": 4, "targets": ["q_proj", "down_proj"]}, 4, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "adapter", "workers", "count"),
    FINE_TUNING,
    ids=[f"{o['kind']} {'+'.join(map(str, a or ['whole']))}" for o, a, *_ in FINE_TUNING],
)
def test_fine_tuning_plans_train_as_one_process_does(
    objective, adapter, workers, count, monkeypatch
):
    plain = recipe_of("llama").model_dump(exclude_unset=True)
    recipe = Recipe.model_validate(plain | {"objective": objective, "adapter": adapter})
    config = config_of("llama", scores=recipe.objective.gives_scores)
    found = outcomes(recipe, config, workers, count, monkeypatch)
    assert len(found) == count
    for outcome in found:
        assert outcome.passed, f"{verify.in_words(outcome.plan)}: {outcome}"


def test_the_default_choice_has_every_dimension_and_schedule():
    recipe = load_recipe(QUICKSTART)
    legal = verify.legal_plans(verify.settings_of(recipe), verify.small_config(recipe), 8)
    chosen = verify.choose(legal, 100, 0)
    assert len(set(chosen)) == 100
    having = {axis for plan in chosen for axis in dimensions(plan)}
    assert having == {"pp", "dp_replicate", "dp_shard", "cp", "tp"}
    assert {plan.schedule for plan in chosen if plan.pp > 1} == SCHEDULES
    assert {plan.zero for plan in chosen} == {0, 1, 2, 3}
    assert {plan.cp_method for plan in chosen if plan.cp > 1} == {"ring", "all_gather", "ulysses"}
    assert sum(len(dimensions(plan)) >= 3 for plan in chosen) >= 25
    assert verify.choose(legal, 100, 0) == chosen
    assert verify.choose(legal, 100, 1) != chosen


def test_the_default_choice_for_a_mixture_has_many_plans_with_experts_over_workers():
    recipe = load_recipe(MIXTURE)
    legal = verify.legal_plans(verify.settings_of(recipe), verify.small_config(recipe), 8)
    assert sum(plan.ep > 1 for plan in verify.choose(legal, 100, 0)) >= 30


@pytest.mark.slow
def test_the_command_prints_a_line_a_plan():
    result = CliRunner().invoke(
        app, ["verify", str(QUICKSTART), "--world-size", "2", "--plans", "3", "--json"]
    )
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(records) == 3
    assert all(record["passed"] and record["loss"] <= 1e-5 for record in records)


def test_the_command_fails_where_a_plan_does(monkeypatch):
    plan = plan_of(2, tp=2)
    wrong = Outcome(plan, loss=1e-3, gradient=0.5, name="model.norm.weight", norm=0.1)
    monkeypatch.setattr(verify, "verify", lambda *arguments, **options: iter([wrong]))
    result = CliRunner().invoke(app, ["verify", str(QUICKSTART)])
    assert result.exit_code == 1
    assert "tp 2" in result.stdout and "model.norm.weight" in result.stdout
    assert "FAIL" in result.stdout and "1 failed" in result.stdout


def test_a_plan_that_breaks_is_an_outcome_and_the_next_one_runs(tmp_path):
    from trainwright.training.pool import WorkerPool
    from trainwright.training.sameness import write_reference
    from trainwright.training.shrink import SEQUENCE

    recipe, config = recipe_of(), config_of("llama")
    write_reference(tmp_path, recipe, config, SEQUENCE)
    question = verify.Question(recipe, config, tmp_path)
    with WorkerPool(2) as pool:
        broken = verify.ask(pool, question, plan_of(2, tp=2, cp_method="none", pp=1, cp=1, ep=3))
        good = verify.ask(pool, question, plan_of(2, tp=2))
    assert not broken.passed and "ank" in broken.error
    assert good.passed


def test_a_model_of_no_family_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16)).save_pretrained(
        tmp_path
    )
    section = Recipe.model_validate(
        {
            "name": "foreign",
            "model": {"path": str(tmp_path)},
            "tokenizer": {"path": "bytes"},
            "data": {"sources": ["python-stdlib"]},
            "training": {"steps": 1},
        }
    ).model
    with pytest.raises(UserError, match="no family gpt2"):
        verify.small_config(recipe_of().model_copy(update={"model": section}))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "smollm3", "phi3", "deepseek_v3"])
def test_a_shrunk_config_is_of_the_same_kind(family):
    from trainwright.models.families import decoder_config, new_hf_config
    from trainwright.recipe.presets import PRESETS

    size = {"llama": "8b", "gemma3_text": "4b", "deepseek_v3": "671b"}.get(family)
    keys = PRESETS[family][size or next(iter(PRESETS[family]))]
    large = decoder_config(new_hf_config(family, keys, 4096))
    small = decoder_config(shrunk(large.hf))
    for name in (
        "family",
        "norms",
        "qk_norm",
        "tied_embeddings",
        "fused_projections",
        "activation",
    ):
        assert getattr(small, name) == getattr(large, name)
    assert (small.num_kv_heads < small.num_heads) == (large.num_kv_heads < large.num_heads)
    windows = {window is not None for window in large.layer_windows}
    assert {window is not None for window in small.layer_windows} == windows
    assert (small.experts is None) == (large.experts is None)

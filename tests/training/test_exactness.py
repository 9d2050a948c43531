"""However a batch is cut up and spread, it is the same batch, the same loss, the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.runs import SHAPE, Recorder, assemble_here, small_recipe, train_here
from tests.training.tuning import AskToStop
from tests.workers import run_on
from trainwright.data.prepare import open_data
from trainwright.optim.schedules import learning_rate
from trainwright.training.metrics import read_metrics

pytestmark = pytest.mark.slow

VARIANTS = {
    "2 x 4 accumulated": (1, {"parallel": {"micro_batch": 4}}),
    "8 x 1 accumulated": (1, {"parallel": {"micro_batch": 1}}),
    "recompute full": (1, {"training": {"recompute": "full"}}),
    "recompute selective": (1, {"training": {"recompute": "selective"}}),
    "compiled": (1, {"training": {"compile": True}}),
    "2 workers": (2, {"parallel": {"workers": 2, "micro_batch": 4}}),
    "2 workers, accumulated": (2, {"parallel": {"workers": 2, "micro_batch": 1}}),
    "2 shards": (2, {"parallel": {"workers": 2, "dp_shard": 2, "micro_batch": 2}}),
    "2 shards, recompute": (
        2,
        {
            "parallel": {"workers": 2, "dp_shard": 2, "micro_batch": 4},
            "training": {"recompute": "full"},
        },
    ),
    "2 replicas of 2 shards": (
        4,
        {"parallel": {"workers": 4, "dp_replicate": 2, "dp_shard": 2, "micro_batch": 2}},
    ),
    "2 tensor parallel": (2, {"parallel": {"workers": 2, "tp": 2, "micro_batch": 4}}),
    "2 context parallel": (2, {"parallel": {"workers": 2, "cp": 2, "micro_batch": 4}}),
    "2 stages": (2, {"parallel": {"workers": 2, "pp": 2, "micro_batch": 2}}),
    "2 stages, recompute by layer": (
        2,
        {
            "parallel": {
                "workers": 2,
                "pp": 2,
                "recompute_by_layer": ["full", "selective"],
                "micro_batch": 2,
            }
        },
    ),
    "2 stages, zero bubble, tensor parallel": (
        4,
        {
            "parallel": {
                "workers": 4,
                "pp": 2,
                "tp": 2,
                "schedule": "zero_bubble",
                "virtual_stages": 1,
                "micro_batch": 2,
            }
        },
    ),
    "2 stages of 2 shards, zero 1": (
        4,
        {"parallel": {"workers": 4, "pp": 2, "dp_shard": 2, "zero": 1, "micro_batch": 1}},
    ),
    "2 shards, offloaded optimizer": (
        2,
        {"parallel": {"workers": 2, "dp_shard": 2, "offload": "optimizer", "micro_batch": 4}},
    ),
    "replicas of 6 and 2 rows": (
        2,
        {"parallel": {"workers": 2, "rows_by_replica": [6, 2], "micro_batch": 2}},
    ),
    "pipelines of 3 and 5 rows": (
        4,
        {"parallel": {"workers": 4, "rows_by_replica": [3, 5], "pp": 2, "micro_batch": 1}},
    ),
    "4 shards, uneven": (4, {"parallel": {"workers": 4, "dp_shard": 4, "micro_batch": 1}}),
}


# Bytes and three special tokens, and one more, so that tp may cut the vocabulary.
EVEN = {**SHAPE, "vocab_size": 260}


def train_variant(folder: str, sections: dict) -> Recorder:
    return train_here(small_recipe(Path(folder), **{"model": {"config": EVEN}, **sections}))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Recorder:
    return train_variant(str(tmp_path_factory.mktemp("plain")), {})


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layout_trains_as_one_process_does(name, plain, tmp_path):
    world, sections = VARIANTS[name]
    if world == 1:
        got = train_variant(str(tmp_path), sections)
    else:
        small_recipe(tmp_path)  # the texts, before several processes want them
        got, *others = run_on(world, train_variant, str(tmp_path), sections)
        assert all(other.losses == got.losses for other in others)
    assert got.hashes == plain.hashes
    assert got.losses[0] == pytest.approx(plain.losses[0], rel=1e-6)
    assert got.norms[0] == pytest.approx(plain.norms[0], rel=1e-5)
    assert got.losses == pytest.approx(plain.losses, rel=1e-5)


def train_half(folder: str, sections: dict) -> Recorder:
    """The first ten steps, then stopped as by a signal, with a checkpoint."""
    assembled = assemble_here(small_recipe(Path(folder), model={"config": EVEN}, **sections))
    trainer, recorder = assembled.trainer, Recorder()
    trainer.hooks = [recorder, AskToStop(trainer, 10), *trainer.hooks]
    assembled.close(trainer.run())
    return recorder


@pytest.mark.parametrize("parts", [[[6, 2], None], [[3, 5], [7, 1]], [None, [2, 6]]])
def test_a_run_goes_on_with_other_parts_of_a_batch(parts, plain, tmp_path):
    """None is one process."""
    small_recipe(tmp_path)
    done = []
    for half, rows in zip((train_half, train_variant), parts, strict=True):
        workers = 1 if rows is None else 2
        sections = {"parallel": {"workers": workers, "rows_by_replica": rows, "micro_batch": 1}}
        done.append(run_on(workers, half, str(tmp_path), sections)[0])
    assert [len(each.losses) for each in done] == [10, 10]
    assert done[0].hashes + done[1].hashes == plain.hashes
    assert done[0].losses + done[1].losses == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.parametrize("shards", [1, 2])
def test_muon_on_shards_trains_as_one_process_does(shards, tmp_path):
    optimizer = {"name": "muon", "learning_rate": 1e-2}
    plain = train_variant(str(tmp_path), {"optimizer": optimizer})
    sections = {
        "optimizer": optimizer,
        "run_directory": str(tmp_path / "spread"),
        "parallel": {"workers": 2, "dp_shard": shards, "micro_batch": 4},
    }
    got, _ = run_on(2, train_variant, str(tmp_path), sections)
    assert got.losses == pytest.approx(plain.losses, rel=1e-4)
    assert plain.losses[-1] < 0.9 * plain.losses[0]


def test_the_loop_equals_a_plain_loop_over_transformers(plain, tmp_path):
    """An independent trainer: transformers' model, torch's loss and AdamW, padding masked out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    recipe = small_recipe(tmp_path, model={"config": EVEN})
    assembled = assemble_here(recipe)
    config = assembled.trainer.step.spread.model.config
    model = LlamaForCausalLM(LlamaConfig(**config.hf, attn_implementation="eager"))
    model.load_state_dict(assembled.trainer.step.spread.model.state_dict(), strict=True)
    assembled.store.close()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    data = open_data(Path(recipe.run_directory)).train
    losses, norms = [], []
    for step in range(20):
        batch = data.batch(step)
        ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
        mask = torch.ones_like(ids)
        if batch.segment_ids is not None:
            mask = torch.from_numpy(batch.segment_ids >= 0).long()
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100
        )
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 20, 3e-3, recipe.schedule)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert plain.losses == pytest.approx(losses, rel=1e-5)
    assert plain.norms == pytest.approx(norms, rel=1e-4)
    assert plain.losses[-1] < 0.8 * plain.losses[0]


LAYOUTS = [
    {"workers": 2},
    {"workers": 2, "dp_shard": 2},
    {"workers": 2, "tp": 2},
    {"workers": 2, "cp": 2},
    {"workers": 2, "pp": 2, "schedule": "zbv", "micro_batch": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: " ".join(list(layout)[-2:]))
def test_held_out_loss_and_samples_do_not_depend_on_the_layout(layout, tmp_path):
    expected = run_on(1, evaluate_variant, str(tmp_path / "1"), {"workers": 1})[0]
    got = run_on(2, evaluate_variant, str(tmp_path / "2"), layout)
    for loss, _ in got:
        assert loss == pytest.approx(expected[0], rel=1e-6)
    assert got[0][1] == expected[1]
    assert expected[1] and all(expected[1])


def evaluate_variant(folder: str, parallel: dict) -> tuple[float, list[str]]:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    recipe = small_recipe(
        path,
        model={"config": {**EVEN, "num_hidden_layers": 4}},
        parallel={"micro_batch": 4, **parallel},
        evaluation={"every": 1000, "samples": {"prompts": ["the cat", "a"], "max_new_tokens": 12}},
    )
    assembled = assemble_here(recipe)
    hook = assembled.trainer.hooks[-2]
    hook.after_step(20, assembled.trainer.step, 0.0, True)
    assembled.store.close()
    if assembled.writer is None:
        return hook.newest[1], []
    assembled.writer.close()
    records = read_metrics(Path(recipe.run_directory))
    return hook.newest[1], [r["completion"] for r in records if r["kind"] == "sample"]

"""Peers that really train: what they gather, what they agree on, what a stop and return change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import REPOSITORY
from trainwright.models.families import new_hf_config
from trainwright.parallel.world import World
from trainwright.planner.plan import Plan
from trainwright.recipe.schema import Recipe
from trainwright.swarm.identity import Identity
from trainwright.training.evaluate import batch_loss
from trainwright.training.gathering import Gathering
from trainwright.training.launch import INTERRUPTED
from trainwright.training.pool import WorkerPool
from trainwright.training.reference import give_back
from trainwright.training.sameness import Trial, made_batch, rows_of

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SMALL = [
    "model.config={hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, "
    "num_attention_heads: 2, num_key_value_heads: 2, tie_word_embeddings: true}",
    "data.sources=[{kind: python-stdlib, limit: 60}]",
    "data.validation=0.2",
    "data.sequence_length=64",
    "tokenizer.train.vocab_size=512",
    "training.batch_sequences=4",
    "evaluation.samples.prompts=[]",
    "swarm.deadline=60",
]


def trial(plan: Plan, rank: int) -> Trial:
    """A small model, spread as the plan says."""
    recipe = Recipe.model_validate(
        {
            "name": "gathered",
            "model": {"family": "llama", "config": SHAPE},
            "tokenizer": {"path": "bytes"},
            "data": {"sources": ["python-stdlib"], "sequence_length": 64},
            "training": {"steps": 1, "batch_sequences": 16},
        }
    )
    world = World(rank, plan.world_size, torch.device("cpu"))
    return Trial(recipe, new_hf_config("llama", SHAPE, 64), plan, world)


def gathered(plan: Plan) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """In a worker: the weights, and what they are after other ones were put in their place twice,
    with a forward pass in between, which leaves sharded weights gathered.
    """
    one = trial(plan, torch.distributed.get_rank())
    gathering = Gathering(one.model)
    first = gathering.weights()
    gathering.put_back(None if first is None else first + 1)
    own = plan.rows_of(one.model.mesh.index("data"))
    batch = rows_of(made_batch(0, rows=16, sequence=64, vocabulary=64, seed=0), own)
    with torch.no_grad():
        batch_loss(one.model, one.step.objective, batch, micro_batch=plan.micro_batch)
    gathering.put_back(None if first is None else torch.arange(len(first)) / 7)
    one.train(0)  # what was only a copy is gone after it
    for optimizer in one.optimizers:
        optimizer.zero_grad()
    gathering.put_back(None if first is None else torch.arange(len(first)) / 7)
    give_back(one.model)
    return first, gathering.weights()


@pytest.mark.slow
def test_every_layout_gathers_the_same_weights_and_takes_others():
    """Replicas, shards, cut matrices, stages with a tied embedding on both ends."""
    common = replace(Plan.alone(), micro_batch=4, sequence_length=64)
    alone = Gathering(trial(replace(common, accumulation=4), 0).model).weights()
    ways = [
        {"dp_shard": 2, "zero": 3, "tp": 2},
        {"pp": 2, "stage_layers": (1, 1), "dp_replicate": 2},
        {"dp_replicate": 2, "dp_shard": 2, "zero": 2},
    ]
    with WorkerPool(4) as pool:
        for way in ways:
            plan = replace(common, world_size=4, **way)
            plan = replace(plan, accumulation=16 // (plan.data_ranks * 4))
            (first, then), *others = pool.run(gathered, plan, timeout=120)
            assert torch.equal(first, alone), way
            assert torch.equal(then, torch.arange(len(alone)) / 7), way
            assert others == [(None, None)] * 3


def trainwright(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "trainwright", "swarm", *words]


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRAINWRIGHT_CACHE": str(folder / "cache"),
    }


def call(folder: Path, *words: str) -> str:
    done = subprocess.run(
        trainwright(folder, *words),
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def start(folder: Path, *more: str, url: str = "shared") -> str:
    recipe = str(REPOSITORY / "examples" / "swarm.yaml")
    return call(folder, "start", recipe, "--run", url, "--directory", "p0", *SMALL, *more)


def join(folder: Path, peer: int, *more: str, url: str = "shared") -> subprocess.Popen[bytes]:
    log = (folder / f"p{peer}.log").open("ab")
    command = trainwright(folder, "join", url, "--directory", f"p{peer}", *more)
    return subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=log, stderr=log)


def same_peers(folder: Path, keys: Path) -> None:
    """Have peers 0 and 1 be the same in every folder, so with the same order of data."""
    for peer in range(2):
        key, own = keys / f"{peer}.pem", folder / f"p{peer}" / "swarm"
        Identity.kept_at(key)
        own.mkdir(parents=True)
        shutil.copy(key, own / "key.pem")


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / name).glob("*.safetensors")
    return load_file(file)


def rounds(folder: Path, peer: int) -> list[dict]:
    lines = (folder / f"p{peer}" / "swarm" / "swarm.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == "round"]


def ended(folder: Path, *processes: subprocess.Popen[bytes]) -> None:
    for number, process in enumerate(processes):
        code = process.wait(timeout=300)
        assert code == 0, (folder / f"p{number}.log").read_text()[-3000:]


@pytest.mark.slow
def test_two_peers_end_with_the_weights_that_can_be_fetched(tmp_path):
    """One of them on two workers, which share each of its batches. By the page's own commands."""
    page = (REPOSITORY / "docs" / "swarm.md").read_text()
    for command in (
        "start examples/swarm.yaml --run shared",
        "join shared --name anna",
        "status shared",
        "export shared swarm-model",
    ):
        assert f"    trainwright swarm {command}\n" in page
    start(tmp_path, "training.steps=6", "swarm.inner_steps=2")
    peers = join(tmp_path, 0), join(tmp_path, 1, "parallel.dp_shard=2", "parallel.zero=3")
    ended(tmp_path, *peers)
    assert "after 3 rounds" in call(tmp_path, "export", "shared", "model")
    found = [weights(tmp_path, name) for name in ("p0/export", "p1/export", "model")]
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])
    assert [line["round"] for line in rounds(tmp_path, 0)] == [0, 1, 2]
    assert {len(line["peers"]) for line in rounds(tmp_path, 1)} == {2}
    assert "left" in call(tmp_path, "status", "shared")


def test_a_place_without_a_run_is_refused(tmp_path):
    done = subprocess.run(
        trainwright(tmp_path, "status", str(tmp_path)), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "no run at this place" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.prove
@pytest.mark.parametrize("method", ["diloco", "sparseloco", "streaming", "demo"])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, method):
    """Two runs of the same two peers: one in one go, one stopped in the middle of a round."""
    more = ["training.steps=24", f"swarm.method={method}", "optimizer.learning_rate=1e-3"]
    more += ["swarm.trust.scores=false"]  # they count when they are there in time
    more += ["swarm.inner_steps=" + ("1" if method == "demo" else "6")]
    found = []
    for name in ("whole", "stopped"):
        folder = tmp_path / name
        same_peers(folder, tmp_path)
        start(folder, *more)
        peers = [join(folder, 0), join(folder, 1)]
        if name == "stopped":
            while not all(
                (folder / f"p{peer}" / "swarm" / "swarm.jsonl").exists() for peer in (0, 1)
            ):
                time.sleep(0.05)
            for process in peers:
                process.send_signal(signal.SIGINT)
            assert [process.wait(timeout=120) for process in peers] == [INTERRUPTED] * 2
            peers = [join(folder, 0), join(folder, 1)]
        ended(folder, *peers)
        found.append(weights(folder, "p0/export"))
        other = weights(folder, "p1/export")
        assert all(torch.equal(values, other[name]) for name, values in found[-1].items())
    whole, stopped = found
    assert all(torch.equal(values, stopped[name]) for name, values in whole.items())

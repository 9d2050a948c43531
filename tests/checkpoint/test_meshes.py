"""A checkpoint knows nothing of the mesh that wrote it: every pair of meshes, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.sameness.checks import config_of, plan_of, recipe_of
from tests.workers import run_on
from trainwright.checkpoint.integrity import open_manifest
from trainwright.checkpoint.parts import Part, part_of
from trainwright.checkpoint.state import load_training_state, training_tensors
from trainwright.checkpoint.storage import read_tensor
from trainwright.checkpoint.store import CheckpointStore
from trainwright.parallel.world import World
from trainwright.training.sameness import Trial

FOUR, EIGHT = (2, 2, 2, 2), (1,) * 8
# Every kind of mesh of up to four workers, by name; a mixture, so that ep is among them.
MESHES: dict[str, tuple[int, dict]] = {
    "one": (1, {}),
    "replicas 2": (2, {"dp_replicate": 2}),
    "zero-1 2": (2, {"dp_shard": 2, "zero": 1}),
    "zero-3 2": (2, {"dp_shard": 2, "zero": 3}),
    "experts 2": (2, {"dp_shard": 2, "ep": 2, "zero": 3}),
    "tensor 2": (2, {"tp": 2}),
    "context 2": (2, {"cp": 2}),
    "pipeline 2": (2, {"pp": 2, "stage_layers": (3, 5)}),
    "v 2": (2, {"pp": 2, "schedule": "zbv", "virtual_stages": 2, "stage_layers": FOUR}),
    "replicas 4": (4, {"dp_replicate": 4}),
    "hybrid 4": (4, {"dp_replicate": 2, "dp_shard": 2, "zero": 3}),
    "experts and shards 4": (4, {"dp_shard": 4, "ep": 2, "zero": 2}),
    "tensor 4": (4, {"tp": 4}),
    "tensor and shards 4": (4, {"tp": 2, "dp_shard": 2, "zero": 3}),
    "tensor and experts 4": (4, {"tp": 2, "dp_shard": 2, "ep": 2, "zero": 1}),
    "context and shards 4": (4, {"cp": 2, "dp_shard": 2, "zero": 3}),
    "pipeline and tensor 4": (
        4,
        {
            "pp": 2,
            "tp": 2,
            "schedule": "interleaved",
            "virtual_stages": 2,
            "stage_layers": FOUR,
        },
    ),
    "pipeline and experts 4": (
        4,
        {"pp": 2, "dp_shard": 2, "ep": 2, "zero": 3, "stage_layers": (5, 3)},
    ),
    "pipeline 4": (
        4,
        {"pp": 4, "schedule": "dualpipev", "virtual_stages": 2, "stage_layers": EIGHT},
    ),
}
TIED = {"num_local_experts": 8, "tie_word_embeddings": True}


def trial_on(name: str) -> Trial:
    world, fields = MESHES[name]
    rank = dist.get_rank() if dist.is_initialized() else 0
    plan = plan_of(world, **fields)
    return Trial(
        recipe_of("mixtral"),
        config_of("mixtral", **TIED),
        plan,
        World(rank, world, torch.device("cpu")),
    )


def save_on(name: str, folder: str) -> float:
    """Two steps on a mesh, a checkpoint, and the loss of the third."""
    trial = trial_on(name)
    for index in range(2):
        trial.train(index)
    with CheckpointStore(Path(folder) / name) as store:
        store.claim()
        tensors = training_tensors(trial.model.parts, trial.optimizers, trial.model.pieces)
        store.save(2, tensors, {}, asynchronous=False)
    return trial.train(2).loss


def load_on(name: str, folder: str, saved: list[str], fault: bool = False) -> dict[str, tuple]:
    """Each of the saved checkpoints loaded on a mesh: tensors that differ, and the next loss."""
    results = {}
    for other in saved:
        trial = trial_on(name)
        parts, pieces = trial.model.parts, trial.model.pieces
        with CheckpointStore(Path(folder) / other) as store:
            store.claim()
            load_training_state(store, 2, parts, trial.optimizers, pieces)
            if fault:
                _leave_optimizer_as_one_worker_had_it(trial)
            differing = differences(store, training_tensors(parts, trial.optimizers, pieces))
        results[other] = (differing, trial.train(2).loss)
    return results


def differences(store: CheckpointStore, state: dict) -> list[str]:
    """Names of which this worker's part is not, bit for bit, what the checkpoint holds there."""
    directory = store.directory(2)
    manifest = open_manifest(directory.parent, 2)
    wrong = []
    for name, tensor in state.items():
        part = part_of(name, tensor)
        if part is None or name.startswith("rng_"):
            continue
        assert isinstance(part, Part)
        box = tuple(
            slice(offset, offset + size)
            for offset, size in zip(part.offsets, part.local.shape, strict=True)
        )
        whole = read_tensor(directory, manifest.tensors[name])
        if not torch.equal(part.local.cpu(), whole[box]):
            wrong.append(name)
    return wrong


def _leave_optimizer_as_one_worker_had_it(trial: Trial) -> None:
    """The fault of taking rank 0's optimizer state for everybody's."""
    for optimizer in trial.optimizers:
        for values in optimizer.state.values():
            for key, value in values.items():
                own = value.to_local() if hasattr(value, "to_local") else value
                if key != "step" and dist.get_rank() and own.numel():
                    own.copy_(own.flip(0))


# The others are for `make prove`: each pair builds a model and loads a checkpoint.
FEW = ["one", "zero-3 2", "tensor 2", "v 2", "tensor and experts 4"]


@pytest.fixture(scope="module")
def saving(tmp_path_factory):
    """What gives the folder with the checkpoints of meshes, and the loss that followed each."""
    folder, losses = str(tmp_path_factory.mktemp("meshes")), {}

    def saved(names: list[str]) -> tuple[str, dict[str, float]]:
        for name in names:
            if name not in losses:
                losses[name] = run_on(MESHES[name][0], save_on, name, folder)[0]
        return folder, {name: losses[name] for name in names}

    return saved


def check_loading(name: str, folder: str, losses: dict[str, float]) -> None:
    answers = run_on(MESHES[name][0], load_on, name, folder, list(losses), timeout=600)
    for rank, results in enumerate(answers):
        for other, (differing, loss) in results.items():
            assert not differing, f"{other} → {name}, rank {rank}: {differing[:3]}"
            assert loss == pytest.approx(losses[other], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_checkpoints_load_on_other_meshes(name, saving):
    check_loading(name, *saving(FEW))


@pytest.mark.prove
@pytest.mark.parametrize("name", MESHES)
def test_every_checkpoint_loads_on_every_mesh(name, saving):
    check_loading(name, *saving(list(MESHES)))


def test_optimizer_state_that_is_not_resharded_is_caught(saving):
    folder, _ = saving(["tensor 2"])
    answers = run_on(2, load_on, "zero-3 2", folder, ["tensor 2"], True)
    differing, _ = answers[1]["tensor 2"]
    assert any(name.startswith("optimizer.") for name in differing)

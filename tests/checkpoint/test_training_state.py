"""What a checkpoint of a training run holds, under which names, and how it comes back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from tests.checkpoint import jobs
from tests.workers import run_on
from trainwright.checkpoint import storage
from trainwright.checkpoint.rng import restore_rng, rng_state, seed_everything
from trainwright.checkpoint.state import load_training_state, model_state, training_tensors
from trainwright.checkpoint.store import CheckpointStore
from trainwright.errors import UserError


def test_names() -> None:
    model = jobs.build("plain")
    optimizers = jobs.build_optimizers(model)
    jobs.train(model, optimizers, 0, 1)
    tensors = training_tensors(model, optimizers)
    assert [name for name in tensors if name.startswith("model.")] == [
        "model.counts",  # a persistent buffer; the other one is not saved
        "model.embed.weight",  # tied to the head: once, under the first name
        *(
            f"model.layers.{i}.{name}"
            for i in range(2)
            for name in ("scale", "up.weight", "up.bias", "down.weight")
        ),
    ]
    assert {name.rpartition(".")[2] for name in tensors if name.startswith("optimizer.embed")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    assert {name for name in tensors if name.startswith("optimizer.layers.0.up.weight")} == {
        "optimizer.layers.0.up.weight.momentum"
    }
    assert {name for name in tensors if name.startswith("rng")} == {
        "rng_0.torch",
        "rng_0.numpy",
        "rng_0.python",
    }
    assert tensors["model.embed.weight"] is model.embed.weight  # live, not a copy


def test_names_do_not_depend_on_wrappers() -> None:
    model = jobs.build("plain")
    names = model_state(model).keys()
    model.layers[0] = torch.compile(model.layers[0])
    assert model_state(model).keys() == names
    assert model_state(torch.compile(model)).keys() == names


def evaluate_then_describe() -> list[bool]:
    """After a forward pass alone, FSDP leaves the root's weights whole."""
    model = jobs.build("fsdp")
    trained = {id(parameter) for parameter in model.parameters()}
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64))
    assert not isinstance(model.embed.weight, DTensor), "this test tests nothing any more"
    state = model_state(model)
    del state["model.counts"]
    return [isinstance(tensor, DTensor) and id(tensor) in trained for tensor in state.values()]


def test_weights_left_whole_by_an_evaluation_are_saved_as_shards() -> None:
    for answers in run_on(2, evaluate_then_describe):
        assert len(answers) == 9 and all(answers)


def test_a_state_that_is_no_tensor_is_named() -> None:
    model = jobs.build("plain")
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.embed.weight]["count"] = 3
    with pytest.raises(TypeError, match=r"optimizer\.embed\.weight\.count is no tensor but int"):
        training_tensors(model, optimizer)


def test_another_model_or_optimizer_is_refused_by_name(tmp_path: Path) -> None:
    jobs.trained_and_saved("plain", tmp_path, 2, False)
    store = CheckpointStore(tmp_path)
    other = jobs.build("plain")
    other.extra = nn.Linear(2, 2, bias=False)
    with pytest.raises(UserError, match=r"model\.extra\.weight is not in the checkpoint of step 2"):
        load_training_state(store, 2, other, jobs.build_optimizers(other))
    model = jobs.build("plain")
    with pytest.raises(UserError, match=r"layers\.0\.up\.weight\.exp_avg is not in the check"):
        load_training_state(store, 2, model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(UserError, match=r"optimizer\.embed\.weight\.exp_avg is in the check"):
        load_training_state(store, 2, model, jobs.build_optimizers(model)[:1])


def test_parameters_without_a_state_get_none(tmp_path: Path) -> None:
    """A frozen parameter is in the optimizer, yet has no state to save or to load."""
    model = jobs.build("plain")
    model.layers[1].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    jobs.train(model, [optimizer], 0, 2)
    with CheckpointStore(tmp_path) as store:
        store.save(2, training_tensors(model, optimizer), {"a": 1})
    again = jobs.build("plain", seed=1)
    optimizer = torch.optim.AdamW(again.parameters())
    assert load_training_state(CheckpointStore(tmp_path), 2, again, optimizer) == {"a": 1}
    assert not any(optimizer.state.get(p) for p in again.layers[1].parameters())
    assert all(p.grad is None for p in again.parameters())
    jobs.train(again, [optimizer], 2, 3)


# ---- random numbers ----------------------------------------------------------------------------


def draw() -> tuple[Any, ...]:
    return (
        torch.rand(3).tolist(),
        np.random.normal(size=3).tolist(),
        np.random.randint(1000),
        random.gauss(0, 1),
        random.random(),
    )


@pytest.mark.parametrize("gaussians", [0, 1])
def test_every_generator_goes_on_where_it_was(gaussians: int) -> None:
    """Also when a second Gaussian waits to be handed out."""
    seed_everything(3)
    draw()
    for _ in range(gaussians):
        np.random.normal()
        random.gauss(0, 1)
    states = rng_state()
    expected = draw()
    seed_everything(4)
    assert draw() != expected
    restore_rng(states)
    assert draw() == expected


def save_random(root: Path) -> None:
    model = nn.Linear(2, 2)
    seed_everything(10 + dist.get_rank())
    draw()
    with CheckpointStore(root) as store:
        store.save(1, training_tensors(model, []), {})


def draw_after_load(root: Path) -> tuple[Any, ...]:
    seed_everything(99)
    load_training_state(CheckpointStore(root), 1, nn.Linear(2, 2), [], seed=42)
    return draw()


def test_each_rank_has_its_own_and_new_ranks_get_a_determined_one(tmp_path: Path) -> None:
    run_on(2, save_random, tmp_path)
    expected = []
    for rank in range(2):
        seed_everything(10 + rank)
        draw()
        expected.append(draw())
    four = run_on(4, draw_after_load, tmp_path)
    assert four[:2] == expected
    assert run_on(4, draw_after_load, tmp_path) == four
    assert len({str(drawn) for drawn in four}) == 4
    assert draw_after_load(tmp_path) == expected[0]


# ---- 8-bit states ------------------------------------------------------------------------------


def build_8bit(layout: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torchao.optim import AdamW8bit

    torch.manual_seed(seed)
    # 67 and 71 rows are cut unevenly; 670 weights are too few to be quantised.
    model = nn.Sequential(nn.Linear(256, 67), nn.Linear(67, 10), nn.Linear(256, 71, bias=False))
    if layout == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, AdamW8bit(model.parameters(), lr=0.01)


def step_8bit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                from torch.distributed.tensor import distribute_tensor

                gradient = distribute_tensor(
                    gradient, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            parameter.grad = gradient
        optimizer.step()
    optimizer.zero_grad()


def without_compiling(job: Any, *arguments: Any) -> Any:
    """torchao compiles its step, which takes long and is no matter here."""
    real = torch.compile
    torch.compile = lambda function, **_: function
    try:
        return job(*arguments)
    finally:
        torch.compile = real


def dense(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """Weights and moments as whole fp32 arrays."""
    result = {}
    for name, parameter in model.named_parameters():
        for key, value in {"weight": parameter, **optimizer.state[parameter]}.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            if hasattr(local, "dequantize"):
                local = local.dequantize()
            if isinstance(value, DTensor):
                local = DTensor.from_local(
                    local,
                    value.device_mesh,
                    value.placements,
                    shape=value.shape,
                    stride=value.stride(),
                ).full_tensor()
            result[f"{name}.{key}"] = local.detach().numpy().copy()
    return result


def save_8bit(layout: str, root: Path) -> dict[str, np.ndarray]:
    return without_compiling(_save_8bit, layout, root)


def _save_8bit(layout: str, root: Path) -> dict[str, np.ndarray]:
    model, optimizer = build_8bit(layout, seed=1)
    step_8bit(model, optimizer, 3)
    with CheckpointStore(root) as store:
        store.save(3, training_tensors(model, optimizer), {})
    return dense(model, optimizer)


def load_8bit(layout: str, root: Path) -> dict[str, np.ndarray]:
    return without_compiling(_load_8bit, layout, root)


def _load_8bit(layout: str, root: Path) -> dict[str, np.ndarray]:
    model, optimizer = build_8bit(layout, seed=2)
    load_training_state(CheckpointStore(root), 3, model, optimizer)
    return dense(model, optimizer)


def test_8bit_states_come_back_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    alone = save_8bit("plain", tmp_path / "1")
    names = CheckpointStore(tmp_path / "1").metadata(3)
    assert {name for name in names if name.startswith("optimizer.0.weight.exp_avg.")} == {
        f"optimizer.0.weight.exp_avg.{inner}" for inner in ("codes", "scale", "qmap")
    }
    assert names["optimizer.0.weight.exp_avg.codes"].dtype == torch.uint8
    assert names["optimizer.1.bias.exp_avg"].dtype == torch.float32  # too small to quantise
    two = run_on(2, save_8bit, "fsdp", tmp_path / "2")[0]
    for root, saved in (("1", alone), ("2", two)):
        for world_size, layout in ((1, "plain"), (2, "fsdp"), (4, "fsdp")):
            if world_size == 1:
                loaded = load_8bit(layout, tmp_path / root)
            else:
                loaded = run_on(world_size, load_8bit, layout, tmp_path / root)[0]
            for name, value in saved.items():
                np.testing.assert_array_equal(loaded[name], value, err_msg=f"{root} {name}")


def save_small_8bit(root: Path) -> None:
    without_compiling(_save_small_8bit, root)


def _save_small_8bit(root: Path) -> None:
    from torchao.optim import AdamW8bit

    model = nn.Linear(64, 64, bias=False)  # 4096 weights: quantised whole, not in halves
    optimizer = AdamW8bit(model.parameters())
    step_8bit(model, optimizer, 1)
    with CheckpointStore(root) as store:
        store.save(1, training_tensors(model, optimizer), {})


def load_small_8bit(root: Path) -> str:
    return without_compiling(_load_small_8bit, root)


def _load_small_8bit(root: Path) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torchao.optim import AdamW8bit

    model = fully_shard(nn.Linear(64, 64, bias=False), mesh=init_device_mesh("cpu", (2,)))
    try:
        optimizer = AdamW8bit(model.parameters())
        load_training_state(CheckpointStore(root), 1, model, optimizer)
    except UserError as error:
        return str(error)
    return ""


def test_8bit_states_that_another_world_keeps_in_32_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    save_small_8bit(tmp_path)
    for said in run_on(2, load_small_8bit, tmp_path):
        assert "optimizer.weight.exp_avg is quantised with one number of workers" in said
        assert "go on with the number of workers that saved the checkpoint" in said


# ---- beside training ---------------------------------------------------------------------------


def train_while_saving(root: Path) -> list[float]:
    """The write cannot end before the training steps after it have: their collectives overlap."""
    import threading

    model = jobs.build("fsdp")
    optimizers = jobs.build_optimizers(model)
    jobs.train(model, optimizers, 0, 1)
    trained = threading.Event()
    real = storage.write_file

    def write_file(*arguments: Any) -> Any:
        assert trained.wait(timeout=30)
        return real(*arguments)

    storage.write_file = write_file
    try:
        with CheckpointStore(root) as store:
            store.save(1, training_tensors(model, optimizers), {})
            jobs.train(model, optimizers, 1, 4)
            sums = torch.ones(1)
            dist.all_reduce(sums)
            assert store.steps() == []
            trained.set()
    finally:
        storage.write_file = real
    return [sums.item()]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    assert run_on(2, train_while_saving, tmp_path) == [[2.0], [2.0]]
    assert CheckpointStore(tmp_path).verify(1) == []


def save_uneven_8bit(root: Path) -> str:
    return without_compiling(_save_uneven_8bit, root)


def _save_uneven_8bit(root: Path) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torchao.optim import AdamW8bit

    # 66 rows over 4 ranks: 17, 17, 17 and 15, of which the last is too small to be quantised.
    model = fully_shard(nn.Linear(256, 66, bias=False), mesh=init_device_mesh("cpu", (4,)))
    optimizer = AdamW8bit(model.parameters())
    step_8bit(model, optimizer, 1)
    try:
        store = CheckpointStore(root)
        store.save(1, training_tensors(model, optimizer), {}, asynchronous=False)
    except UserError as error:
        return str(error)
    return ""


def test_8bit_states_of_some_ranks_only_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    for said in run_on(4, save_uneven_8bit, tmp_path):
        assert "optimizer.weight.exp_avg" in said and "choose `optimizer.name: adamw`" in said
    assert CheckpointStore(tmp_path).steps() == []

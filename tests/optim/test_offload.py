"""Optimizers on the host: the plain optimizer's numbers bit for bit, saved under its names."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from tests.optim.models import Model, build, step, weights
from tests.workers import run_on
from trainwright.checkpoint.state import load_training_state, training_tensors
from trainwright.checkpoint.store import CheckpointStore
from trainwright.optim.muon import Shards

NAMES = ["adamw", "muon", "adamw-8bit"]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def trained(name: str, steps: range = range(3), **options) -> tuple[Model, list]:
    model = Model()
    optimizers = build(model, name, **options)
    for number in steps:
        step(model, optimizers, number)
    return model, optimizers


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_plain_optimizer(name):
    if name == "adamw-8bit":
        pytest.importorskip("torchao")
    plain, _ = trained(name)
    offloaded, _ = trained(name, offload=True)
    assert_equal(weights(offloaded), weights(plain))


def sharded_result(name: str) -> dict:
    results = []
    for offload in (False, True):
        model = Model()
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
        optimizers = build(model, name, offload=offload)
        for number in range(3):
            step(model, optimizers, number)
        results.append({key: value.numpy() for key, value in weights(model).items()})
    return {"plain": results[0], "offloaded": results[1]}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_equals_the_plain_optimizer_on_shards(name):
    expected = weights(trained(name)[0])
    for result in run_on(2, sharded_result, name):
        for key, value in expected.items():
            assert (result["offloaded"][key] == result["plain"][key]).all(), key
            torch.testing.assert_close(torch.from_numpy(result["plain"][key]), value)


def save_and_go_on(name: str, folder: str, saver: bool, loader: bool) -> list[bool]:
    """Train 2 steps, save, load into another of the kind, go on; equal to an unbroken run?"""

    def make(offload: bool) -> tuple[Model, list]:
        model = Model()
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
        return model, build(model, name, offload=offload)

    model, optimizers = make(saver)
    for number in range(2):
        step(model, optimizers, number)
    store = CheckpointStore(Path(folder))
    store.claim()
    store.save(2, training_tensors(model, optimizers), {})
    store.wait()
    again, others = make(loader)
    step(again, others, 7)  # another state, to be written over
    load_training_state(store, 2, again, others)
    store.close()
    for number in (2, 3):
        step(model, optimizers, number)
        step(again, others, number)
    expected = weights(model)
    return [torch.equal(value, expected[key]) for key, value in weights(again).items()]


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(("saver", "loader"), [(True, True), (True, False), (False, True)])
def test_a_checkpoint_goes_on_with_and_without_offload(name, saver, loader, tmp_path):
    for answers in run_on(2, save_and_go_on, name, str(tmp_path / "store"), saver, loader):
        assert len(answers) == 7 and all(answers)


def test_states_have_the_names_of_the_models_parameters():
    model, optimizers = trained("muon", offload=True)
    plain, others = trained("muon")
    mine, theirs = training_tensors(model, optimizers), training_tensors(plain, others)
    assert mine.keys() == theirs.keys()
    assert "optimizer.layers.0.experts.down.momentum" in mine
    assert_equal(
        {k: v for k, v in mine.items() if "optim" in k},
        {k: theirs[k] for k in mine if "optim" in k},
    )


def test_weights_that_others_write_are_noticed():
    plain, optimizers = trained("adamw")
    model, offloaded = trained("adamw", offload=True)
    for each in (plain, model):
        with torch.no_grad():
            each.embed.weight.detach().mul_(0.5)
    step(plain, optimizers, 5)
    step(model, offloaded, 5)
    assert_equal(weights(model), weights(plain))


def test_a_parameter_without_a_gradient_is_left_alone():
    model, (optimizer,) = trained("adamw", offload=True)
    before = weights(model)
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    optimizer.step()
    changed = {k for k, v in weights(model).items() if not torch.equal(v, before[k])}
    assert changed == {"embed.weight"}


def test_its_own_state_dict_goes_round():
    model, (optimizer,) = trained("adamw", offload=True)
    saved, before = copy.deepcopy(optimizer.state_dict()), weights(model)
    step(model, [optimizer], 4)
    expected = weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    optimizer.load_state_dict(saved)
    step(model, [optimizer], 4)
    assert_equal(weights(model), expected)


def test_whoever_makes_matrices_whole_is_asked_about_the_models_parameters():
    model, seen = Model(), []

    class Recording(Shards):
        def whole(self, parameter, tensor):
            seen.append(id(parameter))
            return super().whole(parameter, tensor)

    optimizers = build(model, "muon", offload=True, whole=Recording())
    step(model, optimizers, 0)
    assert set(seen) == {id(p) for layer in model.layers for p in layer.parameters() if p.ndim > 1}

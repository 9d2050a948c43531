"""Paged AdamW: bitsandbytes' and torch's numbers, shards, checkpoints, pages fetched in time."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from tests.optim.models import step, weights
from tests.workers import run_on
from trainwright.checkpoint.state import load_training_state, training_tensors
from trainwright.checkpoint.store import CheckpointStore
from trainwright.errors import UserError
from trainwright.models.decoder import Decoder
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.optim.optimizers import build_optimizers, set_learning_rate
from trainwright.recipe.schema import Adapter, Optimizer
from trainwright.training.adapting import adapt

bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

NAMES = ["paged-adamw", "paged-adamw-8bit"]
# Quantised: 8,192 elements in whole blocks of 256. Not: few elements, and no whole blocks.
SHAPES = [(128, 64), (64,), (64, 30), (50, 90)]

SHAPE = {
    "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def build(model: nn.Module, name: str) -> list[torch.optim.Optimizer]:
    section = Optimizer(name=name, learning_rate=1e-2, weight_decay=0.1)
    return build_optimizers(model.parameters(), section, muon_dtype=torch.float32)


def made(shapes: list[tuple[int, ...]] = SHAPES) -> nn.ParameterList:
    generator = torch.Generator().manual_seed(0)
    return nn.ParameterList(
        nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes
    )


@pytest.fixture
def uncompiled(monkeypatch) -> None:
    """torchao compiles its step, which takes long and is no matter here."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def groups(model: nn.Module) -> list[dict]:
    """As ours are: vectors get no weight decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]


def test_32_bits_are_torch_adamw() -> None:
    model, twin = made(), made()
    optimizers = build(model, "paged-adamw")
    reference = torch.optim.AdamW(groups(twin), lr=1.0, betas=(0.9, 0.95))
    for number in range(6):
        step(model, optimizers, number)
        step(twin, [reference], number)
    for mine, theirs in zip(model, twin, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_8_bits_are_those_of_bitsandbytes() -> None:
    model, twin = made(SHAPES[:3]), made(SHAPES[:3])
    optimizers = build(model, "paged-adamw-8bit")
    reference = bnb.optim.AdamW8bit(groups(twin), lr=1.0, betas=(0.9, 0.95))
    for number in range(6):
        step(model, optimizers, number)
        step(twin, [reference], number)
    for mine, theirs in zip(model, twin, strict=True):
        assert torch.equal(mine, theirs)
    moment = optimizers[0].state[model[0]]["exp_avg"]
    assert torch.equal(moment.codes, reference.state[twin[0]]["state1"])
    assert torch.equal(moment.scale, reference.state[twin[0]]["absmax1"])
    quantised = [hasattr(optimizers[0].state[p]["exp_avg"], "codes") for p in model]
    assert quantised == [True, False, False]


class Layers(nn.Module):
    """Matrices whose halves are quantised too, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        for index, parameter in enumerate(self.parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter.data.normal_(generator=generator)


def sharded(name: str) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    model = Layers()
    fully_shard(model)
    return model, build(model, name)


def sharded_weights(name: str) -> dict:
    model, optimizers = sharded(name)
    for number in range(4):
        step(model, optimizers, number)
    return {key: value.numpy() for key, value in weights(model).items()}


@pytest.mark.parametrize("name", NAMES)
def test_shards_are_updated_as_the_whole(name: str) -> None:
    model = Layers()
    optimizers = build(model, name)
    for number in range(4):
        step(model, optimizers, number)
    for result in run_on(2, sharded_weights, name):
        for key, value in weights(model).items():
            torch.testing.assert_close(torch.from_numpy(result[key]), value, rtol=0, atol=1e-6)


def save_and_go_on(name: str, other: str, folder: str) -> list[bool]:
    """Train 2 steps, save, load under `other`, go on with both; are they equal?"""
    model, optimizers = sharded(name)
    for number in range(2):
        step(model, optimizers, number)
    store = CheckpointStore(Path(folder))
    store.claim()
    store.save(2, training_tensors(model, optimizers), {})
    store.wait()
    again, others = sharded(other)
    load_training_state(store, 2, again, others)
    store.close()
    saved, loaded = training_tensors(model, optimizers), training_tensors(again, others)
    answers = [saved.keys() == loaded.keys()]
    step(model, optimizers, 2)
    step(again, others, 2)
    for key, value in weights(again).items():
        answers.append(torch.allclose(value, weights(model)[key], rtol=0, atol=1e-6))
    return answers


@pytest.mark.parametrize(
    ("name", "other"),
    [*((name, name) for name in NAMES), ("paged-adamw", "adamw"), ("adamw", "paged-adamw")],
)
def test_a_checkpoint_goes_on_with_and_without_pages(name: str, other: str, tmp_path: Path) -> None:
    for answers in run_on(2, save_and_go_on, name, other, str(tmp_path / "store")):
        assert len(answers) == 4 and all(answers)


def test_8_bit_states_have_the_names_of_those_without_pages(uncompiled) -> None:
    paged, plain = Layers(), Layers()
    ours, theirs = build(paged, "paged-adamw-8bit"), build(plain, "adamw-8bit")
    step(paged, ours, 0)
    step(plain, theirs, 0)
    mine, other = training_tensors(paged, ours), training_tensors(plain, theirs)
    assert mine.keys() == other.keys()
    assert all(mine[name].shape == other[name].shape for name in mine)
    # Values in the middle between two codes are rounded either way.
    for name, atol in (("qmap", 0), ("scale", 0), ("codes", 1)):
        key = f"optimizer.up.weight.exp_avg.{name}"
        a, b = mine[key].double(), other[key].double()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("name", ["adamw-8bit", *NAMES])
def test_an_adapters_factors(name: str, tmp_path: Path, uncompiled) -> None:
    """They alone have states, near AdamW's steps, which a checkpoint brings back bit for bit."""

    def adapted(optimizer: str) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        model = Decoder(decoder_config(new_hf_config("llama", SHAPE, 32)))
        adapt(model, Adapter(rank=16, targets=["q_proj", "o_proj"]))
        for index, p in enumerate(model.parameters()):
            nn.init.normal_(p, generator=torch.Generator().manual_seed(index))
        return model, build(model, optimizer)

    def go(model: nn.Module, optimizers: list, numbers: range) -> dict[str, Tensor]:
        for number in numbers:
            step(model, optimizers, number)
        return {key: p.detach().clone() for key, p in model.named_parameters() if "lora" in key}

    model, optimizers = adapted(name)
    first = go(model, optimizers, range(4))
    assert len(optimizers[0].state) == len(first) == 4
    plain = go(*adapted("adamw"), range(4))
    start = {key: p.detach() for key, p in adapted(name)[0].named_parameters() if key in plain}
    for key, value in plain.items():
        assert (first[key] - value).norm() < 0.05 * (value - start[key]).norm()
    with CheckpointStore(tmp_path) as store:
        store.claim()
        store.save(4, training_tensors(model, optimizers), {})
        store.wait()
        again, others = adapted(name)
        load_training_state(store, 4, again, others)
    expected = go(model, optimizers, range(4, 6))
    for key, value in go(again, others, range(4, 6)).items():
        assert torch.equal(value, expected[key]), key


def test_its_own_state_dict_goes_round() -> None:
    model = made()
    optimizers = build(model, "paged-adamw")
    step(model, optimizers, 0)
    saved = copy.deepcopy(optimizers[0].state_dict())
    twin = copy.deepcopy(model)
    others = build(twin, "paged-adamw")
    others[0].load_state_dict(saved)
    step(model, optimizers, 1)
    step(twin, others, 1)
    assert all(torch.equal(a, b) for a, b in zip(model, twin, strict=True))


def paged_steps(name: str) -> tuple[list[int], int]:
    """Bytes fetched in each step, and how often the device was waited for: pages made of our own.

    There is no unified memory on a CPU, so that tensors marked as pages stand in for it.
    """
    model, (optimizer,) = sharded(name)
    fetched, waits, zeros = [], [], optimizer._zeros

    def pages(own: Tensor, dtype: torch.dtype) -> Tensor:
        made = zeros(own, dtype)
        made.is_paged = own.numel() >= 4096
        return made

    kernels = type(sys)("kernels")
    vars(kernels).update(vars(optimizer.kernels))
    kernels.prefetch_tensor = lambda tensor: fetched.append(tensor.nbytes)
    optimizer._zeros, optimizer.kernels = pages, kernels
    synchronize, torch.cuda.synchronize = torch.cuda.synchronize, lambda: waits.append(1)
    try:
        for number in range(2):
            step(model, [optimizer], number)
    finally:
        torch.cuda.synchronize = synchronize
    return fetched, len(waits)


@pytest.mark.parametrize(("name", "width"), [("paged-adamw", 4), ("paged-adamw-8bit", 1)])
def test_pages_are_fetched_before_a_step_and_awaited_after_it(name: str, width: int) -> None:
    for fetched, waits in run_on(2, paged_steps, name):
        assert fetched == 2 * 2 * [4096 * width, 4096 * width]  # steps, matrices, moments
        assert waits == 2


def test_rates_and_factors_reach_every_group() -> None:
    model = made()
    factors = {model[0]: 16.0}
    optimizers = build_optimizers(
        model.parameters(), Optimizer(name=NAMES[1]), muon_dtype=torch.float32, factors=factors
    )
    set_learning_rate(optimizers, 0.5)
    rates = {id(p): g["lr"] for o in optimizers for g in o.param_groups for p in g["params"]}
    assert [rates[id(p)] for p in model] == [8.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(("name", "package"), [(NAMES[0], "bitsandbytes"), (NAMES[1], "torchao")])
def test_a_missing_package_is_named(name: str, package: str, monkeypatch) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"`{name}` needs the package {package}"):
        build(made(), name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "share"), [(NAMES[0], 0.001), (NAMES[1], 0.05)])
def test_on_a_gpu_states_are_pages_and_go_through_checkpoints(
    name: str, share: float, tmp_path: Path
) -> None:
    def made_there(optimizer: str) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        model = nn.Linear(1024, 1024, bias=False, device="cuda")
        nn.init.constant_(model.weight, 0.5)
        return model, build(model, optimizer)

    def go(model: nn.Linear, optimizers: list, numbers: range) -> None:
        for number in numbers:
            generator = torch.Generator("cuda").manual_seed(number)
            shape, device = model.weight.shape, model.weight.device
            model.weight.grad = torch.randn(shape, generator=generator, device=device)
            optimizers[0].step()
            model.weight.grad = None

    model, optimizers = made_there(name)
    before = torch.cuda.memory_allocated()
    go(model, optimizers, range(3))
    moment = optimizers[0].state[model.weight]["exp_avg"]
    assert getattr(moment, "codes", moment).is_paged
    assert torch.cuda.memory_allocated() - before < 1024 * 1024 // 8  # no moment is on the device
    plain, others = made_there("adamw")
    go(plain, others, range(3))
    assert (model.weight - plain.weight).norm() < share * (plain.weight - 0.5).norm()
    with CheckpointStore(tmp_path) as store:
        store.claim()
        store.save(3, training_tensors(model, optimizers), {})
        store.wait()
        again, loaded = made_there(name)
        load_training_state(store, 3, again, loaded)
    go(model, optimizers, range(3, 5))
    go(again, loaded, range(3, 5))
    assert torch.equal(model.weight, again.weight)

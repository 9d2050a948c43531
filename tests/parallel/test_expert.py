"""Experts on several workers compute what they compute in one process: outputs and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.models.cases import hf_config, randomise
from tests.workers import run_on
from trainwright.checkpoint.export import export_checkpoint
from trainwright.checkpoint.state import training_tensors
from trainwright.checkpoint.store import CheckpointStore
from trainwright.models.decoder import Decoder, Span
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.models.moe import SparseMLP
from trainwright.models.router_balance import (
    router_metrics,
    set_router_losses,
    set_router_scale,
    take_router_loads,
    update_router_biases,
)
from trainwright.models.weights import initialise, load_model, load_weights, new_model, save_model
from trainwright.objectives.next_token import next_token_loss
from trainwright.parallel.expert import ExpertParallel
from trainwright.parallel.spread import SpreadModel, spread
from trainwright.parallel.world import World
from trainwright.planner.plan import Plan

# A layer by itself, over plain groups.


def sparse_layer(name: str) -> SparseMLP:
    torch.manual_seed(0)
    layer = SparseMLP(decoder_config(hf_config(name)))
    randomise(layer)
    return layer.double()


def tokens_of(rank: int) -> Tensor:
    """A worker's tokens: each has another number of them."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(1, 5 + 2 * rank, 48, generator=generator, dtype=torch.float64)


def upstream_of(x: Tensor) -> Tensor:
    return torch.cos(x * 3)


def run_layer(name: str, target: int | None = None, fault: str = "") -> dict[str, Any]:
    """On a worker: the layer on its own tokens; `target` sends all of them to that one expert."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    layer = sparse_layer(name)
    own = layer.experts.total // workers
    for key, whole in list(layer.experts.named_parameters()):
        part = whole.detach()[rank * own : (rank + 1) * own].clone()
        setattr(layer.experts, key, nn.Parameter(part))
        if fault == "scaled":
            getattr(layer.experts, key).register_hook(lambda gradient: gradient * workers)
    layer.dispatch = ExpertParallel(dist.group.WORLD)
    x = tokens_of(rank).requires_grad_()
    result = run(layer, x, target)
    return {
        "output": result.detach().numpy(),
        "x": x.grad.numpy(),
        "experts": {key: p.grad.numpy() for key, p in layer.experts.named_parameters()},
        "router": None if layer.gate.weight.grad is None else layer.gate.weight.grad.numpy(),
    }


def run(layer: SparseMLP, x: Tensor, target: int | None) -> Tensor:
    if target is None:
        result = layer(x)
    else:
        chosen = torch.full((x.shape[1], 1), target)
        weights = x[0, :, :1].sigmoid()
        result = layer.dispatch(layer.experts, x[0], chosen, weights)[None]
    (result * upstream_of(x.detach())).sum().backward()
    return result


def compare(parts: list[dict[str, Any]], name: str, target: int | None) -> float:
    """The largest difference to one process that has all experts and sees all tokens."""
    layer = sparse_layer(name)
    worst = 0.0
    for rank, part in enumerate(parts):
        x = tokens_of(rank).requires_grad_()
        result = run(layer, x, target)
        worst = max(worst, np.abs(part["output"] - result.detach().numpy()).max())
        worst = max(worst, np.abs(part["x"] - x.grad.numpy()).max())
    for key, parameter in layer.experts.named_parameters():
        joined = np.concatenate([part["experts"][key] for part in parts])
        worst = max(worst, np.abs(joined - parameter.grad.numpy()).max())
    if target is None:
        summed = sum(part["router"] for part in parts)
        worst = max(worst, np.abs(summed - layer.gate.weight.grad.numpy()).max())
    return worst


# Experts are in float64, routers in fp32: with another number of threads they round otherwise.
ROUNDING = 1e-5


@pytest.mark.parametrize(
    ("workers", "name"), [(2, "qwen2_moe"), (3, "deepseek"), (4, "qwen3_moe-plain-sums")]
)
def test_outputs_and_gradients_of_a_layer(workers: int, name: str) -> None:
    assert compare(run_on(workers, run_layer, name), name, None) < ROUNDING


def test_an_experts_gradient_scaled_by_the_workers_is_seen() -> None:
    parts = run_on(2, run_layer, "qwen2_moe", fault="scaled")
    assert compare(parts, "qwen2_moe", None) > 1e-3


@pytest.mark.parametrize("target", [0, 3])
def test_workers_that_get_no_token(target: int) -> None:
    """All tokens go to one expert: other workers multiply nothing, and their gradients are 0."""
    parts = run_on(4, run_layer, "qwen3_moe-plain-sums", target)
    assert compare(parts, "qwen3_moe-plain-sums", target) < ROUNDING
    idle = [rank for rank in range(4) if rank != target]
    assert all(np.abs(parts[rank]["experts"]["up_proj"]).max() == 0 for rank in idle)


# A whole model, spread as a plan says, with the routers' losses.

ROWS, LENGTH, SEED = 4, 16, 3
COEFFICIENTS = {"balance_loss": 0.3, "z_loss": 0.02}


def moe_config(family: str = "qwen3_moe") -> dict[str, Any]:
    """Two layers whose routers have clear preferences."""
    keys: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "initializer_range": 0.3,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 3,
    }
    if family == "deepseek_v3":
        keys |= {"n_routed_experts": 8, "n_group": 2, "topk_group": 2, "first_k_dense_replace": 1}
        keys |= {"kv_lora_rank": 16, "q_lora_rank": 12, "v_head_dim": 8}
        keys |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
    else:
        keys |= {"num_experts": 8, "head_dim": 8}
    return new_hf_config(family, keys, 64)


def batch() -> dict[str, Tensor | None]:
    rows = torch.randint(0, 64, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))
    segments = (torch.arange(LENGTH) > 6).long().expand(ROWS, -1).contiguous()
    return {
        "input_ids": rows,
        "labels": rows.roll(-1, 1),
        "position_ids": torch.arange(LENGTH).expand(ROWS, -1).contiguous(),
        "segment_ids": segments,
    }


def plan_of(**degrees: Any) -> Plan:
    world = 1
    for axis in ("dp_replicate", "dp_shard", "cp", "tp"):
        world *= degrees.get(axis, 1)
    plan = {**Plan.alone("cpu").__dict__, "world_size": world, "sequence_length": LENGTH}
    plan["zero"] = 3 if degrees.get("dp_shard", 1) > 1 else 0
    return Plan(**{**plan, **degrees})


def spread_model(family: str, degrees: dict[str, Any], directory: str | None) -> SpreadModel:
    """On a worker: its part of the model, with new weights or those of the directory."""
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))

    def build(span: Span | None) -> Decoder:
        return new_model(decoder_config(moe_config(family)), device="meta", span=span)

    def fill(model: Decoder) -> None:
        if directory is None:
            initialise(model, SEED)
        else:
            load_weights(model, directory)

    return spread(build, plan_of(**degrees), world, fill)


def run_spread(
    family: str, degrees: dict[str, Any], directory: str | None = None
) -> dict[str, Any]:
    """On a worker: gradients, as boxes of whole ones, and the routers' figures."""
    model = spread_model(family, degrees, directory)
    mesh = model.mesh
    set_router_losses(model.parts, **COEFFICIENTS, columns=mesh.group("cp"), copies=mesh.size("tp"))
    set_router_scale(model.parts, 1 / (ROWS * LENGTH))
    rows = torch.arange(ROWS).chunk(mesh.size("data"))[mesh.index("data")]
    own = {key: None if each is None else each[rows] for key, each in batch().items()}
    context = model.parts[0].model.context
    if context is not None:
        slots = context.slots(LENGTH, torch.device("cpu"))
        own |= {key: own[key][:, slots] for key in ("input_ids", "labels")}
    model.begin_step()
    model.before_backward(0, last=True)
    loss = next_token_loss(model.parts[0], own)
    (loss / (ROWS * LENGTH)).backward()
    model.finish_gradients()
    loads = take_router_loads(model.parts, mesh.group("replicas"))
    update_router_biases(loads, 0.01)
    parts = []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        offsets = model.pieces[name].offsets if name in model.pieces else (0,) * whole.ndim
        parts.append((name, offsets, whole.numpy()))
    return {
        "gradients": parts,
        "loads": loads.loads.numpy(),
        "metrics": router_metrics(loads, mesh.group("pp")),
        "biases": [b.numpy() for _, b in model.parts[0].named_buffers()],
    }


def alone(family: str) -> tuple[Decoder, Any, dict[str, float]]:
    """The same in one process, row by row."""
    model = new_model(decoder_config(moe_config(family)))
    initialise(model, SEED)
    set_router_losses([model], **COEFFICIENTS)
    set_router_scale([model], 1 / (ROWS * LENGTH))
    for row in range(ROWS):
        own = {key: each[row : row + 1] for key, each in batch().items() if each is not None}
        loss = next_token_loss(model, own)
        (loss / (ROWS * LENGTH)).backward()
    loads = take_router_loads([model])
    update_router_biases(loads, 0.01)
    return model, loads, router_metrics(loads)


def worst_gradient(parts: list[dict[str, Any]], model: Decoder) -> tuple[float, str]:
    """The largest relative difference of any gradient, and whose it is."""
    worst = (0.0, "")
    for part in parts:
        for name, offsets, own in part["gradients"]:
            box = tuple(slice(o, o + n) for o, n in zip(offsets, own.shape, strict=True))
            expected = model.get_parameter(name).grad.numpy()
            error = np.abs(own - expected[box]).max() / np.abs(expected).max()
            worst = max(worst, (float(error), name))
    return worst


LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {"dp_shard": 2}),
    ("qwen3_moe", {"dp_shard": 2, "ep": 2}),
    ("qwen3_moe", {"dp_shard": 4, "ep": 2, "zero": 2}),
    ("deepseek_v3", {"dp_shard": 4, "ep": 4}),
    ("deepseek_v3", {"dp_replicate": 2, "dp_shard": 2, "ep": 2}),
    ("deepseek_v3", {"tp": 2}),
    ("qwen3_moe", {"dp_shard": 2, "ep": 2, "tp": 2}),
    ("deepseek_v3", {"dp_shard": 2, "ep": 2, "tp": 2}),
    ("deepseek_v3", {"dp_shard": 2, "ep": 2, "cp": 2}),
    ("qwen3_moe", {"cp": 2, "tp": 2, "cp_method": "all_gather"}),
]


@pytest.mark.parametrize(("family", "degrees"), LAYOUTS, ids=str)
def test_a_spread_model_has_the_gradients_of_one_process(
    family: str, degrees: dict[str, Any]
) -> None:
    model, loads, metrics = alone(family)
    parts = run_on(plan_of(**degrees).world_size, run_spread, family, degrees)
    error, name = worst_gradient(parts, model)
    assert error < 1e-4, name
    for part in parts:
        assert (part["loads"] == loads.loads.numpy()).all()
        assert part["metrics"] == pytest.approx(metrics, rel=1e-5)
        for bias, expected in zip(part["biases"], model.buffers(), strict=True):
            assert np.abs(bias).max() == pytest.approx(0.01)
            assert (bias == expected.numpy()).all()


# Weights in and out, and generation.


def new_weights(family: str) -> Decoder:
    model = new_model(decoder_config(moe_config(family)))
    initialise(model, SEED)
    return model


def local_parts(
    family: str, degrees: dict[str, Any], directory: str | None, store: str | None
) -> list[tuple[str, tuple[int, ...], Any]]:
    """On a worker: its weights as boxes of whole ones; saved in a checkpoint too, if asked."""
    model = spread_model(family, degrees, directory)
    if store is not None:
        with CheckpointStore(Path(store)) as checkpoints:
            checkpoints.save(1, training_tensors(model.parts, [], model.pieces), {})
    parts = []
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        offsets = model.pieces[name].offsets if name in model.pieces else (0,) * whole.ndim
        parts.append((name, offsets, whole.detach().numpy()))
    return parts


@pytest.mark.parametrize(
    ("family", "degrees"),
    [
        ("qwen3_moe", {"dp_shard": 2, "ep": 2, "tp": 2}),
        ("deepseek_v3", {"dp_shard": 4, "ep": 2, "zero": 1}),
        ("deepseek_v3", {"tp": 2}),
    ],
    ids=str,
)
def test_weights_of_any_layout(family: str, degrees: dict[str, Any], tmp_path: Path) -> None:
    """Made and loaded, they are those of one process; an export is equal bit for bit."""
    model = new_weights(family)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer += 0.1 if name.endswith("correction_bias") else 0.0
    save_model(model, tmp_path / "whole", shard_bytes=30_000)
    workers = plan_of(**degrees).world_size
    made = run_on(workers, local_parts, family, degrees, None, None)
    loaded = run_on(
        workers, local_parts, family, degrees, str(tmp_path / "whole"), str(tmp_path / "store")
    )
    for parts in (*made, *loaded):
        for name, offsets, own in parts:
            box = tuple(slice(o, o + n) for o, n in zip(offsets, own.shape, strict=True))
            assert (model.get_parameter(name).detach().numpy()[box] == own).all(), name
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        target = tmp_path / dtype
        options = {"hf_config": moe_config(family), "card": "", "dtype": dtype}
        exported = load_model(
            export_checkpoint(tmp_path / "store", 1, target, **options), dtype=kind
        )
        expected = model.state_dict()
        assert exported.state_dict().keys() == expected.keys()
        for name, tensor in exported.state_dict().items():
            wanted = expected[name] if "correction_bias" in name else expected[name].to(kind)
            assert torch.equal(tensor, wanted), name


def next_logits(family: str, degrees: dict[str, Any]) -> Any:
    """On a worker: logits of its own row, read in two steps with a cache."""
    model = spread_model(family, degrees, None).parts[0]
    row = batch()["input_ids"][dist.get_rank() // degrees.get("tp", 1)][None]
    cache = model.new_cache()
    with torch.no_grad():
        return torch.cat(
            [model(row[:, :9], cache=cache), model(row[:, 9:], cache=cache)], 1
        ).numpy()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("degrees", [{"dp_shard": 2, "ep": 2}, {"dp_shard": 2, "ep": 2, "tp": 2}])
def test_generation_with_a_cache(family: str, degrees: dict[str, Any]) -> None:
    expected = new_weights(family)(batch()["input_ids"]).detach().numpy()
    workers = plan_of(**degrees).world_size
    for rank, logits in enumerate(run_on(workers, next_logits, family, degrees)):
        row = rank // degrees.get("tp", 1)
        assert np.abs(logits[0] - expected[row]).max() < 1e-3 * np.abs(expected).max()

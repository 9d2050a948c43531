"""Pipelines of shards, replicas and cut tensors: the whole way of a step's gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.parallel.pipelines import (
    ROWS,
    box,
    compare,
    make_plan,
    spread_decoder,
    tiny_decoder,
    token_rows,
)
from tests.workers import run_on
from trainwright.objectives.next_token import NextToken, next_token_loss
from trainwright.parallel.shard import sharded_modules
from trainwright.planner.plan import Plan
from trainwright.training.micro_batches import score_micro_batches, train_micro_batches

KEYS: dict[str, Any] = {"num_key_value_heads": 2, "vocab_size": 38}


def run_step(plan: Plan, steps: int, tied: bool) -> Any:
    """Some steps of plain gradient descent; the last one's losses and whole gradients."""
    model = spread_decoder(plan, **KEYS, tie_word_embeddings=tied)
    data, ranks = model.mesh.index("data"), plan.data_ranks
    batches = [
        {name: t.chunk(ranks)[data] for name, t in batch.items()}
        for batch in token_rows(plan.accumulation, ROWS * ranks)
    ]
    for _ in range(steps):
        for _, parameter in model.named_parameters():
            parameter.grad = None
        results = train_micro_batches(model, NextToken(), batches, {"targets": 1.0})
        model.finish_gradients()
        norm = model.gradient_norm().item()
        found = {}
        for name, parameter in model.unique_parameters():
            gradient = parameter.grad
            if isinstance(gradient, DTensor):
                gradient = gradient.full_tensor()
            piece = model.pieces.get(name)
            offsets = piece.offsets if piece is not None and piece.cuts("tp") else None
            found[name] = (gradient.detach().numpy().copy(), offsets)
        with torch.no_grad():
            for _, parameter in model.named_parameters():
                parameter -= 0.01 * parameter.grad
    scored = score_micro_batches(model, next_token_loss, batches)
    last = model.pipeline is not None and model.pipeline.last_stage in model.stages
    losses = [sums["targets"].item() for sums, _ in results] if last else []
    return losses, found, [loss.item() for loss in scored] if last else [], norm


def reference_step(plan: Plan, steps: int, tied: bool) -> Any:
    model = tiny_decoder(**KEYS, tie_word_embeddings=tied)
    batches = token_rows(plan.accumulation, ROWS * plan.data_ranks)
    for _ in range(steps):
        model.zero_grad()
        losses = []
        for batch in batches:
            loss = next_token_loss(model, batch)
            loss.backward()
            losses.append(loss.item())
        found = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
    with torch.no_grad():
        scored = [next_token_loss(model, batch).item() for batch in batches]
    norm = np.sqrt(sum(np.square(gradient).sum() for gradient in found.values()))
    return losses, found, scored, norm


@pytest.mark.parametrize(
    ("schedule", "layers", "more"),
    [
        ("1f1b", (5, 3), {"dp_shard": 2, "zero": 3}),
        ("interleaved", (2, 2, 3, 1), {"dp_shard": 2, "zero": 2}),
        ("gpipe", (5, 3), {"dp_shard": 2, "zero": 1}),
        ("zero_bubble", (5, 3), {"dp_shard": 2, "zero": 1}),
        ("zbv", (2, 2, 3, 1), {"dp_shard": 2, "zero": 1}),
        ("dualpipev", (2, 2, 3, 1), {"dp_shard": 2, "zero": 1}),
        ("zbv", (2, 2, 3, 1), {"dp_replicate": 2}),
        ("1f1b", (5, 3), {"dp_replicate": 2}),
        ("zbv", (2, 2, 3, 1), {"tp": 2}),
        ("dualpipev", (2, 2, 3, 1), {"tp": 2, "recompute": "full"}),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_two_stages_times_two(
    schedule: str, layers: tuple[int, ...], more: dict[str, Any], tied: bool
) -> None:
    plan = make_plan(2, schedule, layers, 4, **more)
    results = run_on(4, run_step, plan, 2, tied)
    losses, expected, scored, norm = reference_step(plan, 2, tied)
    seen = {0: np.zeros(4), 1: np.zeros(4)}
    found: dict[str, np.ndarray] = {}
    for index, (own_losses, own, own_scored, own_norm) in enumerate(results):
        assert own_norm == pytest.approx(norm, rel=1e-5)
        if own_losses and (plan.tp == 1 or index % 2 == 0):
            seen[0] += own_losses
            seen[1] += own_scored
        for name, (gradient, offsets) in own.items():
            if offsets is None:
                found[name] = gradient
                continue
            into = found.setdefault(name, np.zeros_like(expected[name]))
            into[box(offsets, gradient.shape)] = gradient
    compare([(seen[0].tolist(), found)], (losses, expected), 1e-5)
    np.testing.assert_allclose(seen[1], scored, rtol=1e-5)


def narrow_step() -> Any:
    """Types of what a step in bf16 has added up to before it is reduced, and whole gradients."""
    plan = make_plan(2, "zero_bubble", (5, 3), 4, dp_shard=2, zero=1, precision="bf16")
    model = spread_decoder(plan, **KEYS)
    rank = model.mesh.index("data")
    batches = [
        {name: t.chunk(2)[rank] for name, t in batch.items()} for batch in token_rows(4, 2 * ROWS)
    ]
    train_micro_batches(model, NextToken(), batches, {"targets": 1.0})
    kept = set()
    for part in model.parts:
        for module in sharded_modules(part):
            for parameter in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
                assert parameter.unsharded_param.grad is None
                kept.add(str(parameter.unsharded_accumulated_grad.dtype))
    model.finish_gradients()
    return kept, {name: p.grad.full_tensor().numpy() for name, p in model.named_parameters()}


def test_narrow_gradients_are_added_up_in_fp32() -> None:
    results = run_on(4, narrow_step)
    expected = reference_step(make_plan(2, "zero_bubble", (5, 3), 4, dp_shard=2), 1, False)[1]
    found = {name: gradient for _, part in results for name, gradient in part.items()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = np.linalg.norm(found[name] - gradient) / np.linalg.norm(gradient)
        assert error < 0.05, f"{name}: {error:.3f}"
    assert all(kept == {"torch.float32"} for kept, _ in results)

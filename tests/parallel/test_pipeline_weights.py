"""Weight gradients that wait, and those of tied embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.parallel.pipelines import (
    ROWS,
    SEQUENCE,
    TINY,
    Layer,
    call,
    compare,
    decoder_reference,
    gradients,
    join,
    make_plan,
    own_parts,
    plain_layers,
    token_rows,
)
from tests.workers import run_on
from trainwright.parallel.recompute import recompute_block
from trainwright.parallel.tied import NAME, TiedEmbedding, sum_tied_gradients
from trainwright.parallel.weight_gradients import WeightQueue, defer_weight_gradients, deferred
from trainwright.planner.plan import Plan

BF16 = torch.bfloat16


def pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """The same layers twice, the second able to wait, and an input for both."""
    plain, split = (nn.Sequential(*plain_layers(3)).to(dtype) for _ in range(2))
    defer_weight_gradients(split)
    return plain, split, torch.randn(2, 4, 6, dtype=dtype)


def backward(model: nn.Module, x: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", BF16, enabled=narrow):
        output = model(leaf)
    output.float().square().sum().backward()
    assert leaf.grad is not None
    return output.detach(), leaf.grad


@pytest.mark.parametrize("policy", ["none", "full", "selective"])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_split_layers_compute_the_same(policy: str, narrow: bool, waits: bool) -> None:
    plain, split, x = pair()
    for layer in split if policy != "none" else ():
        recompute_block(layer, policy)
    for repeat in (1, 2):  # gradients add up
        output, to_input = backward(plain, x, narrow)
        if waits:
            before = [None if p.grad is None else p.grad.clone() for p in matrices(split)]
            with deferred() as queue:
                output_split, to_input_split = backward(split, x, narrow)
            assert len(queue) == 6
            for parameter, old in zip(matrices(split), before, strict=True):
                assert (parameter.grad is None) == (repeat == 1)
                assert old is None or torch.equal(parameter.grad, old)
            queue.run()
            assert len(queue) == 0
        else:
            output_split, to_input_split = backward(split, x, narrow)
        assert torch.equal(output, output_split)
        assert output_split.dtype == output.dtype
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if narrow else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(to_input_split, to_input, **tolerance)
        for (name, a), b in zip(plain.named_parameters(), split.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, msg=name, **tolerance)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear)]


def test_frozen_weights_are_not_queued() -> None:
    _, split, x = pair()
    split[1].requires_grad_(False)
    split[2].rise.requires_grad_(False)
    split[2].fall.weight.requires_grad_(False)  # its bias is trained
    with deferred() as queue:
        backward(split, x, narrow=False)
    assert len(queue) == 3
    queue.run()
    assert split[2].fall.weight.grad is None
    assert split[2].fall.bias.grad is not None
    assert split[1].fall.bias.grad is None


def test_gradients_go_to_the_parameters_that_are_there_then() -> None:
    layer = nn.Linear(3, 2)
    defer_weight_gradients(layer)
    with deferred() as queue:
        layer(torch.ones(4, 3)).sum().backward()
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    queue.run()
    assert torch.equal(layer.weight.grad, torch.full((2, 3), 4.0))


def test_a_forward_that_is_replaced_already_is_not_lost() -> None:
    layer = Layer()
    layer.fall.forward = lambda x: x
    with pytest.raises(ValueError, match="fall has a forward of its own"):
        defer_weight_gradients(layer)


def test_queues_do_not_mix() -> None:
    _, split, x = pair()
    with deferred() as first:
        backward(split, x, narrow=False)
        with deferred() as second:
            backward(split, 2 * x, narrow=False)
        backward(split, x, narrow=False)
    assert (len(first), len(second)) == (12, 6)
    backward(split, x, narrow=False)
    assert (len(first), len(second)) == (12, 6)
    assert isinstance(first, WeightQueue)


# Tied embeddings.


def run_tied(plan: Plan) -> Any:
    mesh, pipeline = join(plan)
    parts = own_parts(plan, mesh, tie_word_embeddings=True)
    tied = TiedEmbedding.between(parts, mesh)
    batches = token_rows(plan.accumulation)

    def forward(stage: int, number: int, hidden: Tensor | None) -> Tensor:
        return call(parts[pipeline.stages.index(stage)], batches[number], hidden)

    shape = (ROWS, SEQUENCE, TINY["hidden_size"])
    losses = pipeline.run(forward, plan.accumulation, lambda number: (shape, torch.float32))
    if tied is not None:
        tied.sum_gradients()
    copies = [part.get_parameter(NAME) for part in parts if hasattr(part.model, "embed_tokens")]
    named = [pair for part in parts for pair in part.named_parameters()]
    return ([x.item() for x in losses], gradients(named)), [p.grad.numpy() for p in copies]


@pytest.mark.parametrize(
    ("ranks", "schedule", "layers"),
    [
        (2, "1f1b", (5, 3)),
        (2, "zbv", (2, 2, 3, 1)),  # both copies on one rank
        (2, "zero_bubble", (2, 2, 3, 1)),
        (4, "1f1b", (2, 2, 3, 1)),
        (4, "interleaved", (1,) * 8),
        (4, "dualpipev", (1,) * 8),
    ],
)
def test_tied_embeddings_learn_from_both_ends(
    ranks: int, schedule: str, layers: tuple[int, ...]
) -> None:
    results = run_on(ranks, run_tied, make_plan(ranks, schedule, layers, 8))
    reference = decoder_reference(8, tie_word_embeddings=True)
    compare([part for part, _ in results], reference, 1e-5)
    first, second = [copy for _, copies in results for copy in copies]
    assert first.tobytes() == second.tobytes()
    assert NAME in reference[1]


def test_untied_embeddings_are_left_alone() -> None:
    plan = make_plan(1, "zbv", (4, 4))
    mesh, _ = join(plan)
    assert TiedEmbedding.between(own_parts(plan, mesh), mesh) is None


def sum_in_place() -> list[np.ndarray]:
    rank = dist.get_rank()
    copy = nn.Parameter(torch.zeros(3))
    flat = torch.arange(5.0)
    copy.grad = flat[1:4]  # a view, as replicas' buckets have
    missing = nn.Parameter(torch.zeros(3))
    sum_tied_gradients([copy] if rank == 0 else [copy, missing], dist.group.WORLD)
    assert missing.grad is None or torch.equal(missing.grad, copy.grad)
    return [flat.numpy(), np.array(missing.grad is None)]


def test_gradients_stay_where_they_lie() -> None:
    for rank, (flat, none) in enumerate(run_on(2, sum_in_place)):
        assert flat.tolist() == [0.0, 2.0, 4.0, 6.0, 4.0]
        assert none == (rank == 0)

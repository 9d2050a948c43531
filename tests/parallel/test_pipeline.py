"""Pipelines: every schedule gives the losses and gradients of one process."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.pipelines import (
    ROWS,
    SEQUENCE,
    TINY,
    call,
    compare,
    decoder_reference,
    gradients,
    join,
    make_plan,
    own_parts,
    plain_layers,
    plain_loss,
    plain_pipeline,
    plain_reference,
    plain_rows,
    spans,
    tiny_decoder,
    token_rows,
)
from tests.workers import run_on
from trainwright.parallel.boundaries import Boundaries, Crossing
from trainwright.parallel.recompute import recompute_block
from trainwright.parallel.weight_gradients import defer_weight_gradients
from trainwright.planner.plan import Plan
from trainwright.planner.schedules import make_schedule, splits_backward
from trainwright.planner.timeline import most_in_flight

# schedule, layers of each stage (uneven, some none), counts of micro-batches
TWO = [
    ("gpipe", (3, 2), (1, 4)),
    ("1f1b", (4, 1), (1, 2, 5)),
    ("interleaved", (2, 1, 1, 1), (1, 2, 3, 4, 5)),
    ("interleaved", (1, 1, 0, 1, 1, 1), (4,)),
    ("zero_bubble", (2, 3), (1, 2, 5)),
    ("zero_bubble", (1, 2, 1, 1), (3, 4)),
    ("zbv", (1, 2, 1, 1), (1, 2, 5)),
    ("dualpipev", (2, 1, 1, 1), (4, 5, 7)),
]
FOUR = [
    ("gpipe", (2, 1, 1, 1), (3,)),
    ("1f1b", (1, 2, 1, 1), (2, 6)),
    ("interleaved", (2, 1, 1, 1, 1, 1, 0, 1), (3, 4, 7)),
    ("zero_bubble", (2, 1, 1, 1), (3, 8)),
    ("zero_bubble", (1, 1, 1, 2, 1, 1, 1, 0), (5,)),
    ("zbv", (1, 1, 1, 2, 1, 1, 0, 1), (2, 7, 9)),
    ("dualpipev", (1, 1, 1, 2, 1, 1, 0, 1), (8, 11)),
]


def plans(ranks: int) -> list[Plan]:
    return [
        make_plan(ranks, schedule, layers, count)
        for schedule, layers, counts in (TWO if ranks == 2 else FOUR)
        for count in counts
    ]


def run_plain(cases: list[Plan], fault: str = "") -> list[Any]:
    return [plain_pipeline(plan, fault) for plan in cases]


@pytest.mark.parametrize("ranks", [2, 4])
def test_plain_stages_equal_one_process(ranks: int) -> None:
    cases = plans(ranks)
    for plan, *results in zip(cases, *run_on(ranks, run_plain, cases), strict=True):
        compare(results, plain_reference(sum(plan.stage_layers), plan.accumulation), 1e-12)


@pytest.mark.parametrize("fault", ["layer twice", "micro-batch dropped"])
def test_faults_are_caught(fault: str) -> None:
    cases = [make_plan(2, "1f1b", (2, 2), 4), make_plan(2, "zbv", (1, 1, 1, 1), 4)]
    for plan, *results in zip(cases, *run_on(2, run_plain, cases, fault), strict=True):
        with pytest.raises(AssertionError):
            compare(results, plain_reference(4, plan.accumulation), 1e-5)


def run_decoder(
    plan: Plan, recompute: str = "none", dtype: torch.dtype = torch.float32, **keys: Any
) -> Any:
    mesh, pipeline = join(plan)
    parts = own_parts(plan, mesh, **keys)
    for part in parts:
        if splits_backward(plan.schedule):
            defer_weight_gradients(part)
        for block in part.blocks if recompute != "none" else ():
            recompute_block(block, recompute)
    batches = token_rows(plan.accumulation)

    def forward(stage: int, number: int, hidden: Tensor | None) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return call(parts[pipeline.stages.index(stage)], batches[number], hidden)

    shape = (ROWS, SEQUENCE, TINY["hidden_size"])
    losses = pipeline.run(forward, plan.accumulation, lambda number: (shape, dtype))
    named = [pair for part in parts for pair in part.named_parameters()]
    scored = pipeline.run_forward(forward, plan.accumulation, lambda number: (shape, dtype))
    assert [loss.item() for loss in scored] == [loss.item() for loss in losses]
    assert not any(loss.requires_grad for loss in scored)
    return [loss.item() for loss in losses], gradients(named)


@pytest.mark.parametrize(
    ("ranks", "schedule", "layers", "recompute"),
    [
        (2, "gpipe", (5, 3), "none"),
        (2, "1f1b", (5, 3), "full"),
        (2, "interleaved", (2, 3, 2, 1), "selective"),
        (2, "zero_bubble", (2, 3, 2, 1), "full"),
        (2, "zbv", (2, 3, 2, 1), "selective"),
        (2, "dualpipev", (3, 2, 2, 1), "full"),
        (4, "1f1b", (3, 2, 2, 1), "none"),
        (4, "interleaved", (1,) * 8, "none"),
        (4, "zbv", (1,) * 8, "none"),
        (4, "dualpipev", (1,) * 8, "none"),
    ],
)
def test_decoders_equal_one_process(
    ranks: int, schedule: str, layers: tuple[int, ...], recompute: str
) -> None:
    plan = make_plan(ranks, schedule, layers, 9)
    results = run_on(ranks, run_decoder, plan, recompute)
    compare(results, decoder_reference(9), 1e-5)


def test_windows_and_layer_numbers_belong_to_the_whole_model() -> None:
    keys: dict[str, Any] = {
        "family": "qwen3",
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
    }
    results = run_on(2, run_decoder, make_plan(2, "interleaved", (3, 1, 3, 1)), **keys)
    compare(results, decoder_reference(4, **keys), 1e-5)


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_streams_travel_in_the_narrow_type(schedule: str) -> None:
    plan = make_plan(2, schedule, (4, 4))
    results = run_on(2, run_decoder, plan, dtype=torch.bfloat16)
    compare(results, decoder_reference(4, torch.bfloat16), 2e-2)


# One rank with several stages needs no process group, and shows what the loop does.


def alone(schedule: str, micro_batches: int, stages: int = 2) -> Plan:
    return make_plan(1, schedule, (1,) * stages, micro_batches)


def test_nothing_is_held_longer_than_the_schedule_says() -> None:
    """Streams that came in live until their backward pass; those sent on are not kept at all."""
    _, pipeline = join(alone("interleaved", 8, stages=3))
    layers, rows = plain_layers(3), plain_rows(8)
    came, went = [], []  # weak references
    most = 0

    def forward(stage: int, number: int, hidden: Tensor | None) -> Tensor:
        nonlocal most
        assert not any(output() is not None for output in went)
        output = layers[stage](rows[number] if hidden is None else hidden)
        if hidden is not None:
            came.append(weakref.ref(hidden))
        most = max(most, sum(stream() is not None for stream in came))
        if stage == 2:
            return plain_loss(output, number)
        went.append(weakref.ref(output))
        return output

    pipeline.run(forward, 8, lambda number: ((3, 6), torch.float64))
    (actions,) = make_schedule("interleaved", 1, 3, 8)
    assert most == most_in_flight([action for action in actions if action.stage > 0])
    assert most < 2 * 8
    assert not any(stream() is not None for stream in came)


def test_an_error_leaves_nothing_behind() -> None:
    _, pipeline = join(alone("dualpipev", 4))
    layers, rows, came = plain_layers(2), plain_rows(4), []

    def forward(stage: int, number: int, hidden: Tensor | None) -> Tensor:
        if number == 3 and broken:
            raise RuntimeError("a broken row")
        if hidden is not None:
            came.append(weakref.ref(hidden))
        output = layers[stage](rows[number] if hidden is None else hidden)
        return plain_loss(output, number) if stage == 1 else output

    broken, failed = True, False
    try:
        pipeline.run(forward, 4, lambda number: ((3, 6), torch.float64))
    except RuntimeError:
        failed = True
    assert failed
    assert came
    assert not any(stream() is not None for stream in came)
    layers.zero_grad()
    broken = False
    losses = pipeline.run(forward, 4, lambda number: ((3, 6), torch.float64))
    compare(
        [([x.item() for x in losses], gradients(layers.named_parameters()))],
        plain_reference(2, 4),
        1e-12,
    )


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipev", "zero_bubble"])
def test_before_the_last_backward_of_each_stage(schedule: str) -> None:
    plan = alone(schedule, 4, stages=2 if schedule.endswith("v") else 1)
    _, pipeline = join(plan)
    layers, rows = plain_layers(2), plain_rows(4)
    stages = spans(plan, layers)
    defer_weight_gradients(layers)
    seen: dict[int, list[Tensor]] = {}

    def forward(stage: int, number: int, hidden: Tensor | None) -> Tensor:
        x = rows[number] if hidden is None else hidden
        for layer in stages[stage]:
            x = layer(x)
        return plain_loss(x, number) if stage == pipeline.last_stage else x

    def before_last(stage: int) -> None:
        assert stage not in seen
        seen[stage] = [p.grad.clone() for p in stages[stage].parameters() if p.dim() == 2]

    pipeline.run(forward, 4, lambda number: ((3, 6), torch.float64), before_last)
    assert sorted(seen) == list(pipeline.stages)
    # All that is missing then is what the last micro-batch gives.
    alone_layers, x = plain_layers(sum(plan.stage_layers)), rows[3]
    for layer in alone_layers:
        x = layer(x)
    plain_loss(x, 3).backward()
    expected = spans(plan, alone_layers)
    for stage, before in seen.items():
        last = [p.grad for p in expected[stage].parameters() if p.dim() == 2]
        after = [p.grad for p in stages[stage].parameters() if p.dim() == 2]
        for old, new, gradient in zip(before, after, last, strict=True):
            torch.testing.assert_close(new - old, gradient)


def test_what_is_not_trained_is_left_out() -> None:
    """A first stage without a trained weight has no backward pass; the others do."""
    _, pipeline = join(alone("zbv", 3))
    layers, rows = plain_layers(2), plain_rows(3)
    layers[0].requires_grad_(False)
    defer_weight_gradients(layers)

    def forward(stage: int, number: int, hidden: Tensor | None) -> Tensor:
        output = layers[stage](rows[number] if hidden is None else hidden)
        return plain_loss(output, number) if stage == 1 else output

    pipeline.run(forward, 3, lambda number: ((3, 6), torch.float64))
    _, expected = plain_reference(2, 3)
    found = gradients(layers.named_parameters())
    assert found.keys() == {name for name in expected if name.startswith("1.")}
    for name, gradient in found.items():
        torch.testing.assert_close(torch.from_numpy(gradient), torch.from_numpy(expected[name]))


def cross_in_another_order() -> list[float]:
    """Rank 0 sends for two boundaries, rank 1 asks for them the other way round."""
    plan = make_plan(2, "interleaved", (1, 1, 1, 1))
    mesh, pipeline = join(plan)
    crossings = [Crossing(False, boundary, m) for m in range(3) for boundary in (0, 2)]
    asked = crossings[::-1] if mesh.index("pp") == 1 else []
    group = mesh.group("pp")
    boundaries = Boundaries(
        pipeline.ranks,
        pipeline.placement,
        asked,
        lambda number: ((1,), torch.float32),
        lambda crossing: group,
        torch.device("cpu"),
    )
    for crossing in crossings if mesh.index("pp") == 0 else []:
        boundaries.send(crossing, torch.tensor([10.0 * crossing.boundary + crossing.micro_batch]))
    values = [boundaries.receive(crossing).item() for crossing in asked]
    boundaries.finish()
    return values


def test_messages_are_told_apart_whatever_their_order() -> None:
    assert run_on(2, cross_in_another_order) == [[], [22.0, 2.0, 21.0, 1.0, 20.0, 0.0]]


def test_a_stream_of_another_shape_is_refused() -> None:
    _, pipeline = join(alone("zbv", 1))

    def forward(stage: int, number: int, hidden: Tensor | None) -> Tensor:
        return torch.zeros(2, 2)

    with pytest.raises(ValueError, match="stage 0 sends"):
        pipeline.run(forward, 1, lambda number: ((3, 6), torch.float64))


def test_stages_have_their_part_of_the_weights() -> None:
    whole = dict(tiny_decoder().named_parameters())
    plan = make_plan(1, "interleaved", (3, 4, 1))
    mesh, _ = join(plan)
    parts = own_parts(plan, mesh)
    names = [name for part in parts for name, _ in part.named_parameters()]
    assert sorted(names) == sorted(whole)

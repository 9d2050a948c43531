"""What tp leaves whole, against one process; and the sharding program's own plans with it.

Each worker does its own tokens of a micro-batch: whole rows, a part of one, or parts of several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.parallel.layouts import SEQUENCE, Case, outcome, plan, reference
from tests.workers import run_on
from trainwright.kernels.attention import attention, attention_mask
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.models.weights import initialise, new_model
from trainwright.parallel.own_queries import OwnQueries, Stretch, stretches
from trainwright.parallel.spread import spread
from trainwright.parallel.world import World
from trainwright.planner.cluster.describe import DeviceKind, Rates
from trainwright.planner.cost.kernels import Kernels
from trainwright.planner.plan import Plan
from trainwright.planner.search.cut import expert_ways, left_whole, tensor_ways
from trainwright.planner.search.graph import decoder_graph
from trainwright.planner.search.sharding import Line, Sharding
from trainwright.planner.shapes import count_parameters

ATTENTION, NETWORK = ("attention",), ("network",)
# Some of these models answer rounding of cp's or tp's sums with more than the check allows, unless
# they begin quietly.
QUIET = {"initializer_range": 0.05}
SIX = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, **QUIET}
NINE = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, **QUIET}
LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_group": 4,
    "topk_group": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}  # fmt: skip
CASES: list[tuple[int, Case, dict[str, Any]]] = [
    (2, Case(), {"tp": 2, "whole": ATTENTION, "micro_batch": 1}),
    (2, Case(), {"tp": 2, "whole": ("attention", "network"), "micro_batch": 4}),
    (2, Case(training={"dropout": 0.2}), {"tp": 2, "whole": NETWORK, "recompute": "full"}),
    (2, Case("gemma2", keys={"head_dim": 8, "sliding_window": 5}),
     {"tp": 2, "whole": ATTENTION, "micro_batch": 1, "recompute": "selective"}),
    (2, Case("phi3", keys=QUIET), {"tp": 2, "whole": ATTENTION, "micro_batch": 1}),
    (2, Case("olmo2"), {"tp": 2, "whole": ATTENTION, "micro_batch": 1}),
    (2, Case("mixtral", training={"router_balance_loss": 0.01}, keys=QUIET),
     {"tp": 2, "whole": ATTENTION, "micro_batch": 1}),
    (2, Case("deepseek_v3", keys=LATENT), {"tp": 2, "whole": ATTENTION, "micro_batch": 1}),
    (4, Case(keys=SIX), {"tp": 4, "whole": ATTENTION, "micro_batch": 2}),
    (4, Case(keys=SIX), {"tp": 2, "dp_shard": 2, "whole": ATTENTION, "micro_batch": 1}),
    (4, Case(keys=NINE), {"tp": 2, "pp": 2, "whole": ATTENTION, "schedule": "zero_bubble"}),
    (4, Case(), {"tp": 2, "cp": 2, "whole": NETWORK}),
]  # fmt: skip


def name_of(case: Case, fields: dict[str, Any]) -> str:
    axes = [f"{key}{value}" for key, value in fields.items() if isinstance(value, int)]
    return " ".join([case.family, *axes, "+".join(fields["whole"])])


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "case", "fields"), CASES, ids=[name_of(case, fields) for _, case, fields in CASES]
)
def test_own_tokens_train_as_one_process_does(
    world: int,
    case: Case,
    fields: dict[str, Any],
    references: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if str(case) not in references:
        references[str(case)] = reference(tmp_path_factory.mktemp("reference"), case)
    for found in run_on(world, outcome, references[str(case)], case, plan(**fields)):
        assert found.passed, found


@pytest.mark.parametrize(
    ("start", "tokens", "expected"),
    [
        (0, 8, [Stretch(0, 1, 0, 8)]),
        (16, 16, [Stretch(2, 2, 0, 8)]),
        (4, 4, [Stretch(0, 1, 4, 8)]),
        (12, 12, [Stretch(1, 1, 4, 8), Stretch(2, 1, 0, 8)]),
        (6, 21, [Stretch(0, 1, 6, 8), Stretch(1, 2, 0, 8), Stretch(3, 1, 0, 3)]),
    ],
)
def test_a_run_falls_into_stretches_of_rows(
    start: int, tokens: int, expected: list[Stretch]
) -> None:
    assert list(stretches(start, tokens, 8)) == expected


class OneOf:
    """A stream's cut as worker `index` of `workers` sees it, whose gathers find `every` one's."""

    def __init__(self, index: int, workers: int) -> None:
        self.index, self.workers, self.group = index, workers, None


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [None, 5])
def test_own_queries_see_what_they_see_in_whole_rows(
    rows: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number of rows on two workers, documents and all, against attention over whole rows."""
    from trainwright.parallel import own_queries

    q, k, v = (torch.randn(rows, heads, 12, 8) for heads in (6, 3, 3))
    segments = torch.arange(12).div(5, rounding_mode="floor").expand(rows, 12)
    options: dict[str, Any] = {"window": window, "softcap": None, "device": q.device}
    mask = attention_mask(segments, queries=12, keys=12, **options)
    expected = attention(q, k, v, mask=mask, scale=0.3).transpose(1, 2).flatten(0, 1)
    both = torch.cat([k, v], -1).transpose(1, 2).flatten(0, 1)
    monkeypatch.setattr(own_queries, "gather", lambda x, dim, group: both)
    half = rows * 6
    for index in range(2):
        queries = OwnQueries(OneOf(index, 2))  # type: ignore[arg-type]
        own = [
            x.transpose(1, 2).flatten(0, 1)[index * half : (index + 1) * half]
            .unflatten(0, (rows, 6)).transpose(1, 2)
            for x in (q, k, v)
        ]  # fmt: skip
        sight = queries.mask(segments, rows=rows, sequence=12, **options)
        assert sight.gathers == (rows % 2 == 1)
        found = queries.attend(*own, mask=sight, scale=0.3).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(found, expected[index * half : (index + 1) * half])


DEVICE = DeviceKind("device", "cpu", 1e9, {"fp32": 1e12}, 1e11, 50, 10, 8, tile=(16, 16))


def line_of(workers: int, accumulation: int = 1) -> Line:
    def seconds(kind: str, size: float) -> float:
        return (2 if kind == "all_reduce" else 1) * (workers - 1) / workers * size / 1e9

    return Line(workers, Kernels(DEVICE, Rates()), seconds, "fp32", 4, accumulation)


def best_fields(case: Case, rows: int, line: Line, share: float) -> dict[str, Any]:
    """The program's cheapest way that workers can run, as a plan's fields.

    A worker holds at most a share of what all states of the model take.
    """
    config = decoder_config(new_hf_config(case.family, case.sizes, 64))
    graph, budget = (
        decoder_graph(config, rows, SEQUENCE),
        share * 16 * count_parameters(config).total,
    )
    ways = {"tp": tensor_ways(graph, config, line.workers, True), "dp_shard": expert_ways(graph)}
    found = {}
    for axis, way in ways.items():
        sharding = Sharding(graph, line, allowed=way.allowed, alike=way.alike, budget=budget)
        if (choice := sharding.solve()) is not None:
            found[axis] = choice
    axis = min(found, key=lambda name: found[name].seconds)
    if axis == "tp":
        return {axis: line.workers, "whole": left_whole(found[axis], ways[axis].own)}
    dealt = any(found[axis][name].axis == "experts" for name in graph.operators)
    return {axis: line.workers} | ({"ep": line.workers} if dealt else {})


# A case, workers, rows of a micro-batch, micro-batches, share of all states that fits; the plan.
CHOSEN: list[tuple[Case, int, int, int, float, dict[str, Any]]] = [
    (Case(), 2, 1, 1, 0.7, {"tp": 2, "whole": ()}),
    (Case(), 4, 1, 1, 0.5, {"tp": 4, "whole": ()}),
    (Case(keys=SIX), 4, 2, 1, 0.9, {"tp": 4, "whole": ATTENTION}),
    (Case(keys=NINE), 2, 1, 8, 2.0, {"tp": 2, "whole": ("attention", "network")}),
    (Case("mixtral", keys=QUIET), 2, 1, 4, 0.8, {"tp": 2, "whole": ()}),
    (Case("mixtral", keys=QUIET), 4, 4, 4, 0.6, {"dp_shard": 4, "ep": 4}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen", CHOSEN, ids=[f"{c.family} {' '.join(c.keys)} on {n} {r}" for c, n, r, *_ in CHOSEN]
)
def test_the_programs_plan_runs_and_trains_as_one_process_does(
    chosen: tuple[Case, int, int, int, float, dict[str, Any]], tmp_path: Path
) -> None:
    case, workers, rows, accumulation, share, expected = chosen
    fields = best_fields(case, rows, line_of(workers, accumulation), share)
    assert fields == expected
    spread = plan(micro_batch=1 if "ep" in fields else rows, **fields)
    for each in run_on(workers, outcome, reference(tmp_path, case), case, spread):
        assert each.passed, (fields, each)


def logits_of(hf_config: dict[str, Any], spread_plan: Plan) -> tuple[Any, Any]:
    """Logits of a made-up row, all at once and token by token with a cache."""
    config = decoder_config(hf_config)
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    model = spread(
        lambda span: new_model(config, device="meta", span=span),
        spread_plan,
        world,
        lambda part: initialise(part, 3),  # type: ignore[arg-type]
    ).model
    ids = torch.arange(12).view(1, 12) * 5 % 64
    with torch.no_grad():
        at_once, cache = model(ids), model.new_cache()
        singly = [model(ids[:, at : at + 1], cache=cache) for at in range(12)]
    return at_once.numpy(), torch.cat(singly, 1).numpy()


@pytest.mark.parametrize("whole", [ATTENTION, ("attention", "network")])
def test_generation_with_whole_parts(whole: tuple[str, ...]) -> None:
    hf_config = new_hf_config("llama", Case(keys=QUIET).sizes, 64)
    [(expected, _)] = run_on(1, logits_of, hf_config, plan())
    for at_once, singly in run_on(2, logits_of, hf_config, plan(tp=2, whole=whole)):
        assert abs(at_once - expected).max() < 1e-5
        assert abs(singly - expected).max() < 1e-5

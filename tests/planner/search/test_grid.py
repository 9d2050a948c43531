"""The grid has exactly the candidates that the rules allow, whichever way they are asked."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from tests.planner.search.machines import cluster, llama, mixture, pool
from trainwright.planner.candidate import Candidate
from trainwright.planner.conditions import cut_badly
from trainwright.planner.job import Job
from trainwright.planner.layout import divisors
from trainwright.planner.legality import is_legal
from trainwright.planner.search.asked import like_of
from trainwright.planner.search.grid import FIELDS, OFFLOADS, VALUES, make_grid
from trainwright.recipe.schema import Adapter


def like(config, rows=16, **more) -> Candidate:
    made = like_of(Job(config, 128, rows), cluster(pool(nodes=8)))
    return replace(made, **more)


def every_candidate(base, world, most_virtual, offloads=("none",)):
    """All combinations of all values, that the rules allow, one at a time."""
    sizes = divisors(world)
    for pp, replicas, shards, cp, tp in itertools.product(sizes, repeat=5):
        if pp * replicas * shards * cp * tp != world:
            continue
        for ep, zero, schedule, virtual, method, recompute, offload, micro in itertools.product(
            divisors(shards),
            (0, 1, 2, 3),
            VALUES["schedule"] if pp > 1 else ("1f1b",),
            range(1, most_virtual + 1),
            VALUES["cp_method"] if cp > 1 else ("ring",),
            VALUES["recompute"],
            offloads,
            divisors(base.rows),
        ):
            candidate = replace(
                base,
                world=world,
                pp=pp,
                dp_replicate=replicas,
                dp_shard=shards,
                cp=cp,
                tp=tp,
                ep=ep,
                zero=zero,
                schedule=schedule,
                virtual_stages=virtual,
                cp_method=method,
                recompute=recompute,
                offload=offload,
                micro_batch=micro,
                whole=cut_badly(base.model, tp) if tp > 1 else (),
            )
            if is_legal(candidate):
                yield identity(candidate)


def identity(candidate):
    return tuple(getattr(candidate, name) for name in (*FIELDS, "whole"))


def in_grid(grid):
    found = [identity(grid.candidate(index)) for index in range(len(grid))]
    assert len(found) == len(set(found))
    return set(found)


DENSE = llama(256, 4, 8, 2, 512, 1000)
CASES = {
    "dense": (like(DENSE), 4),
    "experts": (like(mixture(4, 4)), 4),
    "odd": (like(llama(192, 3, 6, 3, 512, 1000), 12), 6),
    "few rows": (like(DENSE, 2), 4),
    "compiled": (like(DENSE, compile=True), 4),
    "short rows": (like(DENSE, sequence_length=2), 4),
    "adapter": (like(DENSE, adapter=Adapter(rank=4, dropout=0.1)), 4),
    "eight bits": (like(DENSE, optimizer="adamw-8bit"), 4),
    "not ours": (like(DENSE, native=False), 4),
}


@pytest.mark.parametrize("name", CASES)
def test_all_that_is_legal_and_nothing_else(name):
    base, world = CASES[name]
    # Beyond two stages a worker only those that share the layers out evenly are tried; four layers
    # on two workers have two at most.
    grid = make_grid(base, [world], {})
    assert len(grid)
    assert in_grid(grid) == set(every_candidate(base, world, 2))


def test_the_host_is_used_where_asked():
    base = like(DENSE)
    grid = make_grid(base, [4], {}, offload=True)
    assert in_grid(grid) == set(every_candidate(base, 4, 2, OFFLOADS))


def test_what_is_given_is_kept():
    base = like(DENSE)
    fixed = {"tp": 2, "recompute": "selective", "micro_batch": 2, "schedule": "gpipe"}
    grid = make_grid(base, [8], fixed)
    assert len(grid)
    assert all(
        (c.tp, c.recompute, c.micro_batch, c.schedule) == (2, "selective", 2, "gpipe")
        for c in map(grid.candidate, range(len(grid)))
    )
    layers = make_grid(base, [4], {"stage_layers": (3, 1)})
    assert {c.pp * c.virtual_stages for c in map(layers.candidate, range(len(layers)))} == {2}
    assert all(is_legal(layers.candidate(index)) for index in range(len(layers)))


def test_unequal_rows_need_not_divide_by_the_replicas():
    base = replace(like(DENSE, 32), rows_by_replica=(20, 8, 4))
    grid = make_grid(base, [6], {"dp_replicate": 3})
    assert len(grid)
    assert {(c.dp_replicate, c.product) for c in map(grid.candidate, range(len(grid)))} == {(3, 6)}
    assert all(is_legal(grid.candidate(index)) for index in range(len(grid)))
    assert {c.micro_batch for c in map(grid.candidate, range(len(grid)))} == {1, 2, 4}


def test_thousands_of_workers_have_legal_candidates_only():
    base = like_of(Job(llama(16384, 126, 128, 8, 53248, 128256), 8192, 2048), cluster())
    grid = make_grid(base, [16384], {})
    assert len(grid) > 100_000
    some = range(0, len(grid), len(grid) // 500)
    assert all(is_legal(grid.candidate(index)) for index in some)
    assert {grid.candidate(index).product for index in some} == {16384}

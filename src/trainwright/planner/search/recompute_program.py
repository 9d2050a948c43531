"""What each layer recomputes, so that a plan fits into memory: an integer program. No torch.

A layer keeps all of its activations (`none`), what products and attention return (`selective`), or
its input (`full`). Equal layers of a stage are tied into counts, so that a worker of the pipeline
is a knapsack of a few integers however deep the model is, and no two workers share a budget. Within
a stage the first layers recompute the most: they go backward last, into memory that is free again.
HiGHS solves it (`scipy.optimize.milp`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from trainwright.models.families import DecoderConfig
from trainwright.planner.memory import (
    activation_bytes,
    end_bytes,
    fullest_moments,
    layer_bytes,
)
from trainwright.planner.parameters import layers_of, stages_of
from trainwright.planner.plan import Plan, Recompute
from trainwright.planner.schedules import splits_backward

POLICIES: tuple[Recompute, ...] = ("full", "selective", "none")  # what forgets the most comes first
Added = Callable[[int, Recompute], float]  # seconds that a layer's policy adds to a micro-batch
_GAP, _SECONDS = 1e-4, 5.0  # where the solver may stop: from the optimum, and after its beginning
_SLACKS = (0.0, 1e-5)  # of the memory, left free where the solver's own tolerance overdraws it


@dataclass(frozen=True)
class _Group:
    """Equal layers of a stage: what one keeps of a micro-batch, and adds, by policy."""

    stage: int
    kept: tuple[float, ...]
    added: tuple[float, ...]
    layers: tuple[int, ...]


def least_recompute(
    config: DecoderConfig, plan: Plan, room: Callable[[int], float], added: Added
) -> Plan | None:
    """`plan` with the policies by layer that fit and add the fewest seconds; None where none do.

    `room` tells the bytes that a worker of a pipeline rank has for activations. What `plan` itself
    recomputes does not count. Equal policies everywhere are told as `Plan.recompute`.
    """
    plan = replace(plan, recompute="none", recompute_by_stage=(), recompute_by_layer=())
    for pp_rank in range(plan.pp):
        own = room(pp_rank)
        if _fits(config, plan, pp_rank, own):
            continue
        groups = _groups(config, plan, pp_rank, added)
        everything = _with(plan, groups, [[len(each.layers)] for each in groups])
        if not _fits(config, everything, pp_rank, own):
            return None
        tries = (_solve(config, plan, pp_rank, groups, own - slack * own) for slack in _SLACKS)
        solved = (_with(plan, groups, counts) for counts in tries if counts is not None)
        fitting = (each for each in solved if _fits(config, each, pp_rank, own))
        plan = next(fitting, everything)
    policies = set(plan.recompute_by_layer)
    if len(policies) == 1:
        return replace(plan, recompute=policies.pop(), recompute_by_layer=())
    return plan


def _with(plan: Plan, groups: Sequence[_Group], counts: Sequence[Sequence[int]]) -> Plan:
    """`plan` where so many layers of each group do as each of `POLICIES`, the first ones first."""
    layers = sum(plan.stage_layers) or sum(len(group.layers) for group in groups)
    by_layer: list[Recompute] = [*plan.recompute_by_layer] or ["none"] * layers
    for group, many in zip(groups, counts, strict=True):
        policies = (each for each, n in zip(POLICIES, many, strict=False) for _ in range(n))
        for layer, policy in zip(group.layers, policies, strict=True):
            by_layer[layer] = policy
    return replace(plan, recompute_by_layer=tuple(by_layer))


def _fits(config: DecoderConfig, plan: Plan, pp_rank: int, room: float) -> bool:
    return plan.micro_batch * activation_bytes(config, plan, pp_rank) <= room


def _groups(config: DecoderConfig, plan: Plan, pp_rank: int, added: Added) -> list[_Group]:
    """Layers of a worker that are alike, in the model's order."""
    tokens = plan.micro_batch * plan.sequence_length / plan.cp
    found: dict[tuple[int, tuple[float, ...], tuple[float, ...]], list[int]] = {}
    for stage in stages_of(plan, pp_rank):
        for layer in layers_of(config, plan, stage):
            kept = tuple(tokens * layer_bytes(config, plan, layer, each) for each in POLICIES)
            seconds = tuple(added(layer, each) for each in POLICIES)
            found.setdefault((stage, kept, seconds), []).append(layer)
    return [_Group(*key, tuple(layers)) for key, layers in found.items()]


def _solve(
    config: DecoderConfig, plan: Plan, pp_rank: int, groups: Sequence[_Group], room: float
) -> list[list[int]] | None:
    """How many layers of each group do as each of `POLICIES`; None where the solver finds none.

    Unknowns are these counts, whether each is above zero, and the most bytes that recomputing a
    layer brings back beyond what later layers have freed (`planner.memory`).
    """
    kinds, many = len(POLICIES), len(groups)
    counts = np.arange(many * kinds).reshape(many, kinds)
    used, peak = counts + counts.size, 2 * counts.size
    rows: list[np.ndarray] = []
    lows: list[float] = []
    highs: list[float] = []

    def row(low: float, high: float) -> np.ndarray:
        rows.append(np.zeros(peak + 1))
        lows.append(low)
        highs.append(high)
        return rows[-1]

    frees = plan.pp == 1 or not splits_backward(plan.schedule)
    for group, own in enumerate(groups):
        row(len(own.layers), len(own.layers))[counts[group]] = 1
        for kind in range(kinds - 1):
            where = row(-np.inf, 0)
            where[counts[group, kind]], where[used[group, kind]] = 1, -len(own.layers)
            brought = row(-np.inf, 0)
            brought[used[group, kind]] = (own.kept[-1] - own.kept[kind]) / room
            brought[peak] = -1
            if frees:
                for later, other in _later(groups, group, kind):
                    brought[counts[later][other]] = -np.array(groups[later].kept)[other] / room
    for moment in map(Counter, fullest_moments(plan, pp_rank)):
        tokens = plan.micro_batch * plan.sequence_length / plan.cp
        ends = sum(n * tokens * end_bytes(config, plan, stage) for stage, n in moment.items())
        held = row(-np.inf, 1 - ends / room)
        held[peak] = 1
        for group, own in enumerate(groups):
            held[counts[group]] = moment[own.stage] * np.array(own.kept) / room
    most = np.full(peak + 1, np.inf)
    most[used] = 1
    costs = np.zeros(peak + 1)
    costs[counts] = [own.added for own in groups]
    result = milp(
        costs / max(costs.max(), 1e-300),
        integrality=np.append(np.ones(peak), 0),
        bounds=Bounds(0, most),
        constraints=LinearConstraint(np.array(rows), lows, highs),
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if result.x is None:
        return None
    return [[round(n) for n in own] for own in result.x[counts]]


def _later(groups: Sequence[_Group], group: int, kind: int) -> list[tuple[int, slice]]:
    """What has surely gone backward before the last of a group's layers of a kind.

    Its layers of the kinds that forget less, and groups that begin where it has ended.
    """
    own = groups[group]
    behind = [
        (index, slice(None))
        for index, other in enumerate(groups)
        if other.stage == own.stage and other.layers[0] > own.layers[-1]
    ]
    return [(group, slice(kind + 1, None)), *behind]

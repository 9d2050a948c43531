"""Who tries whose contributions, what is measured, and what strangers may report."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainwright.swarm.layout import Layout
from trainwright.swarm.methods.build import build_method
from trainwright.swarm.methods.method import Agreed, Received
from trainwright.swarm.scores import (
    REPORTERS,
    TARGETS,
    Report,
    Score,
    read_report,
    targets,
    try_contributions,
    write_report,
)
from trainwright.swarm.settings import DEFAULTS


@pytest.mark.parametrize("count", [2, 4, 6, 20])
def test_each_target_is_tried_by_others_and_everybody_is_a_target_at_times(count: int) -> None:
    peers = [f"p{index:02}" for index in range(count)]
    often = Counter[str]()
    for seed in map(str, range(60)):
        tried = Counter(target for peer in peers for target in targets(seed, peer, peers))
        assert len(tried) == min(TARGETS, count)
        assert set(tried.values()) == {min(REPORTERS, count - 1)}
        assert all(peer not in targets(seed, peer, peers) for peer in peers)
        assert targets(seed, "a validator", peers) == sorted(tried)
        often.update(tried.keys())
    assert min(often[peer] for peer in peers) > 0.3 * 60 * min(TARGETS, count) / count


def test_suspects_are_tried_beside_others() -> None:
    peers = ["a", "b", "c", "d", "e"]
    for seed in map(str, range(20)):
        tried = {target for peer in peers for target in targets(seed, peer, peers, {"c", "gone"})}
        assert "c" in tried
        assert len(tried) == 1 + TARGETS


@pytest.mark.parametrize("name", ["diloco", "sparseloco"])
def test_scores_are_drops_of_the_loss(name: str) -> None:
    layout = Layout((("w", (64, 64)),))
    settings = replace(DEFAULTS[name], codec="fp32", density=1.0, feedback_decay=0.0)
    method = build_method(settings, layout)
    draws = torch.Generator().manual_seed(0)
    weights, target = (torch.randn(layout.count, generator=draws) for _ in range(2))
    agreed = Agreed(3, weights, {"momentum": torch.full((layout.count,), 1e6)})
    toward = Received("good", (weights - target) / 2, 100.0)
    received = [toward, Received("bad", -toward.values, 9.0), Received("ugly", weights, 1.0)]

    def loss(values: Tensor, peer: str | None) -> float:
        if peer == "good":
            return float((values - target).norm())
        return float((values - target).square().mean())

    found = try_contributions(method, agreed, received, 1e-3, loss, ["good", "bad"])
    assert set(found) == {"good", "bad"}
    # Half a contribution, by the outer rate and, in Nesterov's form, its momentum once.
    step = 0.5 * settings.outer_learning_rate * (1 + settings.outer_momentum)
    after = weights - step * toward.values
    assert found["good"].assigned == pytest.approx(
        loss(weights, "good") - loss(after, "good"), rel=1e-4
    )
    assert found["good"].unassigned == pytest.approx(
        loss(weights, None) - loss(after, None), rel=1e-4
    )
    assert found["bad"].unassigned < 0 < found["good"].unassigned
    assert float(agreed.outer["momentum"][0]) == 1e6


def test_a_contribution_that_breaks_the_model_scores_as_badly_as_can_be() -> None:
    layout = Layout((("w", (8,)),))
    method = build_method(replace(DEFAULTS["diloco"], codec="fp32"), layout)
    agreed = Agreed(0, torch.ones(8), {})
    agreed.outer = {
        name: torch.zeros(8)
        for name in method.advance(agreed, [Received("a", torch.zeros(8), 1.0)], 1.0).outer
    }

    def loss(values: Tensor, peer: str | None) -> float:
        return 1.0 if torch.equal(values, torch.ones(8)) else math.nan

    found = try_contributions(method, agreed, [Received("a", torch.ones(8), 1.0)], 1.0, loss, ["a"])
    assert found["a"] == Score(-1e9, -1e9)


def test_reports_go_through_json() -> None:
    report = Report(7, {"b": Score(0.25, -1e9), "a": Score(1.5, 0.125)}, {"a": 3}, {"c": "NaN"})
    body = write_report(report)
    assert read_report(json.loads(json.dumps(body))) == report
    assert read_report(write_report(Report(0))) == Report(0)


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {"round": -1},
        {"round": True},
        {"round": 1.0},
        {"round": 1, "scores": []},
        {"round": 1, "scores": {"a": [1.0]}},
        {"round": 1, "scores": {"a": [1.0, math.nan]}},
        {"round": 1, "scores": {"a": [1.0, math.inf]}},
        {"round": 1, "scores": {"a": [1.0, 10**400]}},
        {"round": 1, "scores": {"a": [True, 1.0]}},
        {"round": 1, "scores": {"a": ["1", 1.0]}},
        {"round": 1, "scores": {"a" * 65: [1.0, 1.0]}},
        {"round": 1, "scores": {str(each): [0, 0] for each in range(1025)}},
        {"round": 1, "arrivals": {"a": -1}},
        {"round": 1, "arrivals": {"a": 1.5}},
        {"round": 1, "refused": {"a": 5}},
        {"round": 1, "refused": {"a": "x" * 201}},
    ],
)
def test_what_is_no_report_is_refused(body: Any) -> None:
    with pytest.raises(ValueError, match="report"):
        read_report(body)

"""Sampling against transformers' own filters, and against the frequencies it promises."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trainwright.errors import UserError
from trainwright.rollout.sampling import SamplingParams, choose, distribution


def logits(rows: int = 5, vocabulary: int = 40) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 400])
@pytest.mark.parametrize("top_p", [0.0, 0.4, 0.95, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.2, 1.0])
def test_the_filters_are_those_of_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    filters = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        filters.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        filters.append(TopPLogitsWarper(top_p))
    if min_p:
        filters.append(MinPLogitsWarper(min_p))
    expected = filters(torch.zeros(5, 1, dtype=torch.long), logits()).softmax(-1)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(distribution(logits(), params), expected)


def test_tokens_come_as_often_as_they_are_probable() -> None:
    draws = 20_000
    params = SamplingParams(temperature=0.9, top_p=0.97)
    generator = torch.Generator().manual_seed(0)
    row = logits(1, 12)
    chosen = torch.tensor(choose(row.expand(draws, -1), params, [generator] * draws))
    expected = distribution(row, params)[0]
    counted = torch.bincount(chosen, minlength=12) / draws
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((counted - expected).abs() <= 4 * deviation).all()
    assert (counted[expected == 0] == 0).all()


def test_temperature_zero_takes_the_likeliest() -> None:
    params = SamplingParams(temperature=0)
    assert choose(logits(), params, []) == logits().argmax(-1).tolist()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(5)]

    together = choose(logits(), SamplingParams(), generators())
    alone = [choose(logits()[i : i + 1], SamplingParams(), [generators()[i]])[0] for i in range(5)]
    assert together == alone


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"top_p": 1.2},
        {"top_k": -1},
        {"min_p": 2.0},
        {"max_new_tokens": 0},
        {"stop": ("",)},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_one_stop_string_may_be_given_bare() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]

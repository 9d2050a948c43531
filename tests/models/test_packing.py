"""Documents packed into a row give the logits and gradients that they give alone."""

from __future__ import annotations

import pytest
import torch

from tests.models.cases import CASES, hf_config, randomise, tokens
from trainwright.models.decoder import Decoder
from trainwright.models.families import decoder_config

LENGTHS = (9, 1, 18)  # on both sides of the windows (5) and of the rope switches (12, 16)


def packed(rows: torch.Tensor, front: int, back: int) -> tuple[torch.Tensor, ...]:
    """`rows` [1, total] as documents of LENGTHS between padding: ids, positions, segments."""
    parts = [torch.arange(length) for length in LENGTHS]
    positions = torch.cat([torch.zeros(front), *parts, torch.zeros(back)]).long()[None]
    numbers = [torch.full((length,), i) for i, length in enumerate(LENGTHS)]
    padding = [torch.full((count,), -1) for count in (front, back)]
    segments = torch.cat([padding[0], *numbers, padding[1]])[None]
    ids = torch.nn.functional.pad(rows, (front, back), value=3)
    return ids, positions, segments


@pytest.mark.parametrize("name", CASES)
def test_packed_rows_equal_separate_rows(name: str) -> None:
    decoder = Decoder(decoder_config(hf_config(name))).eval()
    randomise(decoder)
    front, back = 2, 3
    row = tokens(1, sum(LENGTHS))
    ids, positions, segments = packed(row, front, back)
    upstream = torch.randn(1, row.shape[1], decoder.vocab_size)

    logits = decoder(ids, position_ids=positions, segment_ids=segments)[:, front:-back]
    (logits * upstream).sum().backward()
    gradients = [parameter.grad for parameter in decoder.parameters()]
    decoder.zero_grad(set_to_none=True)

    documents = row.split(LENGTHS, dim=1)
    alone = torch.cat([decoder(document) for document in documents], dim=1)
    (alone * upstream).sum().backward()
    assert (logits - alone).abs().max() <= 1e-5
    for gradient, parameter in zip(gradients, decoder.parameters(), strict=True):
        assert (gradient - parameter.grad).norm() <= 1e-5 * parameter.grad.norm() + 1e-6


def test_rows_of_one_document_need_no_segments() -> None:
    decoder = Decoder(decoder_config(hf_config("gemma3"))).eval()
    row = tokens(3, 20)
    one = decoder(row, segment_ids=torch.zeros_like(row))
    assert (one - decoder(row)).abs().max() <= 1e-5


def test_padding_carries_no_nan_into_the_gradients() -> None:
    decoder = Decoder(decoder_config(hf_config("gemma2")))
    row = tokens(2, 12)
    segments = torch.full_like(row, -1)
    segments[0, :4] = 0
    decoder(row, segment_ids=segments)[0, :4].sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in decoder.parameters())

"""Decoders whose rows lie on several workers: losses and gradients of one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.models.cases import VOCABULARY, hf_config, randomise
from tests.parallel.test_context import CPU, PACKED, SEQUENCE, counted
from tests.workers import run_on
from trainwright.models.decoder import Decoder
from trainwright.models.families import decoder_config
from trainwright.objectives.next_token import next_token_loss
from trainwright.parallel.context import METHODS, install, suspended
from trainwright.parallel.recompute import recompute_block


def tiny_decoder(name: str) -> Decoder:
    """A few layers of a family, every weight drawn; on every worker the same."""
    decoder = Decoder(decoder_config(hf_config(name)))
    randomise(decoder)
    return decoder


def whole_batch(packed: bool) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=generator)
    segments = torch.tensor(PACKED)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    slots = torch.arange(SEQUENCE).expand(2, -1)
    firsts = torch.where(starts, slots, 0).cummax(1).values
    labels = ids[:, 1:].masked_fill(segments < 0, -100)
    return {
        "input_ids": ids[:, :-1],
        "labels": labels,
        "position_ids": slots - firsts if packed else slots,
        "segment_ids": segments if packed else None,
    }


Outcome = tuple[float, dict[str, np.ndarray]]


def train_pass(decoder: Decoder, batch: dict[str, Tensor | None]) -> Outcome:
    """The loss sum and every parameter's gradient, of this process alone."""
    loss = next_token_loss(decoder, batch)
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in decoder.named_parameters()}  # type: ignore[union-attr]
    return loss.item(), gradients


def train_on_columns(
    method: str, name: str, packed: bool, blocks: str = "none", fault: str = ""
) -> Outcome:
    """`train_pass` of this worker's columns; losses and gradients summed over workers."""
    decoder, batch = tiny_decoder(name), whole_batch(packed)
    install(decoder, method, dist.group.WORLD)  # type: ignore[arg-type]
    for block in decoder.blocks:
        if blocks == "compiled":
            block.compile(backend="aot_eager", fullgraph=True)
        else:
            recompute_block(block, blocks)
    context = decoder.model.context
    assert context is not None
    slots = context.slots(SEQUENCE, CPU)
    for key in ("input_ids", "labels"):
        batch[key] = batch[key][:, slots]  # type: ignore[index]
    if fault == "a document border leaks":
        batch["segment_ids"] = None
    if fault == "rotary offset":
        tables = decoder.model.rotary_tables
        late = torch.full((1, SEQUENCE), dist.get_rank())
        decoder.model.rotary_tables = (  # type: ignore[method-assign]
            lambda positions, segments, dtype: tables(positions + late, segments, dtype)
        )
    loss, gradients = train_pass(decoder, batch)
    total = torch.tensor(loss)
    for tensor in (total, *map(torch.from_numpy, gradients.values())):
        dist.all_reduce(tensor)
    return total.item(), gradients


def differences(got: Outcome, wanted: Outcome) -> tuple[float, float]:
    """Of the loss and, at most, of a parameter's gradient: both relative."""
    assert got[1].keys() == wanted[1].keys()
    worst = max(
        np.linalg.norm(got[1][name] - want) / max(np.linalg.norm(want), 1e-6)
        for name, want in wanted[1].items()
    )
    return abs(got[0] - wanted[0]) / wanted[0], float(worst)


FAMILIES = [("llama", False), ("gemma2", True), ("llama-dynamic", True), ("deepseek", True)]


@pytest.mark.parametrize(("name", "packed"), FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_decoder_learns_as_in_one_process(method: str, name: str, packed: bool) -> None:
    wanted = train_pass(tiny_decoder(name), whole_batch(packed))
    for workers in (2, 4):
        for got in run_on(workers, train_on_columns, method, name, packed):
            loss, gradient = differences(got, wanted)
            assert loss <= 1e-5 and gradient <= 1e-4, (workers, loss, gradient)


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("method", METHODS)
def test_recomputing_collectives_changes_nothing(method: str, recompute: str) -> None:
    wanted = train_pass(tiny_decoder("llama"), whole_batch(True))
    for got in run_on(2, train_on_columns, method, "llama", True, recompute):
        loss, gradient = differences(got, wanted)
        assert loss <= 1e-5 and gradient <= 1e-4, (loss, gradient)


def test_a_ring_is_one_operation_to_the_compiler() -> None:
    wanted = train_pass(tiny_decoder("llama"), whole_batch(True))
    loss, gradient = differences(
        run_on(2, train_on_columns, "ring", "llama", True, "compiled")[0], wanted
    )
    assert loss <= 1e-5 and gradient <= 1e-4, (loss, gradient)


def bytes_recomputed(method: str) -> int:
    """What a recomputing block sends beyond one that does not."""
    totals = []
    for recompute in ("none", "selective"):
        with counted() as sent:
            train_on_columns(method, "llama", True, recompute)
        totals.append(sum(sent.values()))
    return totals[1] - totals[0]


def test_a_ring_is_not_gone_round_again_by_selective_recompute() -> None:
    assert run_on(2, bytes_recomputed, "ring") == [0, 0]
    assert all(extra > 0 for extra in run_on(2, bytes_recomputed, "all_gather"))


@pytest.mark.parametrize("fault", ["rotary offset", "a document border leaks"])
@pytest.mark.parametrize("method", METHODS)
def test_faults_are_seen(method: str, fault: str) -> None:
    """The measure that the tests above take can tell right from wrong."""
    wanted = train_pass(tiny_decoder("llama"), whole_batch(True))
    got = run_on(2, train_on_columns, method, "llama", True, "none", fault)[0]
    loss, gradient = differences(got, wanted)
    assert loss > 1e-5 and gradient > 1e-4, (loss, gradient)


def generate_and_score(method: str) -> tuple[list[Any], list[Any]]:
    """Logits of whole rows: token by token with a cache, and with the context suspended."""
    decoder = tiny_decoder("llama")
    install(decoder, method, dist.group.WORLD)  # type: ignore[arg-type]
    ids = whole_batch(False)["input_ids"]
    assert ids is not None
    with torch.no_grad():
        cache = decoder.new_cache()
        first = decoder(ids[:, :9], cache=cache)
        rest = [decoder(ids[:, at : at + 1], cache=cache) for at in range(9, 13)]
        with suspended([decoder]):
            alone = decoder(ids)
        assert decoder.model.context is not None
    return torch.cat([first, *rest], 1).tolist(), alone.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_generation_has_whole_rows(method: str) -> None:
    ids = whole_batch(False)["input_ids"]
    assert ids is not None
    with torch.no_grad():
        wanted = tiny_decoder("llama")(ids)
    for cached, alone in run_on(2, generate_and_score, method):
        torch.testing.assert_close(torch.tensor(cached), wanted[:, :13], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(alone), wanted, atol=1e-5, rtol=1e-5)

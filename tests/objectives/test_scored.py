"""The reward objective on packed pairs, beside answers scored alone and TRL's loss."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.cases import hf_config, randomise
from trainwright.data.batches import Batch
from trainwright.models.families import decoder_config
from trainwright.models.scoring import with_head
from trainwright.models.weights import new_model, save_model
from trainwright.objectives.build import build_objective
from trainwright.objectives.scored import score_sequences
from trainwright.parallel.spread import whole_model
from trainwright.recipe.objective import Objective as Section
from trainwright.training.micro_batches import to_tensors
from trainwright.training.sameness import made_examples, rows_of

CPU = torch.device("cpu")
HF = with_head(hf_config("llama-biases"), scores=True, pad_token_id=0)


def decoder(seed: int = 1) -> Any:
    model = new_model(decoder_config(HF))
    randomise(model, seed)
    return model


def pairs(rows: int = 6) -> Batch:
    """Packed pairs, whose margins are made up."""
    whole = made_examples(0, rows=rows, sequence=48, vocabulary=60, seed=5, parts=2)
    assert whole.values is not None
    margins = np.random.default_rng(1).normal(size=whole.values.shape).astype(np.float32)
    return replace(whole, values=margins)


def answers(whole: Batch) -> tuple[list[Tensor], Tensor]:
    """Every answer's tokens, pair after pair, and the pairs' margins."""
    found, margins = [], []
    assert whole.segment_ids is not None and whole.values is not None
    for row, names in enumerate(whole.documents):
        for segment in range(2 * len(names)):
            at = whole.segment_ids[row] == segment
            found.append(torch.from_numpy(whole.input_ids[row][at]))
        margins += whole.values[row, : len(names)].tolist()
    return found, torch.tensor(margins)


def taken(model: nn.Module, whole: Batch, center: float, pieces: int) -> tuple[Tensor, dict]:
    """The objective's mean loss and figures over so many micro-batches."""
    objective = build_objective(Section(kind="reward", center=center))
    weights, spread = objective.weights(whole), whole_model(model, CPU)  # type: ignore[arg-type]
    rows = len(whole.input_ids) // pieces
    loss, figures = torch.zeros(()), dict[str, float]()
    for start in range(0, len(whole.input_ids), rows):
        sums, found = objective(model, to_tensors(whole, start, start + rows, spread, None))
        loss = loss + sum(total / weights[name] for name, total in sums.items())
        for name, value in found.items():
            figures[name] = figures.get(name, 0.0) + float(value) / weights["pairs"]
    return loss, figures


def test_a_score_is_that_of_the_sequence_s_last_token() -> None:
    model, whole = decoder(), pairs(4)
    with torch.no_grad():
        tensors = to_tensors(whole, 0, 4, whole_model(model, CPU), None)
        packed = score_sequences(model, tensors, None)
        alone = torch.stack([model(ids[None])[0, -1] for ids in answers(whole)[0]])
    number = [2 * len(names) for names in whole.documents]
    flat = torch.cat([packed[row, :n] for row, n in enumerate(number)])
    torch.testing.assert_close(flat, alone, rtol=1e-5, atol=1e-6)
    assert all((packed[row, n:] == 0).all() for row, n in enumerate(number))
    assert len(set(number)) > 1  # so that some places are empty


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("center", [0.0, 0.05])
def test_packed_and_accumulated_is_the_mean_over_lone_pairs(center: float, pieces: int) -> None:
    model, whole = decoder(), pairs()
    loss, figures = taken(model, whole, center, pieces)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    found, margins = answers(whole)
    scores = torch.stack([model(ids[None])[0, -1] for ids in found]).view(-1, 2)
    chosen, rejected = scores.unbind(1)
    ahead = chosen - rejected
    wanted = (-F.logsigmoid(ahead - margins) + center * (chosen + rejected) ** 2).mean()
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-9)
        assert error < 1e-4, name
    assert figures["rewards/accuracies"] == pytest.approx((ahead > 0).float().mean().item())
    assert figures["rewards/margins"] == pytest.approx(ahead.mean().item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("center", [0.0, 0.01])
@pytest.mark.parametrize("with_margins", [False, True])
def test_loss_and_gradients_are_those_of_trl_s_trainer(tmp_path, center, with_margins) -> None:
    """On the same weights, in transformers' own class, with TRL's batch of the same pairs."""
    pytest.importorskip("trl")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from transformers import AutoModelForSequenceClassification
    from trl.trainer.reward_trainer import DataCollatorForPreference

    from tests.objectives import trl_losses

    model, whole = decoder(), pairs()
    if not with_margins:
        assert whole.values is not None
        whole.values[:] = 0
    save_model(model, tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    found, margins = answers(whole)
    rows = [
        {"chosen_ids": chosen.tolist(), "rejected_ids": rejected.tolist()}
        | ({"margin": margin} if with_margins else {})
        for chosen, rejected, margin in zip(found[::2], found[1::2], margins.tolist(), strict=True)
    ]
    batch = DataCollatorForPreference(pad_token_id=0)(rows)
    wanted, metrics = trl_losses.reward_of(theirs, batch, center or None)
    wanted.backward()

    loss, figures = taken(model, whole, center, 2)
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)
    assert figures["rewards/accuracies"] == pytest.approx(metrics["accuracy"])
    assert figures["rewards/margins"] == pytest.approx(metrics["margin"], rel=1e-4)


def test_scores_are_in_fp32_where_products_are_not() -> None:
    model, whole = decoder(), pairs(2)
    tensors = to_tensors(whole, 0, 2, whole_model(model, CPU), None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = score_sequences(model, tensors, None)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def test_a_row_without_pairs_adds_nothing() -> None:
    whole = pairs(2)
    assert whole.segment_ids is not None and whole.values is not None
    whole.segment_ids[0], whole.labels[0] = -1, -100
    emptied = replace(whole, documents=((), whole.documents[1]))
    second = rows_of(emptied, slice(1, 2))
    loss, wanted = (taken(decoder(), each, 0.01, 1)[0] for each in (emptied, second))
    torch.testing.assert_close(loss, wanted)

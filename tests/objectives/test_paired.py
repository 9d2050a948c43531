"""Objectives over whole answers on a real decoder, against sums over its plain logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.cases import hf_config, randomise
from trainwright.data.batches import Batch
from trainwright.models.decoder import Decoder
from trainwright.models.families import decoder_config
from trainwright.models.weights import new_model
from trainwright.objectives.build import build_objective
from trainwright.objectives.objective import Tensors
from trainwright.objectives.sequences import score_answers
from trainwright.parallel.spread import whole_model
from trainwright.recipe.objective import Objective as Section
from trainwright.training.micro_batches import to_tensors
from trainwright.training.reference import ReferenceModel
from trainwright.training.sameness import made_examples, rows_of

CPU = torch.device("cpu")
KINDS: list[dict[str, Any]] = [
    {"kind": "dpo"},
    {"kind": "dpo", "loss": {"ipo": 0.5, "sft": 2.0}, "beta": 0.3},
    {"kind": "dpo", "loss": "cdpo", "label_smoothing": 0.2},
    {"kind": "kto", "desirable_weight": 1.5},
    {"kind": "orpo"},
    {"kind": "cpo", "sft_weight": 0.5},
    {"kind": "simpo"},
]


def decoder(seed: int) -> Decoder:
    torch.manual_seed(seed)
    model = new_model(decoder_config(hf_config("llama-biases")))
    randomise(model)
    return model.double()


def batch(rows: int = 6) -> Batch:
    return made_examples(0, rows=rows, sequence=48, vocabulary=60, seed=5, parts=2)


def answers(model: Decoder, whole: Batch) -> tuple[Tensor, Tensor]:
    """Each sequence's log-probability and targets, one at a time, unpacked: [examples, 2]."""
    sums, counts = [], []
    assert whole.segment_ids is not None
    for row, names in enumerate(whole.documents):
        for segment in range(2 * len(names)):
            at = whole.segment_ids[row] == segment
            ids = torch.from_numpy(whole.input_ids[row][at])[None]
            labels = torch.from_numpy(whole.labels[row][at])
            logits = model(ids)[0].double()
            kept = labels != -100
            picked = F.log_softmax(logits, -1)[kept].gather(-1, labels[kept][:, None])
            sums.append(picked.sum())
            counts.append(kept.sum())
    return torch.stack(sums).view(-1, 2), torch.stack(counts).view(-1, 2).double()


def expected_loss(section: Section, policy: Tensor, reference: Tensor, counts: Tensor, good: Any):
    """The mean over all examples, by the formulas of the papers."""
    beta = section.strength
    chosen, rejected = (policy - reference).unbind(1)
    nll = -policy[:, 0].sum() / counts[:, 0].sum()
    means = policy / counts
    if section.kind == "kto":
        kl = (policy - reference)[:, 1].mean().detach().clamp(min=0)
        wins = section.desirable_weight * (1 - torch.sigmoid(beta * (chosen - kl)))
        losses = (1 - torch.sigmoid(beta * (kl - chosen))) * section.undesirable_weight
        return torch.where(good, wins, losses).mean()
    if section.kind == "dpo":
        total = torch.zeros((), dtype=torch.float64)
        logit = beta * (chosen - rejected)
        smooth = section.label_smoothing
        for name, weight in section.losses.items():
            total = (
                total
                + weight
                * {
                    "sigmoid": lambda: -F.logsigmoid(logit).mean(),
                    "cdpo": lambda: (
                        -(1 - smooth) * F.logsigmoid(logit) - smooth * F.logsigmoid(-logit)
                    ).mean(),
                    "ipo": lambda: (
                        (chosen / counts[:, 0] - rejected / counts[:, 1] - 1 / (2 * beta)) ** 2
                    ).mean(),
                    "sft": lambda: nll,
                }[name]()
            )
        return total
    if section.kind == "orpo":
        odds = means - torch.log1p(-means.exp())
        losses = -beta * F.logsigmoid(odds[:, 0] - odds[:, 1])
    elif section.kind == "cpo":
        losses = -F.logsigmoid(beta * (policy[:, 0] - policy[:, 1]))
    else:
        losses = -F.logsigmoid(beta * (means[:, 0] - means[:, 1]) - section.margin)
    return losses.mean() + section.chosen_weight * nll


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
@pytest.mark.parametrize("pieces", [1, 3])
def test_packed_and_accumulated_is_the_mean_over_lone_examples(kind: Any, pieces: int) -> None:
    section = Section.model_validate(kind)
    model, still = decoder(1), decoder(2)
    objective, whole = build_objective(section), batch()
    weights = objective.weights(whole)

    spread, reference = whole_model(model, CPU), ReferenceModel(whole_model(still, CPU))
    rows = len(whole.input_ids) // pieces
    tensors = [
        to_tensors(whole, start, start + rows, spread, None)
        for start in range(0, len(whole.input_ids), rows)
    ]
    if objective.needs_reference:
        reference.attach(objective, spread, tensors)
    loss = torch.zeros((), dtype=torch.float64)
    figures: dict[str, float] = {}
    for each in tensors:
        sums, found = objective(model, each)
        loss = loss + sum(total / weights[name] for name, total in sums.items())
        for name, value in found.items():
            figures[name] = figures.get(name, 0.0) + float(value)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]

    model.zero_grad()
    policy, counts = answers(model, whole)
    with torch.no_grad():
        before, _ = answers(still, whole)
    assert whole.values is not None
    known = [whole.values[row, : len(names)] for row, names in enumerate(whole.documents)]
    good = torch.from_numpy(np.concatenate(known)) > 0
    if not objective.needs_reference:
        before = torch.zeros_like(before)
    wanted = expected_loss(section, policy, before, counts, good)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-8)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-12)
        assert error < 1e-5, name
    assert set(figures) == set(objective.figures)
    if section.kind == "dpo":
        right = (policy - before)[:, 0] > (policy - before)[:, 1]
        assert figures["rewards/accuracies"] == right.sum()


def test_the_first_step_s_loss_is_ln_2() -> None:
    model = decoder(3)
    objective, whole = build_objective(Section(kind="dpo")), batch()
    spread = whole_model(model, CPU)
    tensors = [to_tensors(whole, 0, len(whole.input_ids), spread, None)]
    ReferenceModel(spread).attach(objective, spread, tensors)
    sums, _ = objective(model, tensors[0])
    assert sums["pairs"].item() / whole.examples == pytest.approx(np.log(2), abs=1e-7)


def test_rows_of_a_batch_keep_what_is_known_of_them() -> None:
    whole = batch()
    some = rows_of(whole, slice(2, 4))
    assert some.values is not None and whole.values is not None
    assert (some.values == whole.values[2:4]).all()
    assert some.examples == sum(map(len, whole.documents[2:4]))


def test_scores_are_of_each_sequence_alone() -> None:
    model, whole = decoder(1), batch(4)
    tensors: Tensors = to_tensors(whole, 0, 4, whole_model(model, CPU), None)
    with torch.no_grad():
        scores = score_answers(model, tensors, None)
        policy, counts = answers(model, whole)
    number = [2 * len(names) for names in whole.documents]
    flat = torch.cat([scores.sums[row, :n] for row, n in enumerate(number)])
    torch.testing.assert_close(flat.double(), policy.flatten(), rtol=1e-6, atol=1e-6)
    held = torch.cat([scores.counts[row, :n] for row, n in enumerate(number)])
    assert (held == counts.flatten()).all()

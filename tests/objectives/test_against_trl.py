"""Every loss that TRL has too, on the same numbers: values, gradients and logged figures."""

from __future__ import annotations

import os

import pytest
import torch

from tests.objectives import distilling
from trainwright.objectives import odds, preference, reward, unpaired
from trainwright.objectives.log_probs import PairScores, pair_scores, sequence_scores
from trainwright.objectives.preference import LOSSES, PreferenceOptions, preference_losses
from trainwright.recipe.objective import SMOOTHED

pytestmark = pytest.mark.slow  # importing TRL takes seconds

PAIRS, TARGETS = 6, 9
# What TRL calls those that it names otherwise.
THEIR_NAMES = {"exo": "exo_pair", "nca": "nca_pair", "bco": "bco_pair", "sppo": "sppo_hard"}


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it says so at every import
    from tests.objectives import trl_losses

    return trl_losses


def answers(number: int):
    """Log-probabilities [number, targets] with a gradient, which are trained, and the labels."""
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(0, 4, (number, 1), generator=generator)
    ends = torch.randint(5, TARGETS + 1, (number, 1), generator=generator)
    places = torch.arange(TARGETS)
    trained = (places >= starts) & (places < ends)
    log_probs = (-2.0 * torch.rand(number, TARGETS, generator=generator)).requires_grad_()
    labels = torch.full((number, TARGETS), -100).masked_fill(trained, 7)
    sums = log_probs.detach().where(trained, 0.0).sum(-1)
    reference = sums + torch.randn(number, generator=generator)
    return log_probs, trained, labels, reference, generator


def pairs():
    """The same for pairs, with our scores of them, packed one pair to a row."""
    log_probs, trained, labels, reference, _ = answers(2 * PAIRS)
    rows = [torch.cat(list(each.chunk(2)), -1) for each in (log_probs, labels)]
    segments = torch.arange(2).repeat_interleave(TARGETS).expand(PAIRS, -1)
    policy = sequence_scores(*rows, segments, 2)
    fixed = sequence_scores(rows[0].detach(), rows[1], segments, 2)
    fixed = fixed._replace(sums=torch.stack(list(reference.chunk(2)), -1))
    return log_probs, trained, reference.chunk(2), pair_scores(policy, fixed)


def equal_with_gradients(ours, theirs, log_probs, tolerance=1e-6):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    gradients = [
        torch.autograd.grad(value, log_probs, retain_graph=True)[0] for value in (ours, theirs)
    ]
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=10 * tolerance, atol=tolerance)


def their_name(name: str) -> str:
    return THEIR_NAMES.get(name, name)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cdpo"])
def test_preference_losses(trl, name, beta):
    log_probs, trained, reference, scores = pairs()
    smoothing = 0.2 if name in SMOOTHED else 0.0
    options = PreferenceOptions(beta=beta, label_smoothing=smoothing)
    theirs, _ = trl.dpo(
        {their_name(name): 1.0},
        log_probs,
        trained,
        *reference,
        beta=beta,
        label_smoothing=smoothing,
    )
    equal_with_gradients(LOSSES[name](scores, options).mean(), theirs, log_probs)


@pytest.mark.parametrize(
    ("divergence", "theirs"),
    [("forward_kl", "forward_kl"), ("js", "js_divergence"), ("alpha", "alpha_divergence")],
)
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "exo", "sigmoid_norm", "robust"])
def test_f_divergences(trl, name, divergence, theirs):
    log_probs, trained, reference, scores = pairs()
    options = PreferenceOptions(label_smoothing=0.1, divergence=divergence, divergence_alpha=0.3)
    wanted, _ = trl.dpo(
        {their_name(name): 1.0},
        log_probs,
        trained,
        *reference,
        label_smoothing=0.1,
        divergence=theirs,
        alpha=0.3,
    )
    equal_with_gradients(LOSSES[name](scores, options).mean(), wanted, log_probs, 2e-6)


def test_weighted_sums_of_losses(trl):
    log_probs, trained, reference, scores = pairs()
    ours = preference_losses({"sigmoid": 1.0, "bco": 0.3}, scores, PreferenceOptions()).mean()
    theirs, _ = trl.dpo({"sigmoid": 1.0, "bco_pair": 0.3}, log_probs, trained, *reference)
    equal_with_gradients(ours, theirs, log_probs)


def test_figures_of_pairs(trl):
    log_probs, trained, reference, scores = pairs()
    _, wanted = trl.dpo({"sigmoid": 1.0}, log_probs, trained, *reference, beta=0.3)
    figures = preference.preference_figures(scores, *preference.implicit_rewards(scores, 0.3))
    number = figures.pop("pairs")
    assert number == PAIRS
    assert 0 < figures["rewards/accuracies"] < PAIRS
    for name, value in figures.items():
        assert (value / number).item() == pytest.approx(wanted[name], rel=1e-5), name


@pytest.mark.parametrize("shift", [2.0, -3.0])  # a positive kl, and one that is cut off at 0
@pytest.mark.parametrize("loss", ["kto", "apo_zero"])
def test_unpaired_losses(trl, loss, shift):
    log_probs, trained, labels, reference, generator = answers(7)
    desirable = torch.tensor([1, 0, 0, 1, 1, 0, 1], dtype=torch.bool)
    kl_reference = -10.0 * torch.rand(7, generator=generator)
    kl_policy = kl_reference + shift + torch.rand(7, generator=generator)
    weights = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    name = "apo_zero_unpaired" if loss == "apo_zero" else loss
    theirs, wanted = trl.kto(
        log_probs, trained, reference, desirable, kl_policy, kl_reference, loss=name, **weights
    )
    scores = sequence_scores(log_probs, labels, None, 1)
    policy, counts = scores.sums.squeeze(-1), scores.counts.squeeze(-1)
    kl = unpaired.kl_baseline(*unpaired.kl_sum(kl_policy, kl_reference, counts))
    ours = unpaired.unpaired_losses(policy, reference, desirable, kl, loss=loss, **weights)
    equal_with_gradients(ours.mean(), theirs, log_probs)
    if loss == "kto":
        assert kl.item() == pytest.approx(wanted["kl"], rel=1e-6)
        assert (kl > 0) == (shift > 0)
    figures = unpaired.unpaired_figures(policy, reference, desirable, counts, 0.3)
    for kind in ("chosen", "rejected"):
        for name in (f"rewards/{kind}", f"logps/{kind}"):
            value = figures[name] / figures[kind]
            assert value.item() == pytest.approx(wanted[name], rel=1e-5), name


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "simpo"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cpo_and_simpo(trl, loss, smoothing):
    log_probs, trained, _, scores = pairs()
    means = loss in odds.BY_TOKENS
    sums = (log_probs * trained).sum(-1) / (trained.sum(-1) if means else 1)
    theirs = trl.cpo(
        *sums.chunk(2), loss_type=loss, beta=0.7, simpo_gamma=0.4, label_smoothing=smoothing
    )
    ours = odds.contrastive_losses(
        scores, loss=loss, beta=0.7, gamma=0.4, label_smoothing=smoothing
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    equal_with_gradients(ours.mean(), theirs.mean(), log_probs)


def test_orpo(trl):
    log_probs, trained, _, scores = pairs()
    means = (log_probs * trained).sum(-1) / trained.sum(-1)
    theirs = trl.orpo(*means.chunk(2), beta=0.25)  # TRL subtracts it from the cross entropy
    ours = odds.orpo_losses(scores, beta=0.25)
    equal_with_gradients(ours.mean(), -theirs.mean(), log_probs)


@pytest.mark.parametrize("center", [0.0, 0.01])
@pytest.mark.parametrize("with_margins", [False, True])
def test_reward_model(trl, center, with_margins):
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(2 * PAIRS, generator=generator, requires_grad=True)
    margins = torch.rand(PAIRS, generator=generator) if with_margins else None
    theirs, wanted = trl.reward(*scores.chunk(2), margins, center or None)
    ours = reward.reward_losses(
        *scores.chunk(2), 0.0 if margins is None else margins, center=center
    )
    equal_with_gradients(ours.mean(), theirs, scores)
    real = torch.ones(PAIRS, dtype=torch.bool)
    figures = reward.reward_figures(*scores.chunk(2), real)
    for name, metric in (("rewards/accuracies", "accuracy"), ("rewards/margins", "margin")):
        value = figures[name] / figures["pairs"]
        assert value.item() == pytest.approx(wanted[metric], rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_distillation(trl, beta, temperature):
    student, teacher = distilling.student(), distilling.teacher()
    batch = distilling.batch(student)
    ours, _ = distilling.loss(student, teacher, batch, beta=beta, temperature=temperature)
    logits = [model(batch["input_ids"], **distilling.layout(batch)) for model in (student, teacher)]
    settings = {"beta": beta, "temperature": temperature}
    theirs = trl.jsd(logits[0], logits[1].detach(), batch["labels"], **settings)
    trained = int((batch["labels"] != -100).sum())
    weight = student.model.layers["0"].mlp.down_proj.weight
    equal_with_gradients(ours / trained, theirs / trained, weight, 2e-6)


def test_pairs_are_what_the_comparison_meant():
    """The packed scores hold the sums that TRL takes over its rows."""
    log_probs, trained, reference, scores = pairs()
    chosen, rejected = (log_probs * trained).sum(-1).chunk(2)
    chosen_tokens, rejected_tokens = trained.sum(-1).float().chunk(2)
    wanted = PairScores(chosen, rejected, *reference, chosen_tokens, rejected_tokens)
    for ours, theirs in zip(scores, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)

"""Sums over packed sequences, against a loop over tokens."""

from __future__ import annotations

import torch

from trainwright.objectives.log_probs import SequenceScores, pair_scores, sequence_scores

LABELS = torch.tensor([[-100, 5, 6, -100, 7, 8, -100, -100], [-100, -100, 1, 2, 3, -100, 4, -100]])
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, -1], [0, 0, 0, 0, 0, 1, 1, 1]])


def log_probs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return -torch.rand(2, 8, generator=generator, dtype=torch.float64)


def test_sums_and_counts_are_those_of_a_loop_over_tokens():
    values = log_probs()
    scores = sequence_scores(values, LABELS, SEGMENTS, 4)
    sums, counts = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    for row in range(2):
        for place in range(8):
            if LABELS[row, place] != -100:
                sums[row, SEGMENTS[row, place]] += values[row, place]
                counts[row, SEGMENTS[row, place]] += 1
    torch.testing.assert_close(scores.sums, sums)
    assert torch.equal(scores.counts, counts)
    assert counts.tolist() == [[2, 1, 1, 0], [3, 1, 0, 0]]


def test_a_trained_label_in_the_padding_belongs_to_no_sequence():
    labels = LABELS.clone()
    labels[0, -1] = 9
    values = log_probs()
    assert torch.equal(
        sequence_scores(values, labels, SEGMENTS, 3).sums,
        sequence_scores(values, LABELS, SEGMENTS, 3).sums,
    )


def test_without_segments_a_row_is_one_sequence():
    values = log_probs()
    scores = sequence_scores(values, LABELS, None, 1)
    torch.testing.assert_close(scores.sums, (values * (LABELS != -100)).sum(-1, keepdim=True))
    assert scores.counts.tolist() == [[4], [4]]


def test_a_token_gets_the_gradient_of_its_sequence():
    values = log_probs().requires_grad_()
    weights = torch.tensor([[2.0, 3.0, 5.0], [7.0, 11.0, 13.0]], dtype=torch.float64)
    (sequence_scores(values, LABELS, SEGMENTS, 3).sums * weights).sum().backward()
    assert values.grad.tolist() == [[0, 2, 2, 0, 3, 5, 0, 0], [0, 0, 7, 7, 7, 0, 11, 0]]


def test_pairs_are_even_and_odd_segments_and_empty_places_are_not_real():
    policy = SequenceScores(
        torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, 0.0, 0.0]]),
        torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 0.0, 0.0]]),
    )
    reference = SequenceScores(policy.sums * 10, policy.counts)
    pairs = pair_scores(policy, reference)
    assert pairs.policy_chosen.tolist() == [-1, -3, -5, 0]
    assert pairs.policy_rejected.tolist() == [-2, -4, -6, 0]
    assert pairs.reference_chosen.tolist() == [-10, -30, -50, 0]
    assert pairs.reference_rejected.tolist() == [-20, -40, -60, 0]
    assert pairs.chosen_tokens.tolist() == [1, 3, 5, 0]
    assert pairs.rejected_tokens.tolist() == [2, 4, 6, 0]
    assert pairs.real.tolist() == [True, True, True, False]
    assert pairs.chosen_ratio.tolist() == [9, 27, 45, 0]
    alone = pair_scores(policy)
    assert alone.chosen_ratio.tolist() == [-1, -3, -5, 0]
    assert alone.rejected_ratio.tolist() == [-2, -4, -6, 0]

"""From the log-probabilities of tokens to those of whole sequences.

Objectives over answers weigh a sequence as one: log p(answer | prompt) is the sum over its trained
tokens. Several sequences lie packed in a row, numbered by `segment_ids`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainwright.kernels.cross_entropy import IGNORED


class SequenceScores(NamedTuple):
    """What the sequences of a batch have been given, both [rows, segments] in fp32 or wider.

    A segment that a row does not have stands as 0 in both. A tuple, so that FSDP finds the tensors
    in a forward's result.
    """

    sums: Tensor  # of log p over the trained targets
    counts: Tensor  # of trained targets


class PairScores(NamedTuple):
    """Log-probabilities of the answers of each pair, sums over trained tokens; all [pairs].

    A place that holds no pair has 0 everywhere. Every loss is finite there, and so is its gradient;
    whoever sums the losses leaves such places out (`real`).
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """log π(chosen) − log π_ref(chosen), [pairs]."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """log π(rejected) − log π_ref(rejected), [pairs]."""
        return self.policy_rejected - self.reference_rejected

    @property
    def real(self) -> Tensor:
        """Which places hold a pair, bool [pairs]."""
        return (self.chosen_tokens > 0) & (self.rejected_tokens > 0)


def sequence_scores(
    token_log_probs: Tensor, labels: Tensor, segment_ids: Tensor | None, segments: int
) -> SequenceScores:
    """Sums of log p and counts of trained targets for each sequence of each row.

    token_log_probs, labels (-100 = not trained) and segment_ids are [rows, sequence]; segments are
    numbered from 0 to `segments` - 1, -1 is padding, None means that each row is one sequence.
    Differentiable.
    """
    trained = labels != IGNORED
    if segment_ids is None:
        member = trained.unsqueeze(1)
    else:
        numbers = torch.arange(segments, device=labels.device)
        member = (segment_ids.unsqueeze(1) == numbers[:, None]) & trained.unsqueeze(1)
    # A masked sum rather than a scatter: on a GPU its order of adding, so its result, is fixed.
    sums = token_log_probs.unsqueeze(1).where(member, 0.0).sum(-1)
    return SequenceScores(sums, member.sum(-1).to(sums.dtype))


def pair_scores(policy: SequenceScores, reference: SequenceScores | None = None) -> PairScores:
    """Pairs of each row's even segments (chosen) and odd ones (rejected); [rows · segments / 2].

    Without a reference its log-probabilities are 0. The number of segments is even.
    """
    chosen, rejected = _halves(policy.sums)
    if reference is None:
        reference_chosen = reference_rejected = torch.zeros_like(chosen)
    else:
        reference_chosen, reference_rejected = _halves(reference.sums)
    return PairScores(
        chosen, rejected, reference_chosen, reference_rejected, *_halves(policy.counts)
    )


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    return values[:, 0::2].flatten(), values[:, 1::2].flatten()

"""TRL's own losses on given log-probabilities.

TRL computes them inside its trainers' methods. Those are called here with a stand-in for the
trainer that has the settings they read, and one for the model that answers with the given numbers.
Written for TRL 1.16; import it where TRL is installed.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer


def _trainer(**settings: Any) -> SimpleNamespace:
    alone = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    return SimpleNamespace(
        accelerator=alone,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def _model(log_probs: Tensor) -> Any:
    silent = torch.zeros_like(log_probs.detach())
    outputs = SimpleNamespace(
        log_probs=log_probs, entropy=silent, mean_logits=silent, is_top1=silent.bool()
    )
    return lambda **_: outputs


def _tokens(trained: Tensor) -> dict[str, Tensor]:
    """A batch whose completions are `trained` [rows, sequence - 1], as shifted targets."""
    first = torch.zeros(len(trained), 1, dtype=torch.int64)
    mask = torch.cat([first, trained.long()], -1)
    ids = torch.ones_like(mask)
    return {"input_ids": ids, "attention_mask": ids, "completion_mask": mask}


def dpo(
    weights: dict[str, float],
    log_probs: Tensor,
    trained: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
) -> tuple[Tensor, dict[str, float]]:
    """TRL's mean DPO loss and metrics; log_probs and trained [2 · pairs, targets], the chosen
    answers in the first half.
    """
    trainer = _trainer(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=alpha,
        loss_types=list(weights),
        loss_weights=list(weights.values()),
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05),
    )
    inputs = _tokens(trained)
    inputs |= {"ref_chosen_logps": reference_chosen, "ref_rejected_logps": reference_rejected}
    loss = DPOTrainer._compute_loss(trainer, _model(log_probs.where(trained, 0.0)), inputs, False)
    return loss, _metrics(trainer)


def kto(
    log_probs: Tensor,
    trained: Tensor,
    reference: Tensor,
    desirable: Tensor,
    kl_policy: Tensor,
    kl_reference: Tensor,
    *,
    loss: str,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[Tensor, dict[str, float]]:
    """TRL's mean KTO loss and metrics; log_probs and trained [answers, targets]."""
    trainer = _trainer(
        precompute_ref_logps=True,
        calculate_KL=loss == "kto",
        loss_type=loss,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        _compute_kl_logps=lambda model, batch: kl_policy,
    )
    inputs = _tokens(trained)
    inputs |= {"label": desirable, "ref_logps": reference, "ref_KL_logps": kl_reference}
    value = KTOTrainer._compute_loss(trainer, _model(log_probs.where(trained, 0.0)), inputs, False)
    return value, _metrics(trainer)


def cpo(chosen: Tensor, rejected: Tensor, **settings: Any) -> Tensor:
    """TRL's CPO or SimPO losses [pairs] of log-probabilities, sums or means as the type asks."""
    trainer = _trainer(alpha=0.0, **settings)
    return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]


def orpo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """TRL's term of the odds [pairs], which it subtracts; of mean log-probabilities."""
    return ORPOTrainer.odds_ratio_loss(_trainer(beta=beta), chosen, rejected)[0]


def reward(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None, center: float | None
) -> tuple[Tensor, dict[str, float]]:
    """TRL's mean loss of a reward model, and metrics, of scores [pairs]."""
    scores = torch.cat([chosen, rejected]).unsqueeze(-1)
    inputs = {"attention_mask": torch.ones(len(scores), 1, dtype=torch.int64)}
    if margins is not None:
        inputs["margin"] = margins
    return reward_of(lambda **_: SimpleNamespace(logits=scores), inputs, center)


def reward_of(
    model: Any, inputs: dict[str, Tensor], center: float | None
) -> tuple[Tensor, dict[str, float]]:
    """The same of a model, on what TRL's collator makes of pairs."""
    trainer = _trainer(args=SimpleNamespace(center_rewards_coefficient=center))
    return RewardTrainer.compute_loss(trainer, model, inputs), _metrics(trainer)


def jsd(student: Tensor, teacher: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    """The sum of TRL's generalised divergence over trained tokens, of logits."""
    return GKDTrainer.generalized_jsd_loss(student, teacher, labels, reduction="sum", **settings)


def _metrics(trainer: SimpleNamespace) -> dict[str, float]:
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}

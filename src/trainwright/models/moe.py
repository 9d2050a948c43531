"""The mixture-of-experts half of a block: a router sends each token to a few of many networks.

No token is dropped and none is padded: the rows of one expert are put together, multiplied as they
are, and summed back. Where experts lie on several workers, `parallel.expert` takes the place of
`run_here`. What the router's choices cost and count is in `models.router_balance`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainwright.kernels.grouped import count_groups, group_rows, grouped_linear, ungroup_rows
from trainwright.models.families import DecoderConfig
from trainwright.models.mlp import ACTIVATIONS, GatedMLP
from trainwright.models.router_balance import RouterBalance
from trainwright.models.sparse_spec import ExpertsSpec


class Router(nn.Module):
    """Hugging Face's `gate`: which experts a token goes to, and how much each one counts.

    Scores are made in fp32 whatever the stream's type. `balance` observes every choice.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: DecoderConfig, spec: ExpertsSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.count, config.hidden_size))
        if spec.corrected:
            # Added where experts are chosen and nowhere else; moved by loads, not by gradients.
            self.register_buffer("e_score_correction_bias", torch.zeros(spec.count))
        self.balance = RouterBalance(spec.count)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [batch, sequence, hidden] to experts and their weights [batch, sequence, per_token].

        Experts are int64 numbers, weights fp32.
        """
        spec = self.spec
        with torch.autocast(x.device.type, enabled=False):
            logits = x.float() @ self.weight.float().t()
        if spec.scores == "softmax":
            scores = shares = torch.softmax(logits, -1)
        else:
            scores = torch.sigmoid(logits)
            shares = scores / scores.sum(-1, keepdim=True)
        experts = self._choose(scores.detach())
        weights = scores.gather(-1, experts)
        if spec.normalised:
            # A sigmoid's scores may all be next to nothing; a softmax's best is at least 1/count.
            smallest = 1e-20 if spec.scores == "sigmoid" else 0.0
            weights = weights / (weights.sum(-1, keepdim=True) + smallest)
        if spec.scaling != 1.0:
            weights = weights * spec.scaling
        return experts, self.balance.observe(logits, shares, experts, weights)

    def _choose(self, scores: Tensor) -> Tensor:
        """The experts of each token, from the best groups of experts where there are groups.

        A group is as good as its two best experts together (DeepSeek-V3, arXiv:2412.19437).
        """
        spec = self.spec
        if spec.corrected:
            scores = scores + self.e_score_correction_bias
        if spec.groups > 1:
            grouped = scores.unflatten(-1, (spec.groups, -1))
            worth = grouped.topk(2, dim=-1)[0].sum(-1)
            best = worth.topk(spec.groups_per_token, dim=-1)[1]
            allowed = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, best, True)
            scores = grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(-2)
        return scores.topk(spec.per_token, dim=-1)[1]


class Experts(nn.Module):
    """Gated networks side by side: `gate_proj` and `up_proj` [experts, width, hidden], `down_proj`
    [experts, hidden, width].

    A worker may have some of the experts, and of each some of the channels.
    """

    def __init__(self, config: DecoderConfig, spec: ExpertsSpec) -> None:
        super().__init__()
        inward, outward = (spec.width, config.hidden_size), (config.hidden_size, spec.width)
        self.gate_proj = nn.Parameter(torch.empty(spec.count, *inward))
        self.up_proj = nn.Parameter(torch.empty(spec.count, *inward))
        self.down_proj = nn.Parameter(torch.empty(spec.count, *outward))
        self.activation = ACTIVATIONS[config.activation]
        self.total = spec.count

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows [rows, hidden], the next `counts[e]` of them expert e's; what each makes of its."""
        gate = grouped_linear(rows, self.gate_proj, counts)
        up = grouped_linear(rows, self.up_proj, counts)
        return grouped_linear(self.activation(gate) * up, self.down_proj, counts)


# (experts, x [tokens, hidden], chosen [tokens, per_token], weights) to [tokens, hidden].
Dispatch = Callable[[Experts, Tensor, Tensor, Tensor], Tensor]


def run_here(experts: Experts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of what each token's experts make of it, all experts being here.

    x [tokens, hidden]; chosen, expert numbers, and weights [tokens, per_token].
    """
    order = chosen.flatten().argsort(stable=True)
    counts = count_groups(chosen, experts.total)
    rows = group_rows(x, order, chosen.shape[1])
    return ungroup_rows(experts(rows, counts), order, weights)


class SparseMLP(nn.Module):
    """Hugging Face's `mlp` of a layer with experts; `dispatch` brings tokens to them and back."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.experts is not None
        spec = config.experts
        self.gate = Router(config, spec)
        self.experts = Experts(config, spec)
        self.dispatch: Dispatch = run_here
        self.shared_name: str | None = None
        if spec.shared_width:
            self.shared_name = "shared_expert" if spec.shared_gate else "shared_experts"
            self.add_module(self.shared_name, GatedMLP(config, spec.shared_width))
        self.shared_gate = spec.shared_gate
        if spec.shared_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, sequence, hidden] in and out."""
        chosen, weights = self.gate(x)
        mixed = self.dispatch(
            self.experts, x.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1)
        ).view_as(x)
        if self.shared_name is None:
            return mixed
        shared = getattr(self, self.shared_name)(x)
        if self.shared_gate:
            shared = torch.sigmoid(self.shared_expert_gate(x)) * shared
        return mixed + shared

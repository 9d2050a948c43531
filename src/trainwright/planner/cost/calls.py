"""The collectives of one micro-batch through one layer, forward: kind, dimension, bytes.

Bytes are of the whole: what a gather makes, what a reduce-scatter or an all-reduce takes, what a
worker gives into an all-to-all. For stacks that cut the stream by tensor parallelism (ours, and
Megatron-LM since Korthikanti et al. 2022, arXiv:2205.05198) and for those before.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from trainwright.planner.job import Job
from trainwright.planner.memory import ELEMENT_BYTES
from trainwright.planner.plan import Plan
from trainwright.planner.traffic import attention_widths

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


class Call(NamedTuple):
    """`times` collectives along a dimension of the mesh, each of `size` bytes."""

    dimension: str
    kind: Collective
    size: float
    times: float = 1.0


def tensor_calls(job: Job, plan: Plan) -> list[Call]:
    """Of tensor parallelism in a block's forward pass; the backward pass has as many."""
    if plan.tp == 1:
        return []
    halves = 2 - len({"attention", "network"} & set(plan.whole))
    size = _stream(job, plan)
    calls = []
    if job.stack.sequence_parallel:
        calls = [
            Call("tp", "all_gather", size, halves),
            Call("tp", "reduce_scatter", size, halves),
        ]
    else:
        calls = [Call("tp", "all_reduce", size, halves)]
    if "attention" in plan.whole and plan.micro_batch % plan.tp:
        # Keys and values of all the tokens, unless every worker has whole rows.
        _, keys, values, _ = attention_widths(job.config)
        width = (keys + values) * ELEMENT_BYTES[plan.precision]
        calls.append(Call("tp", "all_gather", _tokens(job, plan) * width))
    return calls


def context_calls(job: Job, plan: Plan) -> list[Call]:
    """Of context parallelism in a block's forward pass."""
    if plan.cp == 1:
        return []
    queries, keys, values, mixed = attention_widths(job.config, plan.tp)
    own = _tokens(job, plan) * ELEMENT_BYTES[plan.precision]
    if plan.cp_method == "ring":
        return [Call("cp", "send", (keys + values) * own, plan.cp - 1)]
    if plan.cp_method == "all_gather":
        return [Call("cp", "all_gather", plan.cp * (keys + values) * own)]
    return [
        Call("cp", "all_to_all", (queries + keys + values) * own),
        Call("cp", "all_to_all", mixed * own),
    ]


def expert_calls(job: Job, plan: Plan, layer: int) -> list[Call]:
    """Tokens to their experts, and what those make of them back."""
    spec = job.config.experts
    if plan.ep == 1 or spec is None or not job.config.is_sparse(layer):
        return []
    size = spec.per_token * _stream(job, plan) * job.imbalance
    if job.stack.sequence_parallel:
        size /= plan.tp
    return [Call("ep", "all_to_all", size, 2)]


def boundary_bytes(job: Job, plan: Plan) -> float:
    """What one stage sends to the next for a micro-batch."""
    cut = plan.tp if job.stack.sequence_parallel or job.stack.scatters_boundary else 1
    return _stream(job, plan) / cut


def _tokens(job: Job, plan: Plan) -> float:
    return plan.micro_batch * job.sequence_length / plan.cp


def _stream(job: Job, plan: Plan) -> float:
    return _tokens(job, plan) * job.config.hidden_size * ELEMENT_BYTES[plan.precision]

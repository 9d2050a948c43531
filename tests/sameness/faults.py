"""Faults that real systems have had, each planted by replacing one function for a while.

Each takes the plan and is a context manager, in place on every worker of a pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from tests.sameness.checks import replaced
from trainwright.comm.collectives import gather_plain
from trainwright.kernels import cross_entropy
from trainwright.models.decoder import Block, Trunk
from trainwright.models.output_head import OutputHead
from trainwright.models.router_balance import RouterBalance
from trainwright.parallel import gradients, own_queries, spread
from trainwright.parallel.context import ContextParallel
from trainwright.parallel.own_queries import OwnQueries
from trainwright.parallel.pipeline import Pipeline
from trainwright.parallel.replicas import ReplicaGradients
from trainwright.parallel.spread import SpreadModel
from trainwright.parallel.tensor import CutStream
from trainwright.parallel.tied import TiedEmbedding
from trainwright.planner.plan import Plan
from trainwright.training import micro_batches, step

Fault = Callable[[Plan], AbstractContextManager[None]]
FAULTS: dict[str, Fault] = {}


def fault(function: Callable[[Plan], Iterator[None]]) -> Fault:
    made = contextmanager(function)
    FAULTS[function.__name__] = made
    return made


@fault
def a_gradient_reduction_is_left_out(plan: Plan) -> Iterator[None]:
    with replaced(ReplicaGradients, "_sum", lambda self, bucket: setattr(bucket, "work", _Done())):
        yield


class _Done:
    def wait(self) -> None:
        """Nothing was sent."""


@fault
def replicas_gradients_are_averaged(plan: Plan) -> Iterator[None]:
    finish = ReplicaGradients.finish

    def averaged(self: ReplicaGradients) -> None:
        finish(self)
        for bucket in self.buckets:
            bucket.flat /= dist.get_world_size(self.group)

    with replaced(ReplicaGradients, "finish", averaged):
        yield


@fault
def shards_gradients_are_averaged(plan: Plan) -> Iterator[None]:
    shard = spread.shard

    def averaging(model: Any, *arguments: Any) -> None:
        shard(model, *arguments)
        for module in spread_modules(model):
            module.set_gradient_divide_factor(float(plan.dp_shard))

    with replaced(spread, "shard", averaging):
        yield


def spread_modules(model: Any) -> list[Any]:
    from trainwright.parallel.shard import sharded_modules

    return sharded_modules(model)


@fault
def a_tied_gradient_is_not_shared(plan: Plan) -> Iterator[None]:
    with replaced(TiedEmbedding, "sum_gradients", lambda self: None):
        yield


@fault
def rotary_positions_are_off_under_cp(plan: Plan) -> Iterator[None]:
    tables = Trunk.rotary_tables

    def off(self: Trunk, positions: torch.Tensor, *others: Any) -> Any:
        # As if a worker's columns began one later than they do.
        return tables(self, positions + (dist.get_rank() if self.context else 0), *others)

    with replaced(Trunk, "rotary_tables", off):
        yield


@fault
def own_queries_turn_by_the_first_workers_positions(plan: Plan) -> Iterator[None]:
    def first(self: OwnQueries, table: torch.Tensor, rows: int) -> torch.Tensor:
        whole = table.expand(rows, *table.shape[1:])
        return whole.flatten(0, 1).chunk(plan.tp)[0].unflatten(0, (rows, -1))

    with replaced(OwnQueries, "own", first):
        yield


@fault
def gathered_keys_keep_the_own_queries_gradients_only(plan: Plan) -> Iterator[None]:
    def gather(x: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
        whole = gather_plain(x.detach(), dim, group)
        parts = list(whole.chunk(dist.get_world_size(group), dim))
        parts[dist.get_rank(group)] = x
        return torch.cat(parts, dim)

    with replaced(own_queries, "gather", gather):
        yield


@fault
def a_document_border_leaks(plan: Plan) -> Iterator[None]:
    mask = ContextParallel.mask

    def leaking(self: ContextParallel, segments: torch.Tensor, **options: Any) -> Any:
        return mask(self, torch.where(segments > 0, segments - segments % 2, segments), **options)

    with replaced(ContextParallel, "mask", leaking):
        yield


@fault
def the_loss_is_divided_by_each_ranks_own_weight(plan: Plan) -> Iterator[None]:
    train = step.train_micro_batches

    def divided(model: Any, objective: Any, tensors: Any, scales: Any) -> Any:
        own = sum(int((each["labels"] != -100).sum()) for each in tensors)
        return train(model, objective, tensors, {"targets": 1 / (own * plan.data_ranks)})

    with replaced(step, "train_micro_batches", divided):
        yield


@fault
def replicas_begin_where_equal_parts_would(plan: Plan) -> Iterator[None]:
    rows_of = Plan.rows_of

    def beginning(self: Plan, data_rank: int) -> slice:
        own = rows_of(self, data_rank)
        first = data_rank * self.batch_sequences // self.data_ranks
        return slice(first, first + own.stop - own.start)

    with replaced(Plan, "rows_of", beginning):
        yield


@fault
def each_stage_clips_by_its_own_norm(plan: Plan) -> Iterator[None]:
    def own_norm(parameters: Any, pieces: Any, mesh: Any) -> torch.Tensor:
        squares = [gradients.local(p.grad).square().sum() for _, p in parameters]
        return torch.stack(squares).sum().sqrt()

    with replaced(spread, "gradient_norm", own_norm):
        yield


@fault
def an_experts_gradient_is_scaled_by_ep(plan: Plan) -> Iterator[None]:
    finish = SpreadModel.finish_gradients

    def scaled(self: SpreadModel) -> None:
        finish(self)
        for name, parameter in self.named_parameters():
            if ".experts." in name:
                gradients.local(parameter.grad).mul_(plan.ep)

    with replaced(SpreadModel, "finish_gradients", scaled):
        yield


@fault
def a_stages_layer_is_applied_twice(plan: Plan) -> Iterator[None]:
    forward = Block.forward

    def twice(self: Block, hidden: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        once = forward(self, hidden, *arguments, **options)
        return forward(self, once, *arguments, **options) if dist.get_rank() == 1 else once

    with replaced(Block, "forward", twice):
        yield


@fault
def a_micro_batch_is_dropped(plan: Plan) -> Iterator[None]:
    backward = Pipeline._backward

    def dropping(self: Pipeline, action: Any, boundaries: Any) -> None:
        before = [p.grad.clone() if p.grad is not None else None for p in dropping.parameters]
        backward(self, action, boundaries)
        if action.micro_batch == 1:
            for parameter, gradient in zip(dropping.parameters, before, strict=True):
                parameter.grad = gradient

    dropping.parameters = []  # type: ignore[attr-defined]
    begin = SpreadModel.begin_step

    def begun(self: SpreadModel) -> None:
        begin(self)
        dropping.parameters = self.trained_parameters()  # type: ignore[attr-defined]

    with replaced(SpreadModel, "begin_step", begun), replaced(Pipeline, "_backward", dropping):
        yield


@fault
def dropout_differs_across_tp(plan: Plan) -> Iterator[None]:
    keys = micro_batches.token_keys

    def differing(seed: int, *others: Any) -> torch.Tensor:
        return keys(seed + dist.get_rank(), *others)

    with replaced(micro_batches, "token_keys", differing):
        yield


@fault
def a_norms_gradient_is_not_summed_over_tp(plan: Plan) -> Iterator[None]:
    with replaced(spread, "sum_partial", lambda *arguments: None):
        yield


@fault
def a_branch_is_not_summed_on_leaving(plan: Plan) -> Iterator[None]:
    def own_share(self: CutStream, branch: torch.Tensor) -> torch.Tensor:
        return self.own(branch)

    with replaced(CutStream, "leave", own_share):
        yield


@fault
def a_target_is_looked_up_in_the_wrong_part_of_the_vocabulary(plan: Plan) -> Iterator[None]:
    entropy = cross_entropy._shared_entropy

    def wrong(logits: torch.Tensor, targets: torch.Tensor, group: Any) -> Any:
        return entropy(logits, (targets + 1) % (logits.shape[-1] * plan.tp), group)

    with replaced(cross_entropy, "_shared_entropy", wrong):
        yield


@fault
def the_balance_loss_counts_once_a_tp_rank(plan: Plan) -> Iterator[None]:
    observe = RouterBalance.observe

    def counted(self: RouterBalance, *arguments: Any) -> torch.Tensor:
        self.copies = 1
        return observe(self, *arguments)

    with replaced(RouterBalance, "observe", counted):
        yield


@fault
def a_score_counts_once_a_tp_rank(plan: Plan) -> Iterator[None]:
    def whole(self: OutputHead, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden.float() * self.weight.float()).sum(-1)

    with replaced(OutputHead, "scores", whole):
        yield


@fault
def a_worker_s_last_tokens_pass_for_the_sequences(plan: Plan) -> Iterator[None]:
    tensors_of = step.to_tensors

    def own_ends(*arguments: Any) -> Any:
        tensors = tensors_of(*arguments)
        segments = tensors["own_segments"]
        following = torch.nn.functional.pad(segments[:, 1:], (0, 1), value=-1)
        tensors["ends"] = (segments >= 0) & (segments != following)
        return tensors

    with replaced(step, "to_tensors", own_ends):
        yield

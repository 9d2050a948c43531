"""One rank of a large run, simulated in this process: the bytes that it would send in a step.

A process group that answers at once and moves nothing stands for the other workers, and tensors
have shapes but no values (torch's FakeTensorMode). All else is the code that trains: the model is
spread as the plan says and takes a whole training step. A rank of 512 takes seconds, and no memory
to speak of; what it sent stands beside the closed formulas of `planner.traffic`.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainwright.comm.calls import Call
from trainwright.comm.hooks import listen, stop_listening
from trainwright.errors import Mistake, UserError
from trainwright.models.decoder import Span
from trainwright.models.families import FAMILIES, DecoderConfig
from trainwright.models.weights import new_model
from trainwright.objectives.build import build_objective
from trainwright.parallel.mesh import forget_groups
from trainwright.parallel.spread import Model, SpreadModel, spread
from trainwright.parallel.world import World
from trainwright.planner.make import cluster_of, make_plan
from trainwright.planner.plan import Plan
from trainwright.planner.traffic import traffic
from trainwright.recipe.schema import Recipe
from trainwright.training.assemble import build_all_optimizers
from trainwright.training.sameness import made_batch
from trainwright.training.step import TrainStep

HALF_A_BYTE = 0.5  # what the meter may round a call by


@dataclass(frozen=True)
class Line:
    """One kind of collective on one group: what the step sent, and what the formula says."""

    group: str
    collective: str
    calls: int
    sent: int  # bytes; each call's is a whole number
    formula: float

    @property
    def equal(self) -> bool:
        """Whether the formula says the same, but for the rounding of each call."""
        return abs(self.sent - self.formula) <= HALF_A_BYTE * self.calls


@dataclass(frozen=True)
class Simulation:
    """A step of one rank. `seconds` and `resident`, its memory in bytes, are this process's."""

    plan: Plan
    rank: int
    lines: tuple[Line, ...]
    seconds: float
    resident: int

    @property
    def equal(self) -> bool:
        """Whether every collective sent what its formula says."""
        return all(line.equal for line in self.lines)


def plan_for(recipe: Recipe, config: DecoderConfig | None, world_size: int) -> Plan:
    """The recipe's plan on so many GPUs, nothing compiled.

    Raises UserError for what cannot be simulated, and for what is not legal.
    """
    refuse(recipe, config)
    parallel = recipe.parallel.model_copy(update={"workers": "auto"})
    training = recipe.training.model_copy(update={"compile": False})
    changed = recipe.model_copy(update={"parallel": parallel, "training": training})
    return make_plan(changed, cluster_of(world_size), config)


def refuse(recipe: Recipe, config: DecoderConfig | None) -> None:
    """Raise UserError for a recipe whose step cannot do without values."""
    mistakes: list[Mistake] = []
    if config is None:
        what = f"the shape of {recipe.model.path} is not known here, or is none of our families"
        fix = f"simulate a recipe with one of {', '.join(FAMILIES)}, or a local directory"
        mistakes.append(Mistake(what, fix, key="model"))
    elif config.experts is not None:
        what = "which rows go to which expert depends on values, and a simulated rank has none"
        mistakes.append(Mistake(what, "verify this recipe without --simulate", key="model"))
    if recipe.objective.kind not in ("next_token", "sft"):
        what = f"{recipe.objective.kind} compares answers, and a simulated rank has plain text only"
        mistakes.append(Mistake(what, "simulate `objective: sft`", key="objective"))
    if recipe.parallel.cp > 1 and recipe.parallel.cp_method == "ring":
        what = "ring attention decides by values what it skips, and a simulated rank has none"
        fix = "write `cp_method: all_gather` or `ulysses`"
        mistakes.append(Mistake(what, fix, key="parallel.cp_method"))
    parallel = recipe.parallel
    by_part = (*(parallel.recompute_by_stage or ()), *(parallel.recompute_by_layer or ()))
    policies = (recipe.training.recompute, *by_part)
    if any(not isinstance(policy, str) for policy in policies):
        what = "a recompute budget is met by compiling, and a simulated rank compiles nothing"
        mistakes.append(Mistake(what, "write `recompute: selective`", key="training.recompute"))
    if mistakes:
        raise UserError(mistakes)


def simulate(recipe: Recipe, config: DecoderConfig, plan: Plan, rank: int = 0) -> Simulation:
    """One training step of `rank` as `plan` says, on made-up rows.

    For a process that is in no process group; it is in none afterwards. Raises UserError for a
    rank that the plan has not.
    """
    if not 0 <= rank < plan.world_size:
        last = plan.world_size - 1
        raise UserError(f"there is no rank {rank} of {plan.world_size}", fix=f"give 0 to {last}")
    started, seen = time.monotonic(), _Sent()
    with _alone_among(plan.world_size, rank) as world:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        model = _spread_without_values(config, plan, world, fake)
        with fake, _AnyValue():
            step = TrainStep(
                model,
                build_all_optimizers(model, recipe.optimizer),
                build_objective(recipe.objective),
                recipe.training,
                seed=recipe.seed,
            )
            rows = plan.rows_of(model.mesh.index("data"))
            batch = made_batch(
                0,
                rows=rows.stop - rows.start,
                sequence=plan.sequence_length,
                vocabulary=config.vocab_size,
                seed=recipe.seed,
            )
            listen(seen)
            try:
                step(batch, recipe.optimizer.learning_rate, rows.start)
            finally:
                stop_listening(seen)
        place = model.mesh.index("pp"), model.mesh.index("dp_replicate")
        formulas = traffic(config, plan, *place)
    resident = psutil.Process().memory_info().rss
    lines = tuple(seen.lines(formulas))
    return Simulation(plan, rank, lines, time.monotonic() - started, resident)


def _spread_without_values(
    config: DecoderConfig, plan: Plan, world: World, fake: FakeTensorMode
) -> SpreadModel:
    """The rank's part of the model, its weights fake.

    Only they: groups of workers are tensors too, and theirs are looked at.
    """

    def build(span: Span | None) -> Model:
        return new_model(config, device="meta", span=span)

    def fill(model: Model) -> None:
        with fake:
            model.to_empty(device=world.device)

    return spread(build, plan, world, fill)


@contextmanager
def _alone_among(size: int, rank: int) -> Iterator[World]:
    """This process as `rank` of `size`, all others but pretended."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with warnings.catch_warnings():
            # FSDP2 compares the addresses of tensors, of which fake ones have none.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            # Both names of a collective serve; the newer one is not in every torch.
            warnings.filterwarnings("ignore", ".* is deprecated. Please use", FutureWarning)
            yield World(rank, size, torch.device("cpu"))
    finally:
        forget_groups()
        dist.destroy_process_group()


class _AnyValue(TorchDispatchMode):
    """Whoever looks at a number sees a one: a step's flow does not hang on its values."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default:
            return _one(args[0])
        return operation(*args, **(kwargs or {}))


def _one(scalar: Tensor) -> bool | int | float:
    if scalar.dtype is torch.bool:
        return True
    return 1.0 if scalar.dtype.is_floating_point else 1


class _Sent:
    """Adds up what every collective sends, by group and kind; a listener of `comm.hooks`."""

    def __init__(self) -> None:
        self.sent: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()

    def began(self, call: Call) -> None:
        kind = call.group, call.collective
        self.sent[kind] += call.sent
        self.calls[kind] += 1

    def took(self, call: Call, seconds: float) -> None:
        """Nothing: no time passes between workers that are not there."""

    def took_on_device(self, call: Call, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """Nothing either."""

    def lines(self, formulas: Mapping[tuple[str, str], float]) -> Iterator[Line]:
        """Beside the formulas; kinds without bytes (receiving, waiting) are left out."""
        kinds = {kind for kind, count in formulas.items() if count} | {*+self.sent}
        for kind in sorted(kinds):
            yield Line(*kind, self.calls[kind], self.sent[kind], formulas.get(kind, 0.0))

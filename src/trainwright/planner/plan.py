"""From a recipe and a machine to a Plan: how the work is spread, and why it is legal.

The Plan is the second document that crosses the house: frozen, serialisable, free of torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Literal

from trainwright.errors import Mistake, UserError
from trainwright.models.families import DecoderConfig
from trainwright.planner import memory
from trainwright.planner.known_model import known_config
from trainwright.planner.layout import (
    batch_mistakes,
    divisors,
    infer_layout,
    layout_mistakes,
)
from trainwright.planner.shapes import flops_per_token, parameter_count
from trainwright.recipe.schema import Recipe

# A micro-batch on a CPU gains nothing beyond this, and holds memory that caches want.
_CPU_MOST_ROWS, _MOST_TOKENS = 16, 16_384
_MEMORY_SHARE = 0.5  # of the memory, for what the closed formulas know

# When compiling pays on a CPU: measured on one with AMX, rounded to the careful side.
_COMPILE_SECONDS = 40.0
_COMPILE_GAIN = 1.2
_CPU_FLOPS_PER_CORE = 0.15e12


@dataclass(frozen=True)
class Machine:
    """What there is to train on. `memory_bytes` is one device's, or the host's on a CPU."""

    devices: int
    device_kind: Literal["cpu", "cuda"]
    cores: int
    memory_bytes: int
    can_compile: bool = False  # a C compiler is found
    launched: int = 0  # workers that torchrun or another launcher has started; 0 without one


Precision = Literal["fp32", "bf16", "fp16", "float8"]
ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"]
ContextMethod = Literal["ring", "all_gather", "ulysses"]
Offload = Literal["none", "optimizer", "parameters"]
Recompute = Literal["none", "full", "selective"] | float  # a number: share of the memory kept


@dataclass(frozen=True)
class Plan:
    """How a run is spread over its workers.

    The world is a grid of (pp, dp_replicate, dp_shard, cp, tp), tp changing fastest; `ep` is the
    inner part of dp_shard.
    """

    world_size: int
    dp_replicate: int
    dp_shard: int
    micro_batch: int  # rows that go through a model at once
    accumulation: int  # micro-batches a step on each of the data ranks
    threads: int  # CPU threads of a worker
    precision: Precision
    recompute: Recompute
    compile: bool
    device: Literal["cpu", "cuda"]
    sequence_length: int
    optimizer: str
    pp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    zero: int = 0  # what dp_shard cuts: 1 states, 2 gradients too, 3 weights too; 0 without it
    schedule: ScheduleName = "1f1b"
    virtual_stages: int = 1  # pipeline stages a worker
    stage_layers: tuple[int, ...] = ()  # layers of each stage, in the model's order; () without pp
    cp_method: ContextMethod = "ring"
    offload: Offload = "none"
    recompute_by_stage: tuple[Recompute, ...] = ()  # () where all stages do as `recompute` says
    activation_offload: bool = False

    @property
    def data_ranks(self) -> int:
        """Ways in which the rows of a batch are divided."""
        return self.dp_replicate * self.dp_shard

    @property
    def stages(self) -> int:
        """Stages of the pipeline."""
        return self.pp * self.virtual_stages

    @property
    def batch_sequences(self) -> int:
        """Rows in the global batch of one step."""
        return self.data_ranks * self.micro_batch * self.accumulation

    @property
    def batch_tokens(self) -> int:
        """Tokens in the global batch of one step."""
        return self.batch_sequences * self.sequence_length

    def stage_recompute(self, stage: int) -> Recompute:
        """What a stage recomputes in its backward pass."""
        return self.recompute_by_stage[stage] if self.recompute_by_stage else self.recompute

    @classmethod
    def alone(cls, device: Literal["cpu", "cuda"] = "cpu") -> Plan:
        """One process that has a whole model to itself, in fp32, to evaluate or to generate."""
        return cls(1, 1, 1, 1, 1, 1, "fp32", "none", False, device, 1, "adamw")

    @property
    def hash(self) -> str:
        """Sixteen hex digits that two plans share only where they are equal."""
        canonical = json.dumps(asdict(self), sort_keys=True).encode()
        return hashlib.blake2b(canonical, digest_size=8).hexdigest()

    def to_json(self) -> str:
        """The plan as a JSON document; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan in `text`, one of an older release too. Raises `UserError` where it is none."""
        try:
            values = json.loads(text)
            for key in ("stage_layers", "recompute_by_stage"):
                if key in values:
                    values[key] = tuple(values[key])
            # Before there was a choice, sharding was FSDP's.
            values.setdefault("zero", 3 if values["dp_shard"] > 1 else 0)
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"this is not a plan: {error}", fix="start the run anew in another folder"
            ) from None

    def explain(self, config: DecoderConfig | None) -> list[tuple[str, str]]:
        """Rows for the screen, name and value; sizes and costs only where `config` is known."""
        rows = [
            ("workers", _workers(self)),
            ("batch", f"{self.batch_sequences} rows = {self.batch_tokens:,} tokens a step"),
            ("micro-batches", f"{self.accumulation} × {self.micro_batch} rows a worker"),
            ("precision", self.precision),
            ("recompute", self.recompute),
            ("compile", "on" if self.compile else "off"),
        ]
        if config is None:
            return rows
        flops = 3 * flops_per_token(config, self.sequence_length) * self.batch_tokens
        tokens = self.micro_batch * self.sequence_length
        states = memory.state_bytes(config, self.optimizer, self.precision, self.dp_shard)
        activations = tokens * memory.activation_bytes(config, self.precision, self.recompute)
        return [
            ("parameters", f"{parameter_count(config):,}"),
            *rows,
            ("model FLOPs", f"{in_words(flops, 'FLOP')} a step"),
            ("states", f"{in_bytes(states)} a worker"),
            ("activations", f"{in_bytes(activations + memory.head_bytes(config))} a worker"),
        ]


def make_plan(
    recipe: Recipe,
    machine: Machine,
    config: DecoderConfig | None = None,
    steps: int | None = None,
) -> Plan:
    """The plan of `recipe` on `machine`.

    `config` is the model where the caller knows it better than the recipe tells (a hub id), and
    `steps` the length of the run where only the data tells (epochs). Raises `UserError` with every
    reason why the recipe cannot run there, each with the nearest value that can.
    """
    config = config or known_config(recipe.model, recipe.tokenizer)
    world = _world_size(recipe, machine)
    parallel, training = recipe.parallel, recipe.training
    mistakes = [
        *layout_mistakes(parallel, world),
        *batch_mistakes(training, recipe.data, parallel, world),
    ]
    if training.compile is True and not machine.can_compile:
        what = "torch.compile needs a C compiler, and none is found here"
        fix = "install gcc or clang, or write `compile: auto`"
        mistakes.append(Mistake(what, fix, key="training.compile"))
    if mistakes:
        raise UserError(mistakes)

    replicate, shard = infer_layout(parallel, world, shard=machine.device_kind == "cuda")
    room = _room(recipe, machine, config, world, shard)
    rows = recipe.batch_sequences // world
    if parallel.micro_batch == "auto":
        most = _most_rows(recipe, machine, config, room)
        micro = max(n for n in divisors(rows) if n <= most)
    else:
        micro = parallel.micro_batch
    local = min(world, machine.devices) if machine.device_kind == "cuda" else world
    threads = parallel.threads
    return Plan(
        world_size=world,
        dp_replicate=replicate,
        dp_shard=shard,
        micro_batch=micro,
        accumulation=rows // micro,
        threads=max(1, machine.cores // local) if threads == "auto" else threads,
        zero=3 if shard > 1 else 0,
        precision=training.precision,
        recompute=training.recompute,
        compile=_compiles(recipe, machine, config, steps),
        device=machine.device_kind,
        sequence_length=recipe.data.sequence_length,
        optimizer=recipe.optimizer.name,
    )


def _world_size(recipe: Recipe, machine: Machine) -> int:
    workers = recipe.parallel.workers
    if machine.launched:
        if isinstance(workers, int) and machine.launched % workers:
            what = f"a launcher has started {machine.launched} workers"
            fix = "write `workers: auto`, or the launcher's number for one machine"
            raise UserError(Mistake(what, fix, key="parallel.workers"))
        return machine.launched
    if workers == "auto":
        return machine.devices if machine.device_kind == "cuda" else 1
    if machine.device_kind == "cuda" and workers > machine.devices:
        has = "1 GPU" if machine.devices == 1 else f"{machine.devices} GPUs"
        what = f"{workers} workers need a GPU each, and this machine has {has}"
        raise UserError(
            Mistake(what, f"write `workers: {machine.devices}`", key="parallel.workers")
        )
    return workers


def _room(
    recipe: Recipe, machine: Machine, config: DecoderConfig | None, world: int, shard: int
) -> float | None:
    """Bytes that a worker has for activations; None where the model is not known.

    Raises `UserError` where not even the states fit.
    """
    if config is None:
        return None
    on_cpu = machine.device_kind == "cpu"
    own = machine.memory_bytes / (world if on_cpu else 1)
    states = memory.state_bytes(config, recipe.optimizer.name, recipe.training.precision, shard)
    if states > own:
        where = "worker" if on_cpu else "GPU"
        raise UserError(
            Mistake(
                f"weights, gradients and optimizer state take {in_bytes(states)} a {where}, which "
                f"has {in_bytes(own)}",
                "choose a smaller model, "
                + ("fewer workers" if on_cpu and shard == 1 else "more workers with `dp_shard`")
                + ", or `optimizer: adamw-8bit`",
                key="model",
            )
        )
    return own * _MEMORY_SHARE - states - memory.head_bytes(config)


def _most_rows(
    recipe: Recipe, machine: Machine, config: DecoderConfig | None, room: float | None
) -> int:
    """Rows of a micro-batch that fit into `room` bytes; at least 1, since less cannot be had."""
    length, training = recipe.data.sequence_length, recipe.training
    most = float("inf")
    if config is None or room is None or machine.device_kind == "cpu":
        most = min(_CPU_MOST_ROWS, _MOST_TOKENS // length)
    if config is not None and room is not None:
        row = length * memory.activation_bytes(config, training.precision, training.recompute)
        most = min(most, room // row)
    return max(1, int(min(most, recipe.batch_sequences)))


def _compiles(
    recipe: Recipe, machine: Machine, config: DecoderConfig | None, steps: int | None
) -> bool:
    """Whether blocks are compiled: as the recipe says, or where it repays its own time."""
    training = recipe.training
    if training.compile != "auto":
        return training.compile
    if machine.device_kind == "cuda" or not machine.can_compile:
        return machine.can_compile
    tokens = training.tokens
    steps = steps or training.steps
    if steps is not None:
        tokens = steps * recipe.batch_sequences * recipe.data.sequence_length
    if training.precision != "bf16" or config is None or tokens is None:
        return False
    flops = 3 * flops_per_token(config, recipe.data.sequence_length) * tokens
    seconds = flops / (_CPU_FLOPS_PER_CORE * machine.cores)
    return seconds * (1 - 1 / _COMPILE_GAIN) > _COMPILE_SECONDS


def _workers(plan: Plan) -> str:
    on_cpu = plan.device == "cpu"
    threads = "1 thread" if plan.threads == 1 else f"{plan.threads} threads"
    if plan.world_size == 1:
        return f"1 {'process on the CPU' if on_cpu else 'GPU'}, {threads}"
    if plan.dp_shard == 1:
        layout = "each with whole weights (DDP)"
    elif plan.dp_replicate == 1:
        layout = "weights sharded over all (FSDP)"
    else:
        layout = f"{plan.dp_replicate} replicas of {plan.dp_shard} shards (HSDP)"
    kind = "processes on the CPU" if on_cpu else "GPUs"
    return f"{plan.world_size} {kind}, {layout}, {threads} each"


def in_bytes(count: float) -> str:
    """A number of bytes as a person reads it: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("not reached")


def in_words(count: float, unit: str) -> str:
    """A large count with its prefix: "3.2 TFLOP"."""
    power = min(6, max(0, int(math.log10(count) // 3))) if count > 0 else 0
    return f"{count / 1000**power:.1f} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}{unit}"

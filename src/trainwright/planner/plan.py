"""The Plan: how a run is spread over its workers; and the machine that it is made for.

The Plan is the second document that crosses the house: frozen, serialisable, free of torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from trainwright.errors import UserError


@dataclass(frozen=True)
class Machine:
    """What there is to train on.

    `memory_bytes` is one device's, or the host's on a CPU, of which `free_bytes` are free now; 0
    where that is not known.
    """

    devices: int
    device_kind: Literal["cpu", "cuda"]
    cores: int
    memory_bytes: int
    can_compile: bool = False  # a C compiler is found
    launched: int = 0  # workers that torchrun or another launcher has started; 0 without one
    has_float8: bool = False  # GPUs of compute capability 8.9 or more
    free_bytes: int = 0
    device_name: str = ""  # as its maker calls it


# float4 is only costed: others train in it.
Precision = Literal["fp32", "bf16", "fp16", "float8", "float4"]
ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"]
ContextMethod = Literal["ring", "all_gather", "ulysses"]
Offload = Literal["none", "optimizer", "parameters"]
Recompute = Literal["none", "full", "selective"] | float  # a number: share of the memory kept
# How a plan was come by: from what the recipe gives, by the planner's search, or by trying several.
Origin = Literal["derived", "searched", "tuned"]


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
    accumulation: int  # micro-batches a step on each data rank; the most, where replicas differ
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
    recompute_by_layer: tuple[Recompute, ...] = ()  # () where a layer does as its stage does
    whole: tuple[str, ...] = ()  # parts of a block that tp leaves whole: each worker its own tokens
    rows_by_replica: tuple[int, ...] = ()  # rows of a step on each replica; () where all are equal
    ranks: tuple[int, ...] = ()  # the launcher's ranks in the grid's order; () as they are numbered

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
        even = self.data_ranks * self.micro_batch * self.accumulation
        return sum(self.rows_by_replica) or even

    @property
    def batch_tokens(self) -> int:
        """Tokens in the global batch of one step."""
        return self.batch_sequences * self.sequence_length

    def accumulation_of(self, replica: int) -> int:
        """Micro-batches a step on each data rank of the replica of that index."""
        if not self.rows_by_replica:
            return self.accumulation
        return self.rows_by_replica[replica] // (self.dp_shard * self.micro_batch)

    def rows_of(self, data_rank: int) -> slice:
        """Rows of the global batch that a data rank has; it is one of dp_replicate × dp_shard."""
        replica, shard = divmod(data_rank, self.dp_shard)
        own = [self.micro_batch * self.accumulation_of(each) for each in range(replica + 1)]
        first = self.dp_shard * sum(own[:-1]) + shard * own[-1]
        return slice(first, first + own[-1])

    def stage_recompute(self, stage: int) -> Recompute:
        """What a stage recomputes in its backward pass."""
        return self.recompute_by_stage[stage] if self.recompute_by_stage else self.recompute

    def layer_recompute(self, layer: int, stage: int = 0) -> Recompute:
        """What a layer, which is on `stage`, recomputes in its backward pass."""
        by_layer = self.recompute_by_layer
        return by_layer[layer] if by_layer else self.stage_recompute(stage)

    @classmethod
    def alone(cls, device: Literal["cpu", "cuda"] = "cpu") -> Plan:
        """One process that has a whole model to itself, in fp32, to evaluate or to generate."""
        return cls(1, 1, 1, 1, 1, 1, "fp32", "none", False, device, 1, "adamw")

    @property
    def hash(self) -> str:
        """Sixteen hex digits that two plans share only where they are equal."""
        return _digest(asdict(self))

    def to_json(self, origin: Origin = "derived") -> str:
        """The plan as a JSON document with its hash and origin; `from_json` reads it back."""
        values = asdict(self)
        return json.dumps({"hash": _digest(values), "origin": origin, **values}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan in `text`, one of an older release too.

        Raises `UserError` where it is none, or where its contents are not those of its hash.
        """
        try:
            values = json.loads(text)
            values.pop("origin", None)
            told = values.pop("hash", None)
            if told is not None and told != _digest(values):
                raise changed_plan(told, _digest(values))
            for key in _TUPLES:
                if key in values:
                    values[key] = tuple(values[key])
            # Before there was a choice, sharding was FSDP's.
            values.setdefault("zero", 3 if values["dp_shard"] > 1 else 0)
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"this is not a plan: {error}", fix="start the run anew in another folder"
            ) from None


_TUPLES = (
    "stage_layers",
    "recompute_by_stage",
    "recompute_by_layer",
    "whole",
    "rows_by_replica",
    "ranks",
)


def changed_plan(told: str | None, found: str) -> UserError:
    """The refusal of a plan.json with the hash `found` in a run whose records say `told`."""
    return UserError(
        f"plan.json is not the plan that the run was started with: its contents have the hash "
        f"{found}, and the records say {told}",
        fix="put the file back; or delete it, and the run is planned anew when it goes on. A "
        "layout of your own belongs under `parallel` in the recipe",
    )


def _digest(values: dict[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True).encode()
    return hashlib.blake2b(canonical, digest_size=8).hexdigest()

"""The Plan: how a run is spread over its workers; and the machine that it is made for.

The Plan is the second document that crosses the house: frozen, serialisable, free of torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

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

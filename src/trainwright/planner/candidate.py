"""A candidate: one way to spread a run, legal or not, with all that legality depends on. No torch.

What the user left out is derived from the rest, and derived anew when the rest changes, so that a
search for the nearest legal candidate moves only what somebody asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from trainwright.models.families import DecoderConfig
from trainwright.planner.beside import Beside, beside_of
from trainwright.planner.layout import split_layers
from trainwright.planner.plan import (
    ContextMethod,
    Offload,
    Plan,
    Precision,
    Recompute,
    ScheduleName,
)
from trainwright.planner.schedules import SCHEDULES
from trainwright.recipe.schema import Adapter, Objective, Parallel, Training

DEGREES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # their product is the world
AXES = (*DEGREES, "ep")


@dataclass(frozen=True)
class Candidate:
    """Degrees and features of a run, the shape of its batch and model, and what the machine can.

    None stands for what is not known yet, and no rule is broken by what it does not know.
    """

    world: int
    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    zero: int = 0
    schedule: ScheduleName = "1f1b"
    virtual_stages: int = 1
    stage_layers: tuple[int, ...] = ()  # () is derived: as even as can be
    cp_method: ContextMethod = "ring"
    whole: tuple[str, ...] = ()  # parts of a block that tp does not cut
    offload: Offload = "none"
    recompute: Recompute = "none"
    recompute_by_stage: tuple[Recompute, ...] = ()
    recompute_by_layer: tuple[Recompute, ...] = ()
    dropout: float = 0.0
    neftune_alpha: float = 0.0
    adapter: Adapter | None = None
    keeps_originals: bool = False  # whether the model is also used as it was, without its adapter
    beside: Beside | None = None  # a frozen model, spread in the same way
    compile: Literal["auto"] | bool = "auto"
    precision: Precision = "bf16"
    optimizer: str = "adamw"
    router_keys: tuple[str, ...] = ()  # of `training`, given and not 0
    sequence_length: int | None = None
    rows: int | None = None  # of the global batch
    counts_tokens: bool = False  # the recipe gives the batch in tokens
    micro_batch: int | None = None  # None is derived
    device: Literal["cpu", "cuda"] | None = None
    has_float8: bool | None = None
    has_compiler: bool | None = None
    model: DecoderConfig | None = None
    native: bool | None = None  # one of our families; False runs transformers' own class
    derived: frozenset[str] = frozenset()  # fields that follow from the others
    rows_by_replica: tuple[int, ...] = ()  # () shares them out evenly

    @property
    def data_ranks(self) -> int:
        """Ways in which the rows of a batch are divided."""
        return self.dp_replicate * self.dp_shard

    @property
    def product(self) -> int:
        """Workers that the degrees make."""
        return math.prod(getattr(self, axis) for axis in DEGREES)

    @property
    def stages(self) -> int:
        """Stages of the pipeline."""
        return self.pp * self.virtual_stages

    @property
    def splits(self) -> bool:
        """Whether a pipeline runs whose schedule splits the backward pass."""
        return self.pp > 1 and SCHEDULES[self.schedule].splits

    @property
    def recomputes(self) -> tuple[Recompute, ...]:
        """Every recompute policy that some layer follows."""
        return self.recompute_by_layer or self.recompute_by_stage or (self.recompute,)

    @property
    def own_rows(self) -> tuple[int, ...]:
        """Rows of a step on a data rank of each replica; () where they do not share out."""
        if self.rows is None:
            return ()
        if self.rows_by_replica:
            whole = all(rows % self.dp_shard == 0 for rows in self.rows_by_replica)
            return tuple(rows // self.dp_shard for rows in self.rows_by_replica) if whole else ()
        own, rest = divmod(self.rows, self.data_ranks)
        return () if rest else (own,) * self.dp_replicate

    @property
    def fewest_micro_batches(self) -> int | None:
        """Micro-batches a step, where a replica has the fewest rows; of one row if none is said."""
        return min(self.own_rows) // (self.micro_batch or 1) if self.own_rows else None

    def plan(self, *, threads: int, compile: bool, **fields: Any) -> Plan:
        """The Plan of this candidate, which is legal and whose rows and device are known.

        Micro-batches are of one row where nothing is said; `fields` are the plan's other ones.
        """
        assert self.own_rows and self.sequence_length is not None
        micro_batch, layers = self.micro_batch or 1, self.stage_layers
        if self.pp > 1 and not layers and self.model is not None:
            layers = split_layers(self.model, self.stages)
        return Plan(
            world_size=self.world,
            dp_replicate=self.dp_replicate,
            dp_shard=self.dp_shard,
            micro_batch=micro_batch,
            accumulation=max(self.own_rows) // micro_batch,
            threads=threads,
            precision=self.precision,
            recompute=self.recompute,
            compile=compile,
            device=self.device or "cpu",
            sequence_length=self.sequence_length,
            optimizer=self.optimizer,
            pp=self.pp,
            cp=self.cp,
            tp=self.tp,
            ep=self.ep,
            zero=self.zero,
            schedule=self.schedule,
            virtual_stages=self.virtual_stages,
            stage_layers=layers,
            cp_method=self.cp_method,
            whole=self.whole,
            offload=self.offload,
            recompute_by_stage=self.recompute_by_stage,
            recompute_by_layer=self.recompute_by_layer,
            rows_by_replica=self.rows_by_replica if len(set(self.own_rows)) > 1 else (),
            **fields,
        )

    def changed(self, **fields: Any) -> Candidate:
        """With other values of some fields, and what is derived settled anew."""
        return settled(replace(self, **fields))


def settled(candidate: Candidate) -> Candidate:
    """The candidate with its derived fields as they follow from the others."""
    c, fields = candidate, candidate.derived
    rest = max(1, c.world // (c.pp * c.cp * c.tp))
    replicas, shards, virtual, zero = c.dp_replicate, c.dp_shard, c.virtual_stages, c.zero
    if {"dp_replicate", "dp_shard"} <= fields:
        wants = "zero" not in fields or c.ep > 1 or c.offload == "parameters"
        replicas, shards = (1, rest) if c.device == "cuda" or wants else (rest, 1)
    elif "dp_replicate" in fields:
        replicas = max(1, rest // shards)
    elif "dp_shard" in fields:
        shards = max(1, rest // replicas)
    if "virtual_stages" in fields:
        virtual = 2 if c.pp > 1 and c.schedule not in ("gpipe", "1f1b") else 1
    if "zero" in fields:
        # Weight gradients that come late come after FSDP has reduced a micro-batch's.
        zero = 0 if shards == 1 else 1 if c.splits else 3
    if (replicas, shards, virtual, zero) == (c.dp_replicate, c.dp_shard, c.virtual_stages, c.zero):
        return c
    return replace(c, dp_replicate=replicas, dp_shard=shards, virtual_stages=virtual, zero=zero)


def candidate_of(
    parallel: Parallel,
    training: Training,
    *,
    world: int | None,
    optimizer: str = "adamw",
    sequence_length: int | None = None,
    model: DecoderConfig | None = None,
    native: bool | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    has_float8: bool | None = None,
    has_compiler: bool | None = None,
    adapter: Adapter | None = None,
    objective: Objective | None = None,
    beside: Beside | None = None,
) -> Candidate:
    """What a recipe asks for, on `world` workers; None asks for the fewest that could do.

    `beside` is the second model where the caller knows it better than the objective tells.
    """
    if beside is None and objective is not None:
        beside = beside_of(objective, adapted=adapter is not None, model=model, native=native)
    given = {"dp_replicate": parallel.replicas, "dp_shard": parallel.dp_shard}
    derived = {key for key, value in given.items() if value is None}
    derived |= {"zero"} if parallel.zero is None else set()
    derived |= {"virtual_stages"} if parallel.virtual_stages is None else set()
    rows = None
    if world is None:
        shards = parallel.zero is not None or parallel.offload == "parameters"
        given["dp_shard"] = parallel.dp_shard or max(parallel.ep, 2 if shards else 1)
        given["dp_replicate"] = parallel.replicas or 1
        derived -= given.keys()
        world = parallel.pp * parallel.cp * parallel.tp * math.prod(filter(None, given.values()))
    elif training.batch_tokens is None:
        rows = training.batch_sequences or 8
    elif sequence_length is not None and training.batch_tokens % sequence_length == 0:
        rows = training.batch_tokens // sequence_length
    keys = ("router_balance_loss", "router_z_loss", "router_bias_rate")
    return settled(
        Candidate(
            world=world,
            pp=parallel.pp,
            dp_replicate=given["dp_replicate"] or 1,
            dp_shard=given["dp_shard"] or 1,
            cp=parallel.cp,
            tp=parallel.tp,
            ep=parallel.ep,
            zero=parallel.zero or 0,
            schedule=parallel.schedule,
            virtual_stages=parallel.virtual_stages or 1,
            stage_layers=tuple(parallel.stage_layers or ()),
            cp_method=parallel.cp_method,
            whole=tuple(sorted(set(parallel.whole))),
            offload=parallel.offload,
            # What `auto` is follows from all the rest.
            recompute="none" if training.recompute == "auto" else training.recompute,
            recompute_by_stage=tuple(parallel.recompute_by_stage or ()),
            recompute_by_layer=tuple(parallel.recompute_by_layer or ()),
            dropout=training.dropout,
            neftune_alpha=training.neftune_alpha,
            adapter=adapter,
            keeps_originals=objective is not None and objective.needs_reference,
            beside=beside,
            compile=training.compile,
            precision=training.precision,
            optimizer=optimizer,
            router_keys=tuple(key for key in keys if getattr(training, key)),
            sequence_length=sequence_length,
            rows=rows,
            counts_tokens=training.batch_tokens is not None,
            micro_batch=None if parallel.micro_batch == "auto" else parallel.micro_batch,
            device=device,
            has_float8=has_float8,
            has_compiler=has_compiler,
            model=model,
            native=native,
            derived=frozenset(derived),
            rows_by_replica=tuple(parallel.rows_by_replica or ()),
        )
    )

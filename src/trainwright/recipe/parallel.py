"""The recipe's `parallel` section: how the work is spread."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from trainwright.recipe.section import Count, NotTruth, Section, Share

Recompute = Literal["none", "full", "selective"] | Share

# Keys beside which the layout is still searched for; every other one makes part of a layout.
OPEN_KEYS = frozenset({"workers", "micro_batch", "threads"})


class Parallel(Section):
    """How the work is spread. `auto`, the default, searches for what is quickest on the machine.

    `workers`, `micro_batch` and `threads` are kept by the search. With any other key nothing is
    searched: what is given is kept, and the rest derived from it. `pp` × `dp_replicate` ×
    `dp_shard` × `cp` × `tp` are the workers; what works with what stands in docs/parallelism.md,
    how is searched in docs/planner.md.
    """

    words = ("auto",)

    workers: Count | Literal["auto"] = Field(
        "auto",
        description="Local worker processes; `auto` is one a GPU, and on a CPU as many as the "
        "degrees below make, or as are quickest where none is given.",
    )
    dp_replicate: Count | None = Field(
        None,
        description="Replicas that each hold whole weights (DDP; with `dp_shard`, HSDP). For "
        "models that fit, and between groups of workers that are far apart.",
        examples=[2],
    )
    dp_shard: Count | None = Field(
        None,
        description="Workers over which states, gradients and weights are sharded (see `zero`). "
        "For models whose states do not fit on one worker.",
        examples=[2],
    )
    zero: Annotated[Literal[1, 2, 3], NotTruth] | None = Field(
        None,
        description="What `dp_shard` cuts: 1 the optimizer state, 2 the gradients too, 3 (the "
        "default) the weights too (FSDP2). Less saves traffic, more saves memory.",
        examples=[3],
    )
    tp: Count = Field(
        1,
        description="Workers over which each matrix product, and the stream between, is cut "
        "(tensor and sequence parallelism). For wide models on workers with fast links.",
    )
    whole: list[Literal["attention", "network"]] = Field(
        [],
        description="Parts of every block that `tp` does not cut: each worker has all of their "
        "weights and does its own tokens. For heads or widths that `tp` does not divide.",
        examples=[["attention"]],
    )
    cp: Count = Field(1, description="Workers over which each row's tokens are cut. For long rows.")
    cp_method: Literal["ring", "all_gather", "ulysses"] = Field(
        "ring",
        description="How attention sees the other workers' tokens: keys and values travel round "
        "(`ring`, least memory), are gathered at once (`all_gather`, fewest messages), or heads "
        "are traded for tokens (`ulysses`, least traffic where there are heads enough).",
    )
    pp: Count = Field(
        1,
        description="Workers over which the layers are cut (pipeline stages). For deep models and "
        "slow links; needs several micro-batches a step.",
    )
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"] = Field(
        "1f1b",
        description="Order of a pipeline's micro-batches. `1f1b` holds few activations; "
        "`interleaved` idles less for more messages; `zero_bubble`, `zbv` and `dualpipev` split "
        "the backward pass and idle least; `gpipe` is the plainest.",
    )
    virtual_stages: Count | None = Field(
        None,
        description="Pipeline stages a worker; default 2 for the schedules that take turns between "
        "stages, else 1.",
        examples=[2],
    )
    stage_layers: list[Count] | None = Field(
        None,
        description="Layers of each pipeline stage, in the model's order; default even, the "
        "embedding and the head counted as work.",
        examples=[[5, 6, 6, 5]],
    )
    recompute_by_stage: list[Recompute] | None = Field(
        None,
        description="`training.recompute` of each pipeline stage, in the model's order; the first "
        "stages hold the most activations.",
        examples=[["full", "none"]],
    )
    recompute_by_layer: list[Recompute] | None = Field(
        None,
        description="`training.recompute` of each layer, in the model's order. The first layers of "
        "a stage had better recompute the most: they go backward when the others' memory is free.",
        examples=[["full", "full", "selective", "none"]],
    )
    ep: Count = Field(
        1,
        description="Workers of a `dp_shard` group over which the experts of a mixture are dealt "
        "out. For models with many experts.",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="What the host's memory holds instead of the GPU's: the optimizer's state and "
        "its step, or the sharded weights and gradients too. Slow; for when nothing else fits.",
    )
    micro_batch: Count | Literal["auto"] = Field(
        "auto", description="Rows a worker puts through the model at once."
    )
    rows_by_replica: list[Count] | None = Field(
        None,
        description="Rows of a step that each of the `dp_replicate` replicas takes; default "
        "equally many. They sum to the batch. For replicas on devices of unequal speed.",
        examples=[[12, 4]],
    )
    threads: Count | Literal["auto"] = Field(
        "auto", description="CPU threads a worker; `auto` shares the cores out evenly."
    )

    @property
    def replicas(self) -> int | None:
        """`dp_replicate`, or as many as `rows_by_replica` has numbers; None where none is given."""
        return self.dp_replicate or (len(self.rows_by_replica or ()) or None)

    @property
    def is_searched(self) -> bool:
        """Whether the layout is the planner's to choose: none of its keys is given."""
        return self.model_fields_set <= OPEN_KEYS

    @model_serializer(mode="wrap")
    def _without_a_layout(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A layout that is searched is not written out: read again, its keys would be given."""
        values = handler(self)
        return {k: v for k, v in values.items() if k in OPEN_KEYS or not self.is_searched}

"""What works with what: one table of rules that every way to spread a run must keep. No torch.

`make_plan`, `validate`, `verify`'s enumeration and docs/parallelism.md all read this table. A rule
is data: what it concerns, whether it holds, what to say where it does not, and which changes of
single fields may mend it; `planner.legality` puts such changes together into a legal candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from trainwright.planner.candidate import Candidate
from trainwright.planner.conditions import (
    blocks_fit,
    cuts,
    data_ranks_in_words,
    embeds_twice,
    has_budget,
    kv_heads_fit,
    own_heads,
    replica_rows_fit,
    replica_rows_say,
    schedule_faults,
    schedule_fits,
    stages_in_words,
    ulysses_fits,
    widths,
    workers_key,
    workers_say,
)
from trainwright.planner.mends import (
    Change,
    any_of,
    batches,
    columns_unit,
    default_layers,
    degrees,
    larger_batches,
    left_whole,
    lengths,
    micro_batches,
    other_values,
    plain_policies,
    replica_rows,
    schedules,
    virtual_stages,
    without_eight_bits,
    without_pages,
    without_whole,
)
from trainwright.recipe.schema import EIGHT_BIT, PAGED


@dataclass(frozen=True)
class Rule:
    """One thing that cannot be.

    `concerns` are the recipe's keys that take part, the first the one to blame; `reason` says why,
    for a reader of the table; `says` what is wrong with a candidate, with its numbers; `mends`
    changes of its fields that may help.
    """

    name: str
    concerns: tuple[str, ...]
    reason: str
    holds: Callable[[Candidate], bool]
    says: Callable[[Candidate], str]
    mends: Callable[[Candidate], Iterable[Change]]
    key: Callable[[Candidate], str] | None = None  # where the blame depends on the candidate
    hint: str = ""  # another way out, for the end of the fix

    def key_of(self, candidate: Candidate) -> str:
        """The recipe's key that is to blame."""
        return self.key(candidate) if self.key is not None else self.concerns[0]


_WITHOUT_SPLIT = schedules("1f1b", "interleaved", "gpipe")

RULES: tuple[Rule, ...] = (
    Rule(
        "workers",
        ("parallel.dp_replicate", "parallel.dp_shard", "parallel.pp", "parallel.cp", "parallel.tp"),
        "pp × dp_replicate × dp_shard × cp × tp are all the workers that there are",
        lambda c: c.product == c.world,
        workers_say,
        degrees("dp_replicate", "dp_shard", "cp", "pp", "tp"),
        key=workers_key,
    ),
    Rule(
        "own-decoder",
        ("parallel.tp", "parallel.cp", "parallel.pp", "parallel.ep"),
        "a family that runs by transformers' own class is spread over data ranks only: tp, cp, pp "
        "and ep cut inside a decoder of ours",
        lambda c: c.native is not False or c.tp == c.cp == c.pp == c.ep == 1,
        lambda c: "this model runs by transformers' own class, which is spread by dp only",
        lambda c: [{"tp": 1, "cp": 1, "pp": 1, "ep": 1}],
        key=lambda c: f"parallel.{next(a for a in ('tp', 'cp', 'pp', 'ep') if getattr(c, a) > 1)}",
    ),
    Rule(
        "own-decoder-dropout",
        ("training.dropout",),
        "dropout that does not depend on the layout is part of our own decoder; transformers' "
        "classes have their own",
        lambda c: c.native is not False or c.dropout == 0,
        lambda c: "this model runs by transformers' own class, which has no such dropout",
        other_values(dropout=0.0),
    ),
    Rule(
        "own-decoder-noise",
        ("training.neftune_alpha",),
        "noise on embeddings that does not depend on the layout is part of our own decoder",
        lambda c: c.native is not False or c.neftune_alpha == 0,
        lambda c: "this model runs by transformers' own class, which has no such noise",
        other_values(neftune_alpha=0.0),
    ),
    Rule(
        "adapter-dropout",
        ("adapter.dropout", "parallel.tp"),
        "what an adapter drops of its inputs is decided token by token, and tp's workers have "
        "parts of the tokens, or of their channels",
        lambda c: c.tp == 1 or c.adapter is None or c.adapter.dropout == 0,
        lambda c: f"adapters with dropout do not go with tp {c.tp}",
        degrees("tp"),
        hint="or write `adapter.dropout: 0`",
    ),
    Rule(
        "adapter-copies",
        ("adapter.train_also", "parallel.tp"),
        "a reference keeps whole copies of layers that are trained beside the adapter, and tp cuts "
        "those layers",
        lambda c: (
            c.tp == 1 or c.adapter is None or not (c.keeps_originals and c.adapter.train_also)
        ),
        lambda c: f"copies of layers for the reference do not go with tp {c.tp}",
        degrees("tp"),
    ),
    Rule(
        "adapter-tied",
        ("adapter.targets", "parallel.pp"),
        "the first and the last stage of a pipeline would each have an adapter of the embedding "
        "that they share",
        lambda c: not embeds_twice(c),
        lambda c: "an adapter on tied embeddings does not go with a pipeline",
        degrees("pp"),
    ),
    Rule(
        "adapter-float8",
        ("training.precision", "adapter"),
        "products in float8 are made of the layers' own weights, and adapters change the layers",
        lambda c: c.adapter is None or c.precision != "float8",
        lambda c: "adapters do not go with float8",
        other_values(precision="bf16"),
    ),
    Rule(
        "quantised-blocks",
        ("adapter.quantise", "parallel.tp"),
        "NF4 scales blocks of 64 values of a row together, and tp must not cut a block in two",
        blocks_fit,
        lambda c: f"tp {c.tp} would cut blocks of 64 values in two",
        degrees("tp"),
        hint="or write `adapter.quantise: int8`",
    ),
    Rule(
        "tensor-heads",
        ("parallel.tp", "parallel.whole"),
        "tp cuts attention by heads: it divides the query heads, or leaves attention whole",
        cuts(lambda model: model.num_heads, "attention"),
        lambda c: f"{c.tp} does not divide the model's {c.model.num_heads} heads",  # type: ignore[union-attr]
        any_of(left_whole("attention"), degrees("tp")),
    ),
    Rule(
        "tensor-key-value-heads",
        ("parallel.tp", "parallel.whole"),
        "every worker's queries read key-value heads of its own or one that it shares: the "
        "key-value heads divide by tp, or tp by them",
        kv_heads_fit,
        lambda c: (
            f"{c.tp} and the model's {c.model.num_kv_heads} key-value heads do not divide "  # type: ignore[union-attr]
            "one another"
        ),
        any_of(left_whole("attention"), degrees("tp")),
    ),
    Rule(
        "tensor-feed-forward",
        ("parallel.tp", "parallel.whole"),
        "tp cuts feed-forward networks by channels: it divides intermediate_size, experts' widths "
        "too, or leaves networks whole",
        lambda c: (
            c.model is None
            or "network" in c.whole
            or all(width % c.tp == 0 for _, width in widths(c.model))
        ),
        lambda c: (
            f"{c.tp} does not divide the model's "
            + " and ".join(f"{name} {width}" for name, width in widths(c.model) if width % c.tp)
        ),
        any_of(left_whole("network"), degrees("tp")),
    ),
    Rule(
        "tensor-vocabulary",
        ("parallel.tp",),
        "tp cuts the embedding and the head by tokens: it divides the vocabulary",
        cuts(lambda model: model.vocab_size),
        lambda c: f"{c.tp} does not divide the vocabulary of {c.model.vocab_size:,}",  # type: ignore[union-attr]
        degrees("tp"),
        hint=", or give the tokenizer or `model.config.vocab_size` a multiple of it",
    ),
    Rule(
        "whole-tensor",
        ("parallel.whole", "parallel.tp"),
        "whole is what tp does not cut: without tp nothing is cut",
        lambda c: not c.whole or c.tp > 1,
        lambda c: f"{' and '.join(c.whole)} cannot be left whole: tp is 1, which cuts nothing",
        any_of(other_values(whole=()), degrees("tp")),
    ),
    Rule(
        "whole-context",
        ("parallel.whole", "parallel.cp"),
        "attention that tp leaves whole brings a row's keys together over tp, and cp does the same "
        "over cp: one of them is enough",
        lambda c: "attention" not in c.whole or c.cp == 1,
        lambda c: f"attention is left whole, which does not go with cp {c.cp}",
        any_of(without_whole("attention"), degrees("cp")),
    ),
    Rule(
        "whole-experts",
        ("parallel.whole",),
        "experts are dealt out by ep, or cut by tp: routers count the tokens of a whole row",
        lambda c: "network" not in c.whole or c.model is None or c.model.experts is None,
        lambda c: "a mixture of experts cannot leave its networks whole",
        without_whole("network"),
    ),
    Rule(
        "columns",
        ("data.sequence_length", "parallel.tp", "parallel.cp"),
        "rows are cut along the sequence over cp and tp, over `ring` and `all_gather` into two "
        "chunks a worker, an early and a late one: sequence_length divides by tp × cp × 2, or by "
        "tp × cp with `ulysses` or without cp",
        lambda c: c.sequence_length is None or c.sequence_length % columns_unit(c) == 0,
        lambda c: (
            f"rows of {c.sequence_length:,} tokens do not divide by {columns_unit(c)} "
            f"(tp {c.tp} × cp {c.cp}{' × 2' if columns_unit(c) > c.tp * c.cp else ''})"
        ),
        any_of(lengths, degrees("tp", "cp"), other_values(cp_method="ulysses")),
    ),
    Rule(
        "ulysses-heads",
        ("parallel.cp_method", "parallel.cp", "parallel.tp"),
        "`ulysses` trades heads for tokens: a worker's heads divide by cp, and by its key-value "
        "heads once those are repeated until they divide by cp",
        ulysses_fits,
        lambda c: (
            "a worker has {} heads and {} key-value heads, which cp {} does not divide".format(
                *own_heads(c), c.cp
            )
        ),
        any_of(other_values(cp_method="ring"), degrees("cp", "tp")),
    ),
    Rule(
        "experts-model",
        ("parallel.ep",),
        "ep deals out experts, which only mixtures of experts have",
        lambda c: c.ep == 1 or c.model is None or c.model.experts is not None,
        lambda c: "this model has no experts to deal out",
        other_values(ep=1),
    ),
    Rule(
        "experts-count",
        ("parallel.ep",),
        "every worker along ep has equally many experts",
        lambda c: c.model is None or c.model.experts is None or c.model.experts.count % c.ep == 0,
        lambda c: f"{c.ep} does not divide the model's {c.model.experts.count} experts",  # type: ignore[union-attr]
        degrees("ep"),
    ),
    Rule(
        "experts-shards",
        ("parallel.ep", "parallel.dp_shard"),
        "ep is the inner part of dp_shard",
        lambda c: c.dp_shard % c.ep == 0,
        lambda c: f"ep {c.ep} does not divide dp_shard {c.dp_shard}",
        degrees("ep", "dp_shard", "dp_replicate"),
    ),
    Rule(
        "router",
        ("training.router_balance_loss", "training.router_z_loss", "training.router_bias_rate"),
        "only mixtures of experts have a router",
        lambda c: (
            not c.router_keys
            or (c.native is not False and (c.model is None or c.model.experts is not None))
        ),
        lambda c: "this model has no router",
        other_values(router_keys=()),
        key=lambda c: f"training.{c.router_keys[0]}",
    ),
    Rule(
        "router-bias",
        ("training.router_bias_rate",),
        "only families whose routers have a correction bias (deepseek_v3) can be balanced by it",
        lambda c: (
            "router_bias_rate" not in c.router_keys
            or c.model is None
            or c.model.experts is None
            or c.model.experts.corrected
        ),
        lambda c: "this model's routers have no bias to move",
        lambda c: [{"router_keys": tuple(k for k in c.router_keys if k != "router_bias_rate")}],
    ),
    Rule(
        "pipeline-layers",
        ("parallel.pp", "parallel.virtual_stages"),
        "every pipeline stage has a layer at least",
        lambda c: c.pp == 1 or c.model is None or c.stages <= c.model.num_layers,
        lambda c: (
            f"{c.stages} pipeline stages are more than the model's {c.model.num_layers} "  # type: ignore[union-attr]
            "layers"
        ),
        any_of(degrees("pp"), virtual_stages, schedules("1f1b")),
    ),
    Rule(
        "virtual-stages",
        ("parallel.virtual_stages", "parallel.schedule", "parallel.pp"),
        "`gpipe` and `1f1b` have one stage a worker, `interleaved` two or more, `zero_bubble` any "
        "number, `zbv` and `dualpipev` two; without pp there is one",
        lambda c: (
            schedule_fits(c, "parallel.virtual_stages") if c.pp > 1 else c.virtual_stages == 1
        ),
        lambda c: next(
            iter(schedule_faults(c, "parallel.virtual_stages")),
            f"{c.virtual_stages} stages a worker, but pp is 1",
        ),
        any_of(virtual_stages, schedules("interleaved", "1f1b"), degrees("pp")),
    ),
    Rule(
        "stage-layers",
        ("parallel.stage_layers", "parallel.pp", "parallel.virtual_stages"),
        "stage_layers has a number for each stage, pp × virtual_stages of them, and they sum to "
        "the model's layers",
        lambda c: (
            not c.stage_layers
            or (
                c.pp > 1
                and len(c.stage_layers) == c.stages
                and min(c.stage_layers) > 0
                and (c.model is None or sum(c.stage_layers) == c.model.num_layers)
            )
        ),
        lambda c: (
            f"{list(c.stage_layers)} are {sum(c.stage_layers)} layers in "
            f"{len(c.stage_layers)} stages, but there are "
            + (f"{c.model.num_layers} layers and " if c.model is not None else "")
            + stages_in_words(c)
        ),
        default_layers,
    ),
    Rule(
        "recompute-stages",
        ("parallel.recompute_by_stage", "parallel.pp", "parallel.virtual_stages"),
        "recompute_by_stage has an entry for each stage, pp × virtual_stages of them",
        lambda c: not c.recompute_by_stage or (c.pp > 1 and len(c.recompute_by_stage) == c.stages),
        lambda c: f"{len(c.recompute_by_stage)} entries, but {stages_in_words(c)}",
        lambda c: [{"recompute_by_stage": ()}],
    ),
    Rule(
        "recompute-layers",
        ("parallel.recompute_by_layer", "parallel.recompute_by_stage"),
        "recompute_by_layer has an entry for each layer of a family of ours, and takes the place "
        "of recompute_by_stage",
        lambda c: (
            not c.recompute_by_layer
            or (
                c.native is not False
                and not c.recompute_by_stage
                and (c.model is None or len(c.recompute_by_layer) == c.model.num_layers)
            )
        ),
        lambda c: (
            "stages and layers are both said to recompute"
            if c.recompute_by_stage
            else f"{len(c.recompute_by_layer)} entries, but "
            + ("the layers are not known" if c.model is None else f"{c.model.num_layers} layers")
        ),
        any_of(lambda c: [{"recompute_by_stage": ()}], lambda c: [{"recompute_by_layer": ()}]),
    ),
    Rule(
        "zero-shards",
        ("parallel.zero", "parallel.dp_shard"),
        "zero says what dp_shard cuts: one needs the other",
        lambda c: (c.zero > 0) == (c.dp_shard > 1),
        lambda c: f"zero {c.zero} cuts what dp_shard workers share, but dp_shard is {c.dp_shard}",
        lambda c: [{"zero": 0}, *degrees("dp_shard", "dp_replicate", "tp", "cp", "pp")(c)],
    ),
    Rule(
        "zero-split-backward",
        ("parallel.zero", "parallel.schedule"),
        "schedules that split the backward pass make weight gradients after FSDP has reduced a "
        "micro-batch's: with zero 1 it reduces once, at the end of the step",
        lambda c: not (c.splits and c.zero > 1),
        lambda c: f"schedule {c.schedule} makes weight gradients after zero {c.zero} has reduced",
        any_of(other_values(zero=1), _WITHOUT_SPLIT),
    ),
    Rule(
        "offload-shards",
        ("parallel.offload", "parallel.dp_shard"),
        "parameters are offloaded by the policy that shards them",
        lambda c: c.offload != "parameters" or c.dp_shard > 1,
        lambda c: "parameters are offloaded as shards, but dp_shard is 1",
        any_of(other_values(offload="optimizer"), degrees("dp_shard", "dp_replicate")),
    ),
    Rule(
        "eight-bit-cut",
        ("optimizer.name", "parallel.tp", "parallel.ep"),
        "8-bit states are scaled by blocks of neighbouring elements, which tp and ep would draw "
        "otherwise",
        lambda c: c.optimizer not in EIGHT_BIT or c.tp == c.ep == 1,
        lambda c: (
            f"`{c.optimizer}` scales its state by blocks, which tp and ep would draw otherwise"
        ),
        any_of(without_eight_bits, lambda c: [{"tp": 1, "ep": 1}]),
    ),
    Rule(
        "paged-device",
        ("optimizer.name",),
        "paged states go from a GPU's memory to the host's",
        lambda c: c.optimizer not in PAGED or c.device != "cpu",
        lambda c: f"`{c.optimizer}` pages its state from a GPU to the host, and here is no GPU",
        without_pages,
    ),
    Rule(
        "paged-offload",
        ("parallel.offload", "optimizer.name"),
        "paged states are on the host when there is need; offloaded ones always are",
        lambda c: c.optimizer not in PAGED or c.offload == "none",
        lambda c: (
            f"`{c.optimizer}` pages its state to the host, and offload {c.offload} has it "
            "there already"
        ),
        any_of(other_values(offload="none"), without_pages),
    ),
    Rule(
        "compiler",
        ("training.compile",),
        "torch.compile needs a C compiler",
        lambda c: c.compile is not True or c.has_compiler is not False,
        lambda c: "torch.compile needs a C compiler, and none is found here",
        other_values(compile="auto"),
        hint=", or install gcc or clang",
    ),
    Rule(
        "compile-split-backward",
        ("training.compile", "parallel.schedule"),
        "schedules that split the backward pass take the weights' part out of it, which compiled "
        "blocks do not let go",
        lambda c: not (c.splits and c.compile is True),
        lambda c: (
            f"schedule {c.schedule} splits backward passes, which compiled blocks do not allow"
        ),
        any_of(other_values(compile="auto"), _WITHOUT_SPLIT),
    ),
    Rule(
        "budget-compile",
        ("training.recompute", "training.compile"),
        "a memory budget is met by torch.compile's partitioner",
        lambda c: (
            not has_budget(c)
            or (c.compile is not False and c.has_compiler is not False and not c.splits)
        ),
        lambda c: (
            "recompute by a memory budget needs torch.compile, which "
            + (
                f"schedule {c.schedule} does not allow"
                if c.splits
                else "is off"
                if c.compile is False
                else "needs a C compiler, and none is found here"
            )
        ),
        any_of(other_values(compile="auto"), plain_policies, _WITHOUT_SPLIT),
        key=lambda c: (
            "parallel.recompute_by_layer"
            if c.recompute_by_layer
            else "parallel.recompute_by_stage"
            if c.recompute_by_stage
            else "training.recompute"
        ),
    ),
    Rule(
        "float8-device",
        ("training.precision",),
        "float8 products are a GPU's, of compute capability 8.9 or more",
        lambda c: c.precision != "float8" or (c.device != "cpu" and c.has_float8 is not False),
        lambda c: "float8 needs a GPU of compute capability 8.9 or more, which is not here",
        other_values(precision="bf16"),
    ),
    Rule(
        "rows",
        ("training.batch_sequences", "parallel.dp_replicate", "parallel.dp_shard"),
        "the rows of a batch share out evenly over dp_replicate × dp_shard",
        # Where the degrees do not make the workers, nobody knows the data ranks.
        lambda c: (
            c.rows is None
            or c.product != c.world
            or bool(c.rows_by_replica)
            or c.rows % c.data_ranks == 0
        ),
        lambda c: f"{c.rows} rows do not share out evenly over {data_ranks_in_words(c)}",
        any_of(batches, degrees("dp_replicate", "dp_shard")),
        key=lambda c: f"training.batch_{'tokens' if c.counts_tokens else 'sequences'}",
        hint=", or another `parallel.workers`",
    ),
    Rule(
        "replica-rows",
        ("parallel.rows_by_replica", "parallel.dp_replicate", "training.batch_sequences"),
        "rows_by_replica has a number for each of the dp_replicate replicas, all of which dp_shard "
        "divides, and they sum to the rows of the batch",
        replica_rows_fit,
        replica_rows_say,
        replica_rows,
    ),
    Rule(
        "micro-batch",
        ("parallel.micro_batch", "training.batch_sequences"),
        "micro-batches are equally large: micro_batch divides the rows of every data rank",
        lambda c: c.micro_batch is None or not any(own % c.micro_batch for own in c.own_rows),
        lambda c: (
            f"{c.micro_batch} does not divide the "
            f"{next(own for own in c.own_rows if own % (c.micro_batch or 1))} rows of a worker "
            f"({c.rows} rows, {c.data_ranks} data ranks)"
        ),
        any_of(micro_batches, batches, replica_rows),
    ),
    Rule(
        "micro-batches",
        ("parallel.schedule", "parallel.micro_batch", "training.batch_sequences"),
        "`dualpipev` needs 2 × pp micro-batches a step, to fill both directions",
        lambda c: schedule_fits(c, "parallel.micro_batch"),
        lambda c: schedule_faults(c, "parallel.micro_batch")[0],
        any_of(micro_batches, schedules("zbv", "interleaved", "1f1b"), larger_batches),
    ),
)

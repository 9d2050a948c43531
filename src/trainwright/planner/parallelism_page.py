"""docs/parallelism.md: the dimensions, what they cost, and what works with what.

`python -m trainwright.planner.parallelism_page docs/parallelism.md` writes the page anew, its
tables from the rules of legality and from the formulas of memory and traffic.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from trainwright.files import write_atomically
from trainwright.models.families import DecoderConfig, decoder_config, new_hf_config
from trainwright.planner.candidate import DEGREES, Candidate, settled
from trainwright.planner.explain import bubble, in_bytes
from trainwright.planner.layout import split_layers
from trainwright.planner.legality import broken_rules
from trainwright.planner.memory import activation_bytes, state_bytes
from trainwright.planner.plan import Plan
from trainwright.planner.rules import RULES
from trainwright.planner.schedules import SCHEDULES
from trainwright.planner.traffic import traffic_bytes
from trainwright.recipe.presets import PRESETS
from trainwright.recipe.schema import Adapter

# What a recipe may ask for, by the words of the table: fields of a candidate.
_FEATURES: dict[str, dict[str, Any]] = {
    "`dp_replicate`": {"dp_replicate": 2},
    "`zero: 1`": {"dp_shard": 2, "zero": 1},
    "`zero: 2`": {"dp_shard": 2, "zero": 2},
    "`zero: 3`": {"dp_shard": 2, "zero": 3},
    "`tp`": {"tp": 2},
    "`tp`, attention `whole`": {"tp": 2, "whole": ("attention",)},
    "`cp`, any method": {"cp": 2},
    "`pp`, whole backward": {"pp": 2, "schedule": "1f1b"},
    "`pp`, split backward": {"pp": 2, "schedule": "zbv"},
    "`ep`": {"dp_shard": 2, "ep": 2},
    "recompute by name": {"recompute": "full"},
    "recompute by budget": {"recompute": 0.5},
    "`compile: true`": {"compile": True},
    "`offload: optimizer`": {"offload": "optimizer"},
    "`offload: parameters`": {"dp_shard": 2, "offload": "parameters"},
    "`dropout`": {"dropout": 0.1},
    "`adamw-8bit`": {"optimizer": "adamw-8bit"},
    "`paged-adamw`": {"optimizer": "paged-adamw", "device": "cuda"},
    "`adapter`": {"adapter": Adapter()},
    "`adapter` with dropout": {"adapter": Adapter(dropout=0.1)},
    "`adapter`, `quantise: nf4`": {"adapter": Adapter(quantise="nf4")},
    "float8": {"precision": "float8", "device": "cuda"},
    "families without a decoder of ours": {"native": False, "model": None},
}
# Workers, name and degrees of the table of costs.
_LAYOUTS: dict[str, dict[str, Any]] = {
    "`dp_replicate: 8`": {"dp_replicate": 8},
    "`dp_shard: 8`, `zero: 1`": {"dp_shard": 8, "zero": 1},
    "`dp_shard: 8`, `zero: 2`": {"dp_shard": 8, "zero": 2},
    "`dp_shard: 8`, `zero: 3`": {"dp_shard": 8, "zero": 3},
    "`dp_replicate: 2`, `dp_shard: 4`": {"dp_replicate": 2, "dp_shard": 4, "zero": 3},
    "`tp: 8`": {"tp": 8},
    "`tp: 8`, `whole: [attention]`": {"tp": 8, "whole": ("attention",)},
    "`cp: 8`, `ring`": {"cp": 8},
    "`cp: 8`, `all_gather`": {"cp": 8, "cp_method": "all_gather"},
    "`cp: 8`, `ulysses`": {"cp": 8, "cp_method": "ulysses"},
    "`pp: 8`, `1f1b`": {"pp": 8},
    "`tp: 2`, `dp_shard: 4`, `zero: 3`": {"tp": 2, "dp_shard": 4, "zero": 3},
    "`tp: 2`, `pp: 2`, `dp_shard: 2`, `zero: 1`": {"tp": 2, "pp": 2, "dp_shard": 2, "zero": 1},
}


def page() -> str:
    """The whole page, in Markdown."""
    text = files("trainwright.planner").joinpath("parallelism.md").read_text(encoding="utf-8")
    tables = {"costs": _costs(), "schedules": _schedules(), "matrix": _matrix(), "rules": _rules()}
    for name, table in tables.items():
        text = text.replace(f"<!-- table: {name} -->", table)
    return text


def _costs() -> str:
    """Memory and traffic of a known model on eight GPUs, one layout a line."""
    config = decoder_config(new_hf_config("llama", PRESETS["llama"]["8b"], 128_256))
    lines = [
        "| layout | states | activations | sent a step | mostly by |",
        "|---|---|---|---|---|",
    ]
    for name, fields in _LAYOUTS.items():
        plan = _example(config, fields)
        sent = traffic_bytes(config, plan, pp_rank=min(1, plan.pp - 1))
        total = sum(sent.values())
        most = max(sent, key=lambda dimension: sent[dimension])
        states = in_bytes(state_bytes(config, plan).total)
        kept = in_bytes(plan.micro_batch * activation_bytes(config, plan))
        lines.append(f"| {name} | {states} | {kept} | {in_bytes(total)} | {most} |")
    return "\n".join(lines)


def _example(config: DecoderConfig, fields: dict[str, Any]) -> Plan:
    """32 rows of 8,192 tokens a step in bf16 on eight GPUs, a row a micro-batch."""
    plan = replace(
        Plan.alone("cuda"),
        world_size=8,
        precision="bf16",
        recompute="selective",
        sequence_length=8192,
        **fields,
    )
    layers = split_layers(config, plan.stages) if plan.pp > 1 else ()
    return replace(plan, accumulation=32 // plan.data_ranks, stage_layers=layers)


def _schedules() -> str:
    """Each schedule's bubble and its activations, simulated on four workers."""
    lines = [
        "| schedule | stages a worker | backward | idle, 4 workers and 8 micro-batches | 32 |",
        "|---|---|---|---|---|",
    ]
    for name, kind in SCHEDULES.items():
        virtual = max(kind.least_virtual, 1)
        stages = str(virtual) if kind.most_virtual == virtual else f"{virtual} or more"
        plan = replace(Plan.alone(), world_size=4, pp=4, virtual_stages=virtual)
        plan = replace(plan, schedule=name, accumulation=8)  # type: ignore[arg-type]
        idle = [bubble(plan), bubble(replace(plan, accumulation=32))]
        backward = "split" if kind.splits else "whole"
        lines.append(f"| `{name}` | {stages} | {backward} | {idle[0]:.0%} | {idle[1]:.0%} |")
    return "\n".join(lines)


def _matrix() -> str:
    """Every pair of features: whether it works, or the number of the rule that refuses it."""
    names = list(_FEATURES)
    numbers = {rule.name: number for number, rule in enumerate(RULES, 1)}
    letters = [chr(ord("a") + index) for index in range(len(names))]
    lines = [
        "| | | " + " | ".join(letters[:-1]) + " |",
        "|---|---|" + "---|" * (len(names) - 1),
    ]
    for row, name in enumerate(names):
        cells = []
        for column in range(len(names) - 1):
            if column >= row:
                cells.append("")
                continue
            refusing = _refusals(_FEATURES[name], _FEATURES[names[column]])
            if refusing is None:
                cells.append("–")
            else:
                links = [f"[{numbers[each]}](#{each})" for each in refusing]
                cells.append(" ".join(links) or "✓")
        lines.append(f"| **{letters[row]}** | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _refusals(one: dict[str, Any], other: dict[str, Any]) -> list[str] | None:
    """Rules that refuse both features at once; None where they are two values of one thing."""
    shared = one.keys() & other.keys()
    if any(one[name] != other[name] for name in shared):
        return None
    fields = {**one, **other}
    world = math.prod(fields.get(axis, 1) for axis in DEGREES)
    derived = {"zero", "virtual_stages"} - fields.keys()
    base: dict[str, Any] = {
        "model": _accommodating(),
        "native": True,
        "device": "cuda",
        "has_float8": True,
        "has_compiler": True,
        "sequence_length": 64,
        "rows": 64,
    }
    asked = Candidate(world=world, **{**base, **fields}, derived=frozenset(derived))
    return [rule.name for rule in broken_rules(settled(asked))]


def _accommodating() -> DecoderConfig:
    """A small mixture of experts whose every size divides."""
    shape = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
    }
    return decoder_config(new_hf_config("qwen3_moe", shape, 256))


def _rules() -> str:
    """Every rule by its name, with the keys that it concerns and its reason."""
    lines = ["| | rule | keys | why |", "|---|---|---|---|"]
    for number, rule in enumerate(RULES, 1):
        keys = ", ".join(f"`{key}`" for key in rule.concerns)
        anchor = f'<a id="{rule.name}"></a>'
        lines.append(f"| {number} | {anchor}{rule.name} | {keys} | {rule.reason} |")
    return "\n".join(lines)


if __name__ == "__main__":
    write_atomically(Path(sys.argv[1]), page())

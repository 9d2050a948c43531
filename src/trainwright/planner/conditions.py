"""What the rules of legality look at in a candidate, and how they put it in words. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from trainwright.models.families import DecoderConfig
from trainwright.planner.candidate import DEGREES, Candidate
from trainwright.planner.schedules import schedule_mistakes


def cuts(size: Callable[[Any], int], part: str = "") -> Callable[[Candidate], bool]:
    """Whether tp divides a size of the model, or does not cut that part of it."""
    return lambda c: c.model is None or part in c.whole or size(c.model) % c.tp == 0


def widths(model: Any) -> list[tuple[str, int]]:
    """The feed-forward widths that tp cuts, by Hugging Face's names."""
    experts = model.experts
    if experts is None:
        return [("intermediate_size", model.intermediate_size)]
    widths = [("experts' width", experts.width)]
    if experts.shared_width:
        widths.append(("shared expert's width", experts.shared_width))
    if not all(experts.layers):
        widths.append(("intermediate_size", model.intermediate_size))
    return widths


def cut_badly(model: DecoderConfig, tp: int) -> tuple[str, ...]:
    """The parts of a block that so many workers cannot cut evenly, as `Plan.whole` names them."""
    heads, keys = model.num_heads, model.num_kv_heads
    bad = []
    if heads % tp or (keys % tp and tp % keys):
        bad.append("attention")
    if any(width % tp for _, width in widths(model)):
        bad.append("network")
    return tuple(bad)


def blocks_fit(c: Candidate) -> bool:
    """Whether tp cuts what is quantised to 4 bits between blocks of 64 values."""
    if c.tp == 1 or c.model is None or c.adapter is None or c.adapter.quantise != "nf4":
        return True
    model, across = c.model, []
    if "attention" not in c.whole:
        across.append(model.num_heads * model.head_dim)
    if "network" not in c.whole:
        across += [width for _, width in widths(model)]
    return model.hidden_size % 64 == 0 and all(size % (64 * c.tp) == 0 for size in across)


def embeds_twice(c: Candidate) -> bool:
    """Whether an adapter is on an embedding that two stages of a pipeline have."""
    if c.pp == 1 or c.adapter is None or c.model is None or not c.model.tied_embeddings:
        return False
    named = [*([] if isinstance(c.adapter.targets, str) else c.adapter.targets)]
    return any(name.endswith("embed_tokens") for name in [*named, *c.adapter.train_also])


def kv_heads_fit(c: Candidate) -> bool:
    if c.model is None or "attention" in c.whole:
        return True
    return c.model.num_kv_heads % c.tp == 0 or c.tp % c.model.num_kv_heads == 0


def own_heads(c: Candidate) -> tuple[int, int]:
    """Query heads and key-value heads of a worker under tp."""
    assert c.model is not None
    return c.model.num_heads // c.tp, max(1, c.model.num_kv_heads // c.tp)


def ulysses_fits(c: Candidate) -> bool:
    if c.cp == 1 or c.cp_method != "ulysses" or c.model is None:
        return True
    heads, key_values = own_heads(c)
    # Key-value heads that do not divide by cp are repeated until they do.
    return heads % math.lcm(key_values, c.cp) == 0


def stages_in_words(c: Candidate) -> str:
    return f"{c.stages} stages" if c.stages > 1 else "no pipeline"


def workers_say(c: Candidate) -> str:
    there = "1 worker" if c.world == 1 else f"{c.world} workers"
    given = [a for a in DEGREES if a not in c.derived and (getattr(c, a) > 1 or a[:2] == "dp")]
    words = " × ".join(f"{axis} {getattr(c, axis)}" for axis in given)
    if {"dp_replicate", "dp_shard"} & c.derived:
        return f"{words} {'do' if len(given) > 1 else 'does'} not divide {there}"
    many = "1 worker" if c.product == 1 else f"{c.product} workers"
    return f"{words} make {many}, but there {'is' if c.world == 1 else 'are'} {c.world}"


def workers_key(c: Candidate) -> str:
    order = ("dp_replicate", "dp_shard", "pp", "cp", "tp")
    given = [axis for axis in order if axis not in c.derived and getattr(c, axis) > 1]
    return f"parallel.{given[0] if given else 'dp_replicate'}"


def schedule_fits(c: Candidate, key: str) -> bool:
    return not schedule_faults(c, key)


def schedule_faults(c: Candidate, key: str) -> list[str]:
    """What `planner.schedules` has against the schedule, as far as it blames `key`."""
    if c.pp == 1:
        return []
    many = c.fewest_micro_batches if c.fewest_micro_batches is not None else 1 << 30
    found = schedule_mistakes(c.schedule, c.pp, c.virtual_stages, many)
    return [mistake.what for mistake in found if mistake.key == key]


def has_budget(c: Candidate) -> bool:
    return any(not isinstance(policy, str) for policy in c.recomputes)


def replica_rows_fit(c: Candidate) -> bool:
    return not c.rows_by_replica or (
        len(c.rows_by_replica) == c.dp_replicate
        and (c.rows is None or sum(c.rows_by_replica) == c.rows)
        and all(rows > 0 and rows % c.dp_shard == 0 for rows in c.rows_by_replica)
    )


def replica_rows_say(c: Candidate) -> str:
    rows, given = c.rows_by_replica, list(c.rows_by_replica)
    if len(rows) != c.dp_replicate:
        there = "is 1" if c.dp_replicate == 1 else f"are {c.dp_replicate}"
        return f"{given} are rows of {len(rows)} replicas, and there {there}"
    if min(rows) <= 0:
        return f"{given} leaves a replica without rows, and with nothing to do"
    if c.rows is not None and sum(rows) != c.rows:
        return f"{given} are {sum(rows)} rows, but the batch has {c.rows}"
    return f"{given} do not share out evenly over dp_shard {c.dp_shard}"


def data_ranks_in_words(c: Candidate) -> str:
    """ "4 workers", or "4 data ranks" where several workers share their rows."""
    kind = "worker" if c.data_ranks == c.world else "data rank"
    return f"{c.data_ranks} {kind}{'' if c.data_ranks == 1 else 's'}"

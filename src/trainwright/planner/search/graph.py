"""A decoder as a graph of operators with named axes, for the sharding program. No torch.

Layers of a kind are one set of operators that stands for all of them, so a model of a hundred
layers is no larger than one of two. What merely turns or scales a tensor on its way (rotation,
norms of queries and keys) is left out: it is cut as its tensor is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

from trainwright.models.families import DecoderConfig
from trainwright.planner.shapes import visible_keys

Kind = Literal["product", "attention", "elements", "lookup", "loss", "share"]
Axes = tuple[str, ...]
TOKENS: Axes = ("rows", "sequence")
STREAM: Axes = (*TOKENS, "hidden")


class Axis(NamedTuple):
    """A named dimension: its size, and the parts that it falls into, which no cut goes through."""

    size: float
    parts: int


class Scores(NamedTuple):
    """What attention makes for a query: keys that it sees on average, of `length`, and widths."""

    keys: float
    length: int
    width: int
    value_width: int


@dataclass(frozen=True)
class Operator:
    """One operator: the axes of its inputs, output and weight.

    A product sums over the axes that its input and its weight have and its output has not. `keeps`
    are axes that it needs whole; in its first `linear` inputs it is linear; `alias` says what an
    axis is called in another of its tensors, cut at the same places; `reduces` what it must sum
    over the workers itself, in bytes, where an axis is cut. It stands for `times` equal ones.
    """

    name: str
    kind: Kind
    inputs: tuple[Axes, ...]
    output: Axes
    weight: Axes = ()
    keeps: frozenset[str] = frozenset()
    linear: int = 0
    alias: Mapping[str, Axes] = field(default_factory=dict)
    reduces: Mapping[str, float] = field(default_factory=dict)
    scores: Scores | None = None
    times: int = 1
    counted: bool = True  # whether its weight is its own; a tied one is counted at the head

    @property
    def axes(self) -> Axes:
        """All that it has, each once."""
        return tuple(dict.fromkeys([*self.output, *self.weight, *sum(self.inputs, ())]))


class Edge(NamedTuple):
    """A tensor from one operator to an input of another, `times` times in the model."""

    producer: str
    consumer: str
    operand: int
    times: int = 1


@dataclass(frozen=True)
class Graph:
    """Operators in the order in which they run, and what goes from one to another."""

    axes: Mapping[str, Axis]
    operators: Mapping[str, Operator]
    edges: tuple[Edge, ...]
    tied: bool = False  # whether the embedding and the head have one weight

    def size(self, axes: Axes, cut: str | None = None, workers: int = 1) -> float:
        """Elements of a tensor, of a worker's part where one of its axes is cut."""
        whole = math.prod(self.axes[name].size for name in axes)
        return whole / workers if cut in axes else whole


def decoder_graph(config: DecoderConfig, rows: int, length: int) -> Graph:
    """The graph of `config`'s decoder for `rows` rows of `length` tokens."""
    builder = _Builder(config, rows, length)
    kinds = [(config.is_sparse(i), config.layer_windows[i]) for i in range(config.num_layers)]
    times = Counter(kinds)
    first = {kind: kinds.index(kind) for kind in reversed(kinds)}
    stream = builder.add(
        "embed_tokens",
        "lookup",
        {},
        STREAM,
        ("vocabulary", "hidden"),
        counted=not config.tied_embeddings,
    )
    stream = builder.add("stream", "share", {stream: STREAM}, STREAM)
    ends = {kind: builder.block(first[kind], times[kind]) for kind in times}
    builder.join(stream, ends[kinds[0]][0], 1)
    for (before, after), count in Counter(pairwise(kinds)).items():
        builder.join(ends[before][1], ends[after][0], count)
    norm = builder.norm("norm", None)
    builder.join(ends[kinds[-1]][1], norm, 1)
    builder.head(norm)
    return Graph(builder.axes, builder.operators, tuple(builder.edges), config.tied_embeddings)


def layer_of(name: str) -> str:
    """An operator's name within its layer: "self_attn.q_proj" of "layers.0.self_attn.q_proj"."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


class _Builder:
    """Adds operators one by one; a tensor is known by the name of the operator that makes it."""

    def __init__(self, config: DecoderConfig, rows: int, length: int) -> None:
        self.config, self.length, self.tokens = config, length, rows * length
        self.operators: dict[str, Operator] = {}
        self.edges: list[Edge] = []
        heads, keys, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.axes = {
            "rows": Axis(rows, rows),
            "sequence": Axis(length, length),
            "keys": Axis(length, 1),
            "hidden": Axis(config.hidden_size, config.hidden_size),
            "heads": Axis(heads * dim, heads),
            "kv_heads": Axis(keys * dim, keys),
            "channels": Axis(config.intermediate_size, config.intermediate_size),
            "vocabulary": Axis(config.vocab_size, config.vocab_size),
        }
        latent, spec = config.latent, config.experts
        if latent is not None:
            self.axes |= {
                "query_rank": Axis(latent.query_rank or 0, latent.query_rank or 1),
                "rank": Axis(latent.rank, latent.rank),
                "turned": Axis(latent.rope_dim, latent.rope_dim),
                "kv_heads": Axis(heads * (latent.plain_dim + latent.value_dim), heads),
                "value_heads": Axis(heads * latent.value_dim, heads),
            }
        if spec is not None:
            self.axes |= {
                "experts": Axis(spec.count, spec.count),
                # Tokens of an expert, where all get equally many.
                "routed": Axis(length * spec.per_token / spec.count, length),
                "expert_channels": Axis(spec.width, spec.width),
                "shared_channels": Axis(spec.shared_width, spec.shared_width or 1),
            }

    def add(
        self,
        name: str,
        kind: Kind,
        inputs: Mapping[str, Axes],
        output: Axes,
        weight: Axes = (),
        *,
        times: int = 1,
        keeps: tuple[str, ...] = (),
        **more: object,
    ) -> str:
        self.operators[name] = Operator(
            name,
            kind,
            tuple(inputs.values()),
            output,
            weight,
            frozenset(keeps),
            times=times,
            **more,  # type: ignore[arg-type]
        )
        for operand, producer in enumerate(inputs):
            if producer in self.operators:
                self.edges.append(Edge(producer, name, operand, times))
        return name

    def join(self, producer: str, consumer: str, times: int) -> None:
        """The tensor of `producer` as the first input of what was built before it was known."""
        self.edges.append(Edge(producer, consumer, 0, times))

    def norm(self, name: str, of: str | None, times: int = 1) -> str:
        inputs = {of or "the stream": STREAM}
        keeps = ("hidden",)
        return self.add(name, "elements", inputs, STREAM, ("hidden",), times=times, keeps=keeps)

    def block(self, layer: int, times: int) -> tuple[str, str]:
        """One layer for all of its kind; the names of its first and its last operator."""
        prefix, norms = f"layers.{layer}", self.config.norms
        stream = self.add(f"{prefix}.stream", "share", {"before": STREAM}, STREAM, times=times)
        first = stream
        sparse = self.config.is_sparse(layer)
        halves = (("self_attn", self.attention), ("mlp", self.sparse if sparse else self.network))
        for part, branch in halves:
            name, x = f"{prefix}.{part}", stream
            if norms != "post":
                x = self.norm(f"{name}.norm", x, times)
            x = self.add(f"{name}.input", "share", {x: STREAM}, STREAM, times=times)
            x = branch(name, x, times, layer)
            if norms != "pre":
                x = self.norm(f"{name}.norm_after", x, times)
            both = {stream: STREAM, x: STREAM}
            added = self.add(f"{name}.add", "elements", both, STREAM, times=times, linear=2)
            stream = added
            if part == "self_attn":
                stream = self.add(f"{prefix}.middle", "share", {added: STREAM}, STREAM, times=times)
        return first, stream

    def product(
        self, name: str, of: str, before: Axes, axis: str, inner: str, times: int, lead: Axes = ()
    ) -> str:
        """A matrix product that makes `axis` of `inner`, one for each of the axes `lead`."""
        output = (*before[:-1], axis)
        return self.add(name, "product", {of: before}, output, (*lead, axis, inner), times=times)

    def attention(self, name: str, x: str, times: int, layer: int) -> str:
        config, latent = self.config, self.config.latent
        queries, keys = (*TOKENS, "heads"), ("rows", "keys", "kv_heads")
        alias = {"heads": ("kv_heads", "value_heads")}
        seen = visible_keys(self.length, config.layer_windows[layer])
        scores = Scores(seen, self.length, config.head_dim, config.head_dim)
        if latent is None:
            q = self.product(f"{name}.q_proj", x, STREAM, "heads", "hidden", times)
            k = self.product(f"{name}.k_proj", x, STREAM, "kv_heads", "hidden", times)
            v = self.product(f"{name}.v_proj", x, STREAM, "kv_heads", "hidden", times)
            inputs, made = {q: queries, k: keys, v: keys}, "heads"
        else:
            scores = scores._replace(value_width=latent.value_dim)
            q, inner = x, "hidden"
            if latent.query_rank is not None:
                q = self.product(f"{name}.q_a_proj", x, STREAM, "query_rank", "hidden", times)
                inner = "query_rank"
            queries_name = "q_proj" if latent.query_rank is None else "q_b_proj"
            q = self.product(f"{name}.{queries_name}", q, (*TOKENS, inner), "heads", inner, times)
            # One matrix makes the latent vector and the channels that turn with the position.
            joint = self.product(f"{name}.kv_a_proj", x, STREAM, "rank", "hidden", times)
            turned = self.product(f"{name}.kv_a_proj.turned", x, STREAM, "turned", "hidden", times)
            kv = self.product(
                f"{name}.kv_b_proj", joint, (*TOKENS, "rank"), "kv_heads", "rank", times
            )
            inputs = {q: queries, kv: keys, turned: (*keys[:-1], "turned")}
            made = "value_heads"
        output = (*TOKENS, made)
        mixed = self.add(
            f"{name}.attention", "attention", inputs, output, times=times, alias=alias,
            scores=scores, keeps=("kv_heads", "value_heads", "turned"),
        )  # fmt: skip
        return self.product(f"{name}.o_proj", mixed, output, "hidden", made, times)

    def network(self, name: str, x: str, times: int, layer: int) -> str:
        return self.gated(name, x, STREAM, "channels", times)

    def gated(
        self, name: str, x: str, before: Axes, width: str, times: int, lead: Axes = ()
    ) -> str:
        inner = (*before[:-1], width)
        up = self.product(f"{name}.up_proj", x, before, width, "hidden", times, lead)
        inputs = {up: inner}
        if self.config.gated:
            gate = self.product(f"{name}.gate_proj", x, before, width, "hidden", times, lead)
            inputs = {gate: inner, up: inner}
        made = self.add(f"{name}.activation", "elements", inputs, inner, times=times)
        return self.product(f"{name}.down_proj", made, inner, "hidden", width, times, lead)

    def sparse(self, name: str, x: str, times: int, layer: int) -> str:
        """Router, the way to the experts, the experts, and the way back."""
        spec = self.config.experts
        assert spec is not None
        picked, sent = (*TOKENS, "experts"), ("experts", "rows", "routed", "hidden")
        router = self.add(
            f"{name}.gate", "product", {x: STREAM}, picked, ("experts", "hidden"), times=times,
            keeps=("experts",),
        )  # fmt: skip
        picks = self.add(f"{name}.picks", "share", {router: picked}, picked, times=times)
        alias = {"sequence": ("routed",)}
        there = self.add(
            f"{name}.dispatch", "elements", {x: STREAM, picks: picked}, sent, times=times,
            alias=alias, keeps=("routed",),
        )  # fmt: skip
        there = self.add(f"{name}.experts.input", "share", {there: sent}, sent, times=times)
        made = self.gated(f"{name}.experts", there, sent, "expert_channels", times, ("experts",))
        back = self.add(
            f"{name}.combine", "elements", {made: sent, picks: picked}, STREAM, times=times,
            alias=alias, keeps=("routed",), linear=1,
        )  # fmt: skip
        if not spec.shared_width:
            return back
        shared = self.gated(f"{name}.shared_experts", x, STREAM, "shared_channels", times)
        both = {back: STREAM, shared: STREAM}
        return self.add(f"{name}.sum", "elements", both, STREAM, times=times, linear=2)

    def head(self, norm: str) -> None:
        if self.config.scores:
            return
        logits = self.product("lm_head", norm, STREAM, "vocabulary", "hidden", 1)
        # Three numbers a token in fp32: the largest logit, the sum of all, and the target's.
        reduces = {"vocabulary": 3 * 4.0 * self.tokens}
        self.add("loss", "loss", {logits: (*TOKENS, "vocabulary")}, (), reduces=reduces)

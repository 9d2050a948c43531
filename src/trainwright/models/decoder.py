"""The decoder: one model for every family, with Hugging Face's parameter names.

Token ids go in; logits come out, or whatever a head function makes of the last hidden states.
What sets families apart is in `DecoderConfig`; see `models.families`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainwright.kernels.attention import Mask, attention_mask
from trainwright.kernels.dropout import dropout, layer_keys, uniform_noise
from trainwright.models.adapted import dropping
from trainwright.models.attention import Attention
from trainwright.models.cache import KeyValueCache, LayerCache, visible
from trainwright.models.families import DecoderConfig
from trainwright.models.latent_attention import LatentAttention
from trainwright.models.mlp import GatedMLP
from trainwright.models.moe import SparseMLP
from trainwright.models.norm import RMSNorm
from trainwright.models.output_head import HeadFunction, OutputHead
from trainwright.models.pieces import Piece
from trainwright.models.rope import Rope, document_lengths
from trainwright.models.rope_spec import RopeSpec
from trainwright.models.whole_copies import head_weight


@dataclass(frozen=True)
class Span:
    """Which part of a decoder an object has: one stage of a pipeline, or all of it."""

    first: int  # its layers are first … last - 1
    last: int
    embeds: bool = True
    heads: bool = True


class Context(Protocol):
    """Rows cut into columns over workers; see `parallel.context`."""

    workers: int

    def slots(self, sequence: int, device: torch.device) -> Tensor:
        """This worker's columns of a row, in the order in which it has them."""

    def mask(
        self,
        segments: Tensor | None,
        *,
        sequence: int,
        window: int | None,
        softcap: float | None,
        device: torch.device,
    ) -> Any:
        """What every layer's `attend` is given as its mask; segments are whole rows'."""


class StreamCut(Protocol):
    """The stream cut over workers between the blocks; see `parallel.tensor`."""

    sequence: bool  # whether it is cut along the sequence, as in training

    group: dist.ProcessGroup | None

    def enter(self, stream: Tensor) -> Tensor:
        """The stream, whole along the sequence."""

    def own(self, tokens: Tensor) -> Tensor:
        """This worker's part of what there is for each token [batch, sequence, …]."""


class Queries(Protocol):
    """Attention of a worker's own part of such a stream; see `parallel.own_queries`."""

    def own(self, table: Tensor, rows: int) -> Tensor:
        """This worker's part of what [rows or 1, sequence, …] has for every token."""

    def mask(
        self,
        segments: Tensor | None,
        *,
        rows: int,
        sequence: int,
        window: int | None,
        softcap: float | None,
        device: torch.device,
    ) -> Any:
        """What every layer's `attend` is given as its mask; segments are whole rows'."""


# Where a block normalises, by Hugging Face's names: before and after attention, before and after
# the feed-forward network. `post_attention_layernorm` stands before the latter in "pre".
NORMS: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each added to the stream."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        latent = config.latent is not None
        self.self_attn = LatentAttention(config) if latent else Attention(config, layer)
        self.mlp = SparseMLP(config) if config.is_sparse(layer) else GatedMLP(config)
        self.places = NORMS[config.norms]
        for name in filter(None, self.places):
            norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)
            self.add_module(name, norm)
        self.multiplier = config.residual_multiplier
        self.dropout = 0.0
        self.adapter_dropout = False  # whether adapters drop some of their inputs

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask | None = None,
        cache: LayerCache | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """The stream [batch, sequence, hidden] in and out; the rest as in `Attention.forward`.

        keys [batch, sequence] are the tokens' in this layer, for `dropout` of both branches.
        """
        if self.adapter_dropout:
            with dropping(keys):
                return self._forward(hidden, cos, sin, mask, cache, keys)
        return self._forward(hidden, cos, sin, mask, cache, keys)

    def _forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask | None,
        cache: LayerCache | None,
        keys: Tensor | None,
    ) -> Tensor:
        mixed = self.self_attn(self.normed(0, hidden), cos, sin, mask, cache)
        hidden = self.added(hidden, self.dropped(0, self.normed(1, mixed), keys))
        mixed = self.mlp(self.normed(2, hidden))
        return self.added(hidden, self.dropped(1, self.normed(3, mixed), keys))

    def normed(self, place: int, x: Tensor) -> Tensor:
        name = self.places[place]
        return x if name is None else getattr(self, name)(x)

    def dropped(self, place: int, branch: Tensor, keys: Tensor | None) -> Tensor:
        return branch if keys is None else dropout(branch, keys, place, self.dropout)

    def added(self, stream: Tensor, branch: Tensor) -> Tensor:
        return stream + (branch if self.multiplier == 1.0 else branch * self.multiplier)


class Trunk(nn.Module):
    """Everything but the output head; its parameters' names begin with `model.`."""

    def __init__(self, config: DecoderConfig, span: Span) -> None:
        super().__init__()
        self.config, self.span = config, span
        if span.embeds or (span.heads and config.tied_embeddings):
            self.embed_tokens = nn.Embedding(
                config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
            )
        self.layers = nn.ModuleDict(
            {str(layer): Block(config, layer) for layer in range(span.first, span.last)}
        )
        if span.heads:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)
        self.ropes = {spec: Rope(spec) for spec in config.layer_ropes if spec is not None}
        self.context: Context | None = None  # rows cut over workers, set by parallel.context
        self.stream: StreamCut | None = None  # the stream cut over workers, by parallel.tensor
        self.own_queries: Queries | None = None  # where such a cut leaves attention whole
        self.dropout = 0.0
        self.adapter_dropout = False
        self.noise = 0.0  # NEFTune's alpha

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        segment_ids: Tensor | None,
        cache: KeyValueCache | None,
        hidden: Tensor | None = None,
        token_keys: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states, or the stream after the last layer that is here."""
        config, device = self.config, input_ids.device
        context = self.context if cache is None else None
        queries = self.own_queries if cache is None else None
        if self.stream is not None:
            self.stream.sequence = cache is None
        past = cache.length if cache is not None else 0
        tokens = input_ids.shape[1] * (context.workers if context is not None else 1)
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=device).unsqueeze(0)
        if token_keys is not None and self.stream is not None:
            token_keys = self.stream.own(token_keys)
        if hidden is None:
            hidden = self.embed(input_ids)
            if token_keys is not None and self.noise:
                # Jain et al. 2023, "NEFTune" (arXiv:2310.05914).
                size = self.noise / math.sqrt(tokens * config.hidden_size)
                noise = uniform_noise(token_keys, 1, config.hidden_size)
                hidden = hidden + (size * noise).to(hidden.dtype)
            if token_keys is not None:
                hidden = dropout(hidden, token_keys, 0, self.dropout)
        if not (self.dropout or self.adapter_dropout):
            token_keys = None
        tables = self.rotary_tables(position_ids, segment_ids, hidden.dtype)
        if cache is not None:
            segment_ids = cache.extend(tokens, segment_ids)
        masks = {}
        for window in {config.layer_windows[layer] for layer in map(int, self.layers)}:
            if context is not None:
                masks[window] = context.mask(
                    segment_ids,
                    sequence=tokens,
                    window=window,
                    softcap=config.attention_softcap,
                    device=device,
                )
                continue
            if queries is not None:
                masks[window] = queries.mask(
                    segment_ids,
                    rows=input_ids.shape[0],
                    sequence=tokens,
                    window=window,
                    softcap=config.attention_softcap,
                    device=device,
                )
                continue
            keys = visible(past + tokens, tokens, window)
            masks[window] = attention_mask(
                None if segment_ids is None else segment_ids[:, -keys:],
                queries=tokens,
                keys=keys,
                window=window,
                softcap=config.attention_softcap,
                device=device,
            )
        if context is not None:
            slots = context.slots(tokens, device)
            tables = {spec: (cos[:, slots], sin[:, slots]) for spec, (cos, sin) in tables.items()}
        if queries is not None:
            rows = input_ids.shape[0]
            tables = {
                spec: (queries.own(cos, rows), queries.own(sin, rows))
                for spec, (cos, sin) in tables.items()
            }
        for name, block in self.layers.items():
            layer = int(name)
            cos, sin = tables[config.layer_ropes[layer]]
            mask = masks[config.layer_windows[layer]]
            held = None if cache is None else cache.layers[layer]
            own_keys = None if token_keys is None else layer_keys(token_keys, layer)
            hidden = block(hidden, cos, sin, mask, held, own_keys)
        if not self.span.heads:
            return hidden
        hidden = self.norm(hidden)
        return hidden if self.stream is None else self.stream.enter(hidden)

    def rotary_tables(
        self, positions: Tensor, segments: Tensor | None, dtype: torch.dtype
    ) -> dict[RopeSpec | None, tuple[Tensor, Tensor]]:
        """cos and sin for each kind of layer; all layers of a kind share them."""
        lengths = document_lengths(positions, segments) if self.config.depends_on_length else None
        none = positions.new_empty(1, positions.shape[1], 0, dtype=dtype)
        tables: dict[RopeSpec | None, tuple[Tensor, Tensor]] = {None: (none, none)}
        for spec, rope in self.ropes.items():
            tables[spec] = rope.tables(positions, lengths, dtype)
        return tables

    def embed(self, input_ids: Tensor) -> Tensor:
        """The stream's first value, in the type that products run in."""
        hidden, scale = self.embed_tokens(input_ids), self.config.embedding_multiplier
        if scale != 1.0:
            # Rounded to the stream's type first, as the families that scale were trained.
            hidden = hidden * torch.full((), scale, dtype=hidden.dtype, device=hidden.device)
        kind = hidden.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        return hidden


class Decoder(nn.Module):
    """A causal language model, or a reward model where the config `scores`.

    Build it with `models.weights.new_model` or `load_model`.
    """

    # Generation may put padding before a row's tokens.
    pads_left = True
    # Rotary positions have no end: past the context that it was trained on a model gets worse.
    max_positions: int | None = None

    def __init__(self, config: DecoderConfig, span: Span | None = None) -> None:
        super().__init__()
        self.config = config
        self.span = span or Span(0, config.num_layers)
        self.vocab_size = config.vocab_size
        self.stop_token_ids: tuple[int, ...] = ()  # tokens that end a text
        self.pieces: dict[str, Piece] = {}  # parameters that are parts of larger ones, by name
        self.model = Trunk(config, self.span)
        # Tied models have no second matrix, nor a second name for the first.
        if self.span.heads and config.scores:
            self.score = nn.Linear(config.hidden_size, 1, bias=False)
        elif self.span.heads and not config.tied_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers, each to be recomputed, compiled and sharded by itself."""
        return list(self.model.layers.values())

    @property
    def refill_lengths(self) -> frozenset[int]:
        """Lengths past which all of a text is turned by other angles, so that a cache is void."""
        ropes = filter(None, self.config.layer_ropes)
        return frozenset(r.original_max_positions for r in ropes if r.kind == "longrope")

    def set_dropout(self, probability: float) -> None:
        """The share of the embedding's and each branch's outputs that training sets to zero.

        It happens where a forward pass is given `token_keys`.
        """
        self.model.dropout = probability
        for block in self.model.layers.values():
            block.dropout = probability  # type: ignore[assignment]

    def drop_adapter_inputs(self) -> None:
        """Let adapters drop some of their inputs, where a forward pass is given `token_keys`."""
        self.model.adapter_dropout = True
        for block in self.model.layers.values():
            block.adapter_dropout = True  # type: ignore[assignment]

    def set_embedding_noise(self, alpha: float) -> None:
        """NEFTune: uniform noise of at most alpha / √(row length · hidden) on the embeddings.

        It is there where a forward pass is given `token_keys`.
        """
        self.model.noise = alpha

    def new_cache(self, capacity: int = 256) -> KeyValueCache:
        """An empty key-value cache with room for `capacity` tokens a row."""
        return KeyValueCache(self.config, capacity)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        head: HeadFunction | None = None,
        hidden: Tensor | None = None,
        token_keys: Tensor | None = None,
    ) -> Any:
        """Logits [batch, sequence, vocabulary] in fp32, or what `head` returns.

        A reward model gives scores [batch, sequence] instead.

        input_ids [batch, sequence]. position_ids, of that shape, default to counting on from the
        cache. segment_ids, of that shape, number each row's documents: a token attends to earlier
        tokens of its own segment only; -1 is padding; None means one unpadded document a row,
        which is faster. `head` is called as `head(hidden [batch, sequence, hidden], OutputHead)`
        while a sharded head is whole. token_keys [batch, sequence] decide what `set_dropout` drops
        (`kernels.dropout`); without them nothing is dropped.

        A stage of a pipeline that does not embed is given the stream before it as `hidden`, and
        one that has no head returns the stream. Where rows are cut over workers, input_ids and
        token_keys are this worker's columns, position_ids and segment_ids whole rows.
        """
        hidden = self.model(input_ids, position_ids, segment_ids, cache, hidden, token_keys)
        if not self.span.heads:
            return hidden
        group = None if self.model.stream is None else self.model.stream.group
        if self.config.scores:
            output_head = OutputHead(head_weight(self.score), group=group)
            return output_head.scores(hidden) if head is None else head(hidden, output_head)
        matrix = self.model.embed_tokens if self.config.tied_embeddings else self.lm_head
        output_head = OutputHead(
            head_weight(matrix),
            None,
            self.config.logit_multiplier,
            self.config.logit_softcap,
            group,
        )
        return output_head.logits(hidden) if head is None else head(hidden, output_head)

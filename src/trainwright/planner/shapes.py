"""Parameters and FLOPs of a decoder, counted from its shape alone.

The only place that counts them: MFU, the plan and the report all come here.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainwright.models.families import DecoderConfig


@dataclass(frozen=True)
class Parameters:
    """Unique parameters by place; tied embeddings are counted once, under `embedding`."""

    embedding: int
    block: int  # one decoder block
    layers: int
    final_norm: int
    head: int  # 0 where it is the embedding

    @property
    def blocks(self) -> int:
        return self.block * self.layers

    @property
    def total(self) -> int:
        return self.embedding + self.blocks + self.final_norm + self.head


def count_parameters(config: DecoderConfig) -> Parameters:
    """Unique parameters of the decoder that `config` describes, by place."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries, key_values = _widths(config)

    attention = hidden * (queries + 2 * key_values) + queries * hidden
    attention += (queries + 2 * key_values) * config.qkv_bias + hidden * config.output_bias
    if config.qk_norm == "head":
        attention += 2 * config.head_dim
    elif config.qk_norm == "projection":
        attention += queries + key_values
    mlp = 3 * hidden * ffn + (2 * ffn + hidden) * config.mlp_bias
    norms = {"pre": 2, "post": 2, "both": 4}[config.norms] * hidden

    embedding = config.vocab_size * hidden
    return Parameters(
        embedding=embedding,
        block=attention + mlp + norms,
        layers=config.num_layers,
        final_norm=hidden,
        head=0 if config.tied_embeddings else embedding,
    )


def parameter_count(config: DecoderConfig) -> int:
    """Unique parameters of the decoder; tied embeddings are counted once."""
    return count_parameters(config).total


def flops_per_token(config: DecoderConfig, sequence_length: int) -> float:
    """Model FLOPs of the forward pass, a token, in rows of `sequence_length`. Training is 3×.

    Matrix products only, a multiplication and an addition counting two. Causal attention counts
    half of the square, a window w of s tokens w·(1 − w/2s) keys a token, the head once, and the
    embedding's look-up nothing. Recomputed activations are not model FLOPs.
    """
    hidden = config.hidden_size
    queries, key_values = _widths(config)
    projections = 2 * hidden * (queries + 2 * key_values) + 2 * queries * hidden
    mlp = 6 * hidden * config.intermediate_size
    matrices = config.num_layers * (projections + mlp)
    # Scores and weighted values: two products of a head's width with every visible key.
    attention = sum(
        4 * queries * visible_keys(sequence_length, window) for window in config.layer_windows
    )
    head = 2 * hidden * config.vocab_size
    return float(matrices + attention + head)


def visible_keys(sequence_length: int, window: int | None) -> float:
    """Keys that a token sees on average: half the row, fewer where a window is shorter."""
    width = min(sequence_length, window or sequence_length)
    return width * (1 - width / (2 * sequence_length))


def _widths(config: DecoderConfig) -> tuple[int, int]:
    """Total width of the query heads and of the key (or value) heads."""
    return config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

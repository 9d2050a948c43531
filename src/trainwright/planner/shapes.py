"""Parameters and FLOPs of a decoder, counted from its shape alone.

The only place that counts them: MFU, the plan and the report all come here.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainwright.models.families import DecoderConfig
from trainwright.models.sparse_spec import LatentSpec


@dataclass(frozen=True)
class BlockParameters:
    """Parameters of one decoder block by place."""

    attention: int
    network: int  # the plain feed-forward network, or shared experts and their gate
    router: int
    experts: int  # all routed experts together
    norms: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.attention + self.network + self.router + self.experts + self.norms


@dataclass(frozen=True)
class Parameters:
    """Unique parameters by place; tied embeddings are counted once, under `embedding`."""

    embedding: int
    by_layer: tuple[BlockParameters, ...]
    final_norm: int
    head: int  # 0 where it is the embedding
    active_share: float = 1.0  # of the routed experts, for one token

    @property
    def layers(self) -> int:
        """Decoder blocks."""
        return len(self.by_layer)

    @property
    def block(self) -> int:
        """The largest decoder block."""
        return max(layer.total for layer in self.by_layer)

    @property
    def blocks(self) -> int:
        """All decoder blocks."""
        return sum(layer.total for layer in self.by_layer)

    @property
    def experts(self) -> int:
        """The routed experts of all layers."""
        return sum(layer.experts for layer in self.by_layer)

    @property
    def total(self) -> int:
        """The whole model."""
        return self.embedding + self.blocks + self.final_norm + self.head

    @property
    def active(self) -> int:
        """What one token passes through: all but the experts that it is not sent to."""
        return self.total - round(self.experts * (1 - self.active_share))


def count_parameters(config: DecoderConfig) -> Parameters:
    """Unique parameters of the decoder that `config` describes, by place."""
    embedding, experts = config.vocab_size * config.hidden_size, config.experts
    return Parameters(
        embedding=embedding,
        by_layer=tuple(block_parameters(config, layer) for layer in range(config.num_layers)),
        final_norm=config.hidden_size,
        head=0 if config.tied_embeddings else config.hidden_size * head_outputs(config),
        active_share=1.0 if experts is None else experts.per_token / experts.count,
    )


def head_outputs(config: DecoderConfig) -> int:
    """What the output head makes of a token: logits over the vocabulary, or one score."""
    return 1 if config.scores else config.vocab_size


def block_parameters(config: DecoderConfig, layer: int) -> BlockParameters:
    """Parameters of one layer."""
    hidden, experts = config.hidden_size, config.experts
    inward = 1 + config.gated  # matrices that lead into the network; one leads out of it
    network, router, routed = (inward + 1) * hidden * config.intermediate_size, 0, 0
    network += (inward * config.intermediate_size + hidden) * config.mlp_bias
    if experts is not None and config.is_sparse(layer):
        network = 3 * hidden * experts.shared_width + hidden * experts.shared_gate
        router = experts.count * hidden
        routed = 3 * hidden * experts.width * experts.count
    norms = {"pre": 2, "post": 2, "both": 4}[config.norms] * hidden
    return BlockParameters(_attention_parameters(config), network, router, routed, norms)


def _attention_parameters(config: DecoderConfig) -> int:
    hidden = config.hidden_size
    queries, key_values = _widths(config)
    latent = config.latent
    if latent is not None:
        shared = latent.rank + latent.rope_dim
        count = _latent_products(config, latent) + latent.rank + shared * config.qkv_bias
        if latent.query_rank is not None:
            count += latent.query_rank * (1 + config.qkv_bias)
        return count + hidden * config.output_bias
    count = hidden * (queries + 2 * key_values) + queries * hidden
    count += (queries + 2 * key_values) * config.qkv_bias + hidden * config.output_bias
    if config.qk_norm == "head":
        count += 2 * config.head_dim
    elif config.qk_norm == "projection":
        count += queries + key_values
    return count


def _latent_products(config: DecoderConfig, latent: LatentSpec) -> int:
    """Elements of the matrices of latent attention."""
    hidden, heads = config.hidden_size, config.num_heads
    queries = heads * config.head_dim
    count = hidden * queries
    if latent.query_rank is not None:
        count = latent.query_rank * (hidden + queries)
    count += hidden * (latent.rank + latent.rope_dim)
    count += latent.rank * heads * (latent.plain_dim + latent.value_dim)
    return count + heads * latent.value_dim * hidden


def parameter_count(config: DecoderConfig) -> int:
    """Unique parameters of the decoder; tied embeddings are counted once."""
    return count_parameters(config).total


def flops_per_token(config: DecoderConfig, sequence_length: int) -> float:
    """Model FLOPs of the forward pass, a token, in rows of `sequence_length`. Training is 3×.

    Matrix products only, a multiplication and an addition counting two. Causal attention counts
    half of the square, a window w of s tokens w·(1 − w/2s) keys a token, the head once, and the
    embedding's look-up nothing; of a mixture of experts, those that a token goes to. Recomputed
    activations are not model FLOPs.
    """
    hidden, heads, latent = config.hidden_size, config.num_heads, config.latent
    queries, key_values = _widths(config)
    products = hidden * (queries + 2 * key_values) + queries * hidden
    # A head's width where scores are made, and where values are weighted.
    widths = 2 * config.head_dim
    if latent is not None:
        products = _latent_products(config, latent)
        widths = config.head_dim + latent.value_dim
    networks = sum(_network_flops(config, layer) for layer in range(config.num_layers))
    matrices = config.num_layers * 2 * products + networks
    attention = sum(
        2 * heads * widths * visible_keys(sequence_length, window)
        for window in config.layer_windows
    )
    head = 2 * hidden * head_outputs(config)
    return float(matrices + attention + head)


def _network_flops(config: DecoderConfig, layer: int) -> int:
    """Of a layer's feed-forward network: the experts that a token goes to, and the router."""
    hidden, experts = config.hidden_size, config.experts
    if experts is None or not config.is_sparse(layer):
        return (4 + 2 * config.gated) * hidden * config.intermediate_size
    width = experts.per_token * experts.width + experts.shared_width
    return 6 * hidden * width + 2 * hidden * (experts.count + experts.shared_gate)


def visible_keys(sequence_length: int, window: int | None) -> float:
    """Keys that a token sees on average: half the row, fewer where a window is shorter."""
    width = min(sequence_length, window or sequence_length)
    return width * (1 - width / (2 * sequence_length))


def _widths(config: DecoderConfig) -> tuple[int, int]:
    """Total width of the query heads and of the key (or value) heads."""
    return config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

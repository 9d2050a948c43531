"""Families of decoders: what a Hugging Face config says, as one plain description.

`decoder_config` turns a config.json into the `DecoderConfig` that decoder, planner and exporter
read. A family is a row of `FAMILIES`: data, not code. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainwright.errors import Mistake, UserError
from trainwright.models.config_values import NULLABLE, value_kind
from trainwright.models.family_specs import (
    COMMON,
    FAMILIES,
    INERT,
    NO_TOKENS,
    SIZES,
    Norms,
    turns,
)
from trainwright.models.rope_spec import RopeSpec, read_rope
from trainwright.models.scoring import gives_scores, label_count
from trainwright.models.sparse_spec import (
    ExpertsSpec,
    LatentSpec,
    latent_scale,
    read_experts,
    read_latent,
)

FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu")


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder in full: what every family comes down to.

    Per-layer tuples have `num_layers` entries. A window of w lets a token see itself and the w - 1
    tokens before it; None sees the whole document. A layer without rope has None.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of a query; of keys and values too, unless attention is `latent`
    max_positions: int
    scores: bool  # one score a token instead of logits, from a head that nothing is tied to
    tied_embeddings: bool
    layer_windows: tuple[int | None, ...]
    layer_ropes: tuple[RopeSpec | None, ...]
    norms: Norms  # RMS norms before each half of a block, after it, or both
    norm_offset: float  # added to a norm's stored weight: 1 where zero means "as it is"
    norm_eps: float
    qk_norm: Literal["head", "projection"] | None  # over each head, or the whole projection
    activation: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    fused_projections: bool  # one matrix for q, k, v and one for gate and up
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    logit_multiplier: float
    embedding_multiplier: float
    residual_multiplier: float
    initializer_range: float
    pad_token_id: int | None
    experts: ExpertsSpec | None  # in the layers that it names
    latent: LatentSpec | None  # attention through latent vectors, in all layers
    hf: Mapping[str, Any] = field(compare=False, repr=False)
    gated: bool = True  # False: no gate; only costs of others' models are counted with it

    @property
    def depends_on_length(self) -> bool:
        """Whether any layer's rotary frequencies change with the length of a document."""
        return any(rope is not None and rope.depends_on_length for rope in self.layer_ropes)

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer's feed-forward network is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]


def decoder_config(hf_config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face config.json describes.

    Dropout keys are read past: what is dropped is the recipe's to say (`training.dropout`), and
    dropout of attention's weights is not offered, since no fused kernel has a mask that does not
    depend on the layout. Raises UserError with every mistake found, each with its key
    ("model.config.hidden_size").
    """
    name = hf_config.get("model_type")
    if name not in FAMILIES:
        raise UserError(Mistake(f"unknown model family {name!r}", _nearest_family(name)))
    return _Reader(name, hf_config).read()


def new_hf_config(family: str, config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The whole config.json of a new model of `family`: `config`'s keys over the family's defaults.

    Every head gets keys and values of its own unless `num_key_value_heads` says otherwise. Raises
    UserError for an unknown family, sizes left out, keys that the family does not have, and
    whatever `decoder_config` refuses.
    """
    if family not in FAMILIES:
        what = f"unknown model family {family!r}"
        raise UserError(Mistake(what, _nearest_family(family), "model.family"))
    spec = FAMILIES[family]
    known = {**dict.fromkeys(SIZES), **COMMON, **spec.defaults}
    if "hidden_activation" in known:
        del known["hidden_act"]
    config = {key: value for key, value in config.items() if key not in INERT}
    mistakes = []
    for key in (key for key in config if key not in known):
        near = difflib.get_close_matches(key, known, n=1)
        fix = f"write {near[0]!r}" if near else f"remove it, or use one of: {', '.join(known)}"
        mistakes.append(Mistake(f"{family} has no such key", fix, f"model.config.{key}"))
    if config.get("vocab_size", vocab_size) != vocab_size:
        what = f"is {config['vocab_size']}, but the tokenizer has {vocab_size} entries"
        mistakes.append(Mistake(what, "leave it out", "model.config.vocab_size"))

    hf = {**known, **NO_TOKENS, **config, "vocab_size": vocab_size}
    if config.get("num_key_value_heads") is None:
        hf["num_key_value_heads"] = config.get("num_attention_heads")
    # What is not set is left out, since transformers takes a null head_dim at its word. Tokens are
    # the exception: left out, they would be those of the family's own tokenizer.
    keep = config.keys() | NO_TOKENS.keys()
    hf = {key: value for key, value in hf.items() if value is not None or key in keep}
    hf = {"architectures": [spec.architecture], "model_type": family, **hf}
    try:
        decoder_config(hf)
    except UserError as error:
        mistakes += error.mistakes
    if mistakes:
        raise UserError(mistakes)
    return hf


def _nearest_family(name: object) -> str:
    near = difflib.get_close_matches(str(name), FAMILIES, n=1)
    return f"did you mean {near[0]!r}?" if near else f"one of {', '.join(FAMILIES)}"


class _Reader:
    """Reads one config, gathering every mistake before it gives up."""

    def __init__(self, name: str, hf: Mapping[str, Any]) -> None:
        self.name, self.family, self.hf, self.given = name, FAMILIES[name], dict(hf), hf
        for key, other in self.family.other_names.items():
            if self.hf.get(key) is None and other in hf:
                self.hf[key] = hf[other]
        for key, value in self.family.nothing.items():
            if key in hf and hf[key] is not False and hf[key] == value:
                self.hf[key] = None
        self.defaults = {**COMMON, **self.family.defaults}
        self.mistakes: list[Mistake] = []
        self.values = self.typed_values()

    def typed_values(self) -> dict[str, Any]:
        """Every key's value, or its default (1 for a size) where the value cannot be used."""
        values: dict[str, Any] = {}
        for key, default in {**dict.fromkeys(SIZES, 1), **self.defaults}.items():
            value, kind = self.hf.get(key, default), value_kind(key, default)
            if key in SIZES and self.hf.get(key) is None:
                self.refuse(key, "is missing", kind.name)
                value = default
            elif value is None and key not in NULLABLE:
                value = default
            elif value is not None and not kind.fits(value):
                self.refuse(key, f"is {value!r}", kind.name)
                value = default
            values[key] = value
        return values

    def get(self, key: str, otherwise: Any = None) -> Any:
        """The config's value, the family's default, or `otherwise` where the family lacks it."""
        return self.values.get(key, otherwise)

    def refuse(self, key: str, what: str, fix: str = "") -> None:
        self.mistakes.append(Mistake(what, fix, f"model.config.{key}"))

    def sound(self, *keys: str) -> bool:
        """Whether none of `keys` has a mistake yet, so that no mistake is told twice."""
        wrong = {mistake.key for mistake in self.mistakes}
        return wrong.isdisjoint(f"model.config.{key}" for key in keys)

    def number(self, key: str, otherwise: float = 1.0) -> float:
        """The value of `key` where the family has it and it is not null, else `otherwise`."""
        value = self.get(key)
        return otherwise if value is None else float(value)

    def cap(self, key: str) -> float | None:
        return self.number(key) if self.get(key) is not None else None

    def read(self) -> DecoderConfig:
        family, hidden, heads = (
            self.family,
            self.get("hidden_size"),
            self.get("num_attention_heads"),
        )
        layers, vocab_size = self.get("num_hidden_layers"), self.get("vocab_size")
        kv_heads = self.get("num_key_value_heads") or heads
        if heads % kv_heads and self.sound("num_attention_heads", "num_key_value_heads"):
            self.refuse(
                "num_key_value_heads",
                f"is {kv_heads}, which does not divide the {heads} attention heads",
                f"one of {_divisors(heads)}",
            )
        latent = read_latent(self.get, self.refuse) if family.latent else None
        if latent is not None and kv_heads != heads:
            what = f"is {kv_heads}, but every head of latent attention has keys of its own"
            self.refuse("num_key_value_heads", what, f"{heads}, or leave it out")
        if latent is None:
            head_dim = self.get("head_dim") or max(hidden // heads, 1)
            must_divide = family.heads_divide_hidden or not self.get("head_dim")
        else:
            head_dim, must_divide = latent.plain_dim + latent.rope_dim, False
        if hidden % heads and must_divide and self.sound("num_attention_heads", "hidden_size"):
            self.refuse(
                "num_attention_heads",
                f"is {heads}, which does not divide hidden_size {hidden}",
                f"one of {_divisors(hidden)}",
            )
        activation = self.get("hidden_activation") or self.get("hidden_act")
        if activation not in ACTIVATIONS:
            self.refuse("hidden_act", f"is {activation!r}", f"one of {', '.join(ACTIVATIONS)}")
        if self.get("use_bidirectional_attention"):
            self.refuse("use_bidirectional_attention", "is true", "false: decoders are causal")
        pad = self.get("pad_token_id")
        if pad is not None and not -vocab_size <= pad < vocab_size and self.sound("vocab_size"):
            fix = f"a number below {vocab_size}, or null"
            self.refuse("pad_token_id", f"is {pad}, outside the vocabulary of {vocab_size}", fix)

        if self.get("clip_qkv") is not None:
            self.refuse("clip_qkv", f"is {self.get('clip_qkv')}", "null: nothing is clipped here")

        scores = gives_scores(self.hf)
        if scores and label_count(self.hf) != 1:
            what = f"names {label_count(self.hf)} labels, but a reward model gives one score"
            self.refuse("id2label", what, "a classifier that was made with `num_labels=1`")

        slides, window = self.sliding(layers), self.get("sliding_window")
        bias = bool(self.get("attention_bias", False))
        scale = self.number("query_pre_attn_scalar", head_dim) ** -0.5
        if latent is not None:
            rope = self.get("rope_scaling") or self.get("rope_parameters") or {}
            scale = latent_scale(latent, rope)
        config = DecoderConfig(
            family=self.name,
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=self.get("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=self.get("max_position_embeddings"),
            scores=scores,
            tied_embeddings=bool(self.get("tie_word_embeddings")) and not scores,
            layer_windows=tuple(window if slide else None for slide in slides),
            layer_ropes=self.ropes(slides, latent.rope_dim if latent else head_dim),
            norms=family.norms,
            norm_offset=family.norm_offset,
            norm_eps=self.number("rms_norm_eps"),
            qk_norm=family.qk_norm,
            activation=activation,
            qkv_bias=bias or family.qkv_bias or bool(self.get("qkv_bias", False)),
            output_bias=bias,
            mlp_bias=bool(self.get("mlp_bias", False)),
            fused_projections=family.fused_projections,
            attention_scale=self.number("attention_multiplier", scale),
            attention_softcap=self.cap("attn_logit_softcapping"),
            logit_softcap=self.cap("final_logit_softcapping"),
            logit_multiplier=1 / self.number("logits_scaling"),
            embedding_multiplier=hidden**0.5
            if family.scaled_embeddings
            else self.number("embedding_multiplier"),
            residual_multiplier=self.number("residual_multiplier"),
            initializer_range=self.number("initializer_range"),
            pad_token_id=pad,
            experts=self.experts(layers),
            latent=latent,
            hf=dict(self.given),
        )
        if self.mistakes:
            raise UserError(self.mistakes)
        return config

    def experts(self, layers: int) -> ExpertsSpec | None:
        """The experts, where the family has any and the config gives them a layer."""
        sparse = self.family.sparse
        if sparse is None:
            return None
        return read_experts(sparse, self.get, layers, self.sound, self.refuse)

    def sliding(self, layers: int) -> list[bool]:
        """Which layers see a window only: by `layer_types`, or else the family's own pattern."""
        types = self.get("layer_types")
        if types is None:
            return [bool(self.family.slides(layer, self.get)) for layer in range(layers)]
        if len(types) != layers or not all(kind in (FULL, SLIDING) for kind in types):
            self.refuse("layer_types", "does not fit", f"{layers} times {FULL!r} or {SLIDING!r}")
            return [False] * layers
        slides = [kind == SLIDING for kind in types]
        if any(slides) and not self.get("use_sliding_window", True):
            fix = "true, or leave out layer_types"
            self.refuse("use_sliding_window", f"is false, but layer_types has {SLIDING!r}", fix)
        return slides

    def ropes(self, slides: list[bool], head_dim: int) -> tuple[RopeSpec | None, ...]:
        """Each layer's rotary embedding."""
        scaling, parameters = self.get("rope_scaling") or {}, self.get("rope_parameters") or {}
        if "rope_local_base_freq" in self.defaults:
            # Gemma 3 turns its windowed layers by a base of their own, and scales the others only.
            key = "rope_scaling" if scaling else f"rope_parameters.{FULL}"
            whole = self.rope(key, {**(parameters.get(FULL) or {}), **scaling}, head_dim)
            windowed = self.rope(
                f"rope_parameters.{SLIDING}",
                parameters.get(SLIDING) or {},
                head_dim,
                base="rope_local_base_freq",
            )
            return tuple(windowed if slide else whole for slide in slides)
        key = "rope_scaling" if scaling else "rope_parameters"
        rope = self.rope(key, scaling or parameters, head_dim)
        pattern = self.get("no_rope_layers")
        if pattern is not None and len(pattern) < len(slides):
            self.refuse("no_rope_layers", "is too short", f"{len(slides)} times 0 or 1")
        has_pattern = "no_rope_layers" in self.defaults
        return tuple(
            rope if not has_pattern or turns(layer, self.get) else None
            for layer in range(len(slides))
        )

    def rope(
        self, key: str, parameters: Mapping[str, Any], head_dim: int, base: str = "rope_theta"
    ) -> RopeSpec | None:
        known = self.sound("hidden_size", "num_attention_heads", "head_dim", "qk_rope_head_dim")
        # transformers takes this key for every family where a config has it, declared or not.
        original = self.hf.get("original_max_position_embeddings")
        if not value_kind("original_max_position_embeddings", 1).fits(original):
            original = self.get("original_max_position_embeddings")
        spec, mistakes = read_rope(
            parameters,
            key=f"model.config.{key}",
            head_dim=head_dim if known else None,
            max_positions=self.get("max_position_embeddings"),
            theta=self.number(base),
            partial=self.number("partial_rotary_factor"),
            original_max_positions=original,
            kinds=self.family.rope_kinds,
        )
        self.mistakes += mistakes
        return spec


def _divisors(number: int) -> str:
    """The divisors of `number` in words, the largest ones where there are many."""
    found = [n for n in range(1, number + 1) if number % n == 0]
    return ", ".join(map(str, found[-12:]))

"""What adapters a model gets, and where: low-rank updates beside frozen weights. Torch-free.

The fields are PEFT's under the field's names, and names match modules as they do there, so that an
`adapter_config.json` and an `AdapterSpec` say the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from trainwright.errors import Mistake, UserError

Number = TypeVar("Number", int, float)
Init = Literal["default", "gaussian", "pissa"]
INITS: tuple[Init, ...] = ("default", "gaussian", "pissa")
ALL_LINEAR = "all-linear"
# The adapter that is trained. Its tensors stand on the layer itself; others stand beside it.
TRAINED = "default"
BESIDE = "beside"
_OWN = re.compile(
    rf"(.*\.)?({BESIDE}\..*|(lora|start)_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector)"
)
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def is_adapter_tensor(name: str) -> bool:
    """Whether a parameter of that name is an adapter's, and so in no file of the base model."""
    return _OWN.fullmatch(name) is not None


@dataclass(frozen=True)
class LayerAdapter:
    """One adapter at one layer: y = W x + scale · B A x, with A [rank, in] and B [out, rank].

    `dropout` is the share of A's inputs that training drops. With `dora` the sum is made as long
    as a trained vector of magnitudes says, row by row. `ties` says whether an output head that
    shares an embedding's matrix follows the embedding's adapter.
    """

    rank: int
    scale: float
    dropout: float = 0.0
    dora: bool = False
    init: Init = "default"
    ties: bool = True


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter: LoRA (Hu et al. 2021, arXiv:2106.09685) and what has grown out of it.

    `targets` are the modules that get one: "all-linear" (every linear layer of the blocks; neither
    the output head nor stacked experts), one regex for whole names, or names, each standing for
    all modules whose name ends in it ("q_proj", "mlp.down_proj"). Linear layers and embeddings can
    be targeted. `exclude` takes modules away again, by one regex or by names. `layers_to_transform`
    leaves only layers of those numbers, counted after a part of the name among `layers_pattern`, or
    after any; it applies to names and to "all-linear".

    The scale is alpha / rank, or alpha / √rank with `rslora` (Kalajdzievski 2023,
    arXiv:2312.03732). `dora` is weight decomposition (Liu et al. 2024, arXiv:2402.09353).
    `rank_pattern` and `alpha_pattern` give other values to modules by a regex for the name's end.

    `init`: "default" draws A as PyTorch draws a linear layer (uniform within ±1/√in), "gaussian"
    from N(0, 1/rank²), both with B = 0; an embedding has A = 0 and B from N(0, 1). "pissa" starts
    from the largest singular values of the weight, which it takes out of the base (Meng et al.
    2024, arXiv:2404.02948), exactly or by `pissa_iterations` of subspace iteration.

    `dropout` is of the adapters' inputs in the blocks; an embedding's and the head's drop nothing.
    `modules_to_save` are trained whole. `ties`: in a model whose output head is the embedding's
    matrix, the head follows what an adapter makes of the embedding.

    Raises UserError with every value that is out of its range.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    exclude: str | tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    init: Init = "default"
    pissa_iterations: int | None = None
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    ties: bool = True

    def __post_init__(self) -> None:
        if mistakes := [*self._wrong_values(), *self._wrong_patterns()]:
            raise UserError(mistakes)

    def _wrong_values(self) -> list[Mistake]:
        mistakes = []
        for name, rank in [("rank", self.rank), *_items("rank_pattern", self.rank_pattern)]:
            if rank < 1:
                mistakes.append(Mistake(f"is {rank}", "a number from 1 on", f"adapter.{name}"))
        for name, alpha in [("alpha", self.alpha), *_items("alpha_pattern", self.alpha_pattern)]:
            if not alpha > 0:
                mistakes.append(Mistake(f"is {alpha}", "a number above 0", f"adapter.{name}"))
        if not 0 <= self.dropout < 1:
            fix = "a share from 0 to below 1"
            mistakes.append(Mistake(f"is {self.dropout}", fix, "adapter.dropout"))
        if self.init not in INITS:
            fix = f"one of {', '.join(INITS)}"
            mistakes.append(Mistake(f"is {self.init!r}", fix, "adapter.init"))
        if self.pissa_iterations is not None and self.pissa_iterations < 1:
            fix = "a number from 1 on, or none for the exact decomposition"
            what = f"is {self.pissa_iterations}"
            mistakes.append(Mistake(what, fix, "adapter.pissa_iterations"))
        return mistakes

    def _wrong_patterns(self) -> list[Mistake]:
        patterns = [("rank_pattern", key) for key in self.rank_pattern]
        patterns += [("alpha_pattern", key) for key in self.alpha_pattern]
        patterns += [("layers_pattern", key) for key in self.layers_pattern]
        if isinstance(self.targets, str) and self.targets != ALL_LINEAR:
            patterns.append(("targets", self.targets))
        if isinstance(self.exclude, str):
            patterns.append(("exclude", self.exclude))
        mistakes = []
        for key, pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                what = f"{pattern!r} is no regular expression: {error}"
                mistakes.append(Mistake(what, "correct it", f"adapter.{key}"))
        return mistakes

    def targeted(self, name: str, *, linear_in_block: bool = False) -> bool:
        """Whether the module of that name gets an adapter.

        `linear_in_block` says that it is one of those that "all-linear" stands for.
        """
        parts = name.split(".")
        if any(self.saved(".".join(parts[:end])) for end in range(1, len(parts) + 1)):
            return False  # a part of what is trained whole
        if self._excluded(name):
            return False
        if self.targets == ALL_LINEAR:
            return linear_in_block and self._in_layers(name)
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        return _ends_in(name, self.targets) and self._in_layers(name)

    def saved(self, name: str) -> bool:
        """Whether the module of that name is trained whole."""
        return _ends_in(name, self.modules_to_save)

    def layer(self, name: str) -> LayerAdapter:
        """The adapter that a targeted module of that name gets."""
        rank = _by_pattern(self.rank_pattern, name, self.rank)
        alpha = _by_pattern(self.alpha_pattern, name, self.alpha)
        scale = alpha / (rank**0.5 if self.rslora else rank)
        return LayerAdapter(rank, scale, self.dropout, self.dora, self.init, self.ties)

    def doubled(self) -> AdapterSpec:
        """The same with twice the rank at the same scale, started from nothing: what PiSSA becomes
        where the difference to its start is written as a plain update."""
        factor = 2**0.5 if self.rslora else 2.0
        return replace(
            self,
            rank=2 * self.rank,
            alpha=factor * self.alpha,
            rank_pattern={key: 2 * rank for key, rank in self.rank_pattern.items()},
            alpha_pattern={key: factor * alpha for key, alpha in self.alpha_pattern.items()},
            init="default",
            pissa_iterations=None,
        )

    def _excluded(self, name: str) -> bool:
        if isinstance(self.exclude, str):
            return re.fullmatch(self.exclude, name) is not None
        return _ends_in(name, self.exclude)

    def _in_layers(self, name: str) -> bool:
        if self.layers_to_transform is None:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.layers_pattern]
        found = [match for p in patterns or [_LAYER.pattern] if (match := re.match(p, name))]
        return bool(found) and int(found[0][1]) in self.layers_to_transform


def _items(name: str, pattern: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(f"{name}.{key}", value) for key, value in pattern.items()]


def _ends_in(name: str, endings: tuple[str, ...]) -> bool:
    """Whether `name` is one of `endings`, or ends in one after a dot."""
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _by_pattern(patterns: Mapping[str, Number], name: str, otherwise: Number) -> Number:
    """The value of the first pattern that the end of `name` matches."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return otherwise

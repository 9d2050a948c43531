"""A method's settings with nothing left open: the recipe's, or the method's own defaults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from trainwright.errors import Mistake, UserError
from trainwright.recipe.schema import Optimizer
from trainwright.recipe.swarm import CodecName, Swarm

if TYPE_CHECKING:
    from trainwright.swarm.methods.method import Method


@dataclass(frozen=True)
class Settings:
    """What all peers of a run do alike; it is in the manifest.

    `inner_steps` are those between two exchanges of the same weights, `delay` those that go on
    while one is under way, `density` the share of values that sparse codecs keep.
    """

    method: str
    inner_steps: int
    codec: CodecName
    density: float
    outer_learning_rate: float
    outer_momentum: float
    feedback_decay: float
    fragments: int
    delay: int
    mixing: float
    average: str
    weight_decay: float  # of DeMo's update, the recipe's


SPARSE = ("top-k", "top-k-12bit")
CHUNKS_OF = 4096  # values of which 64 (SparseLoCo), 32 (DeMo), 4 (DisTrO) are sent

# Coarse codecs lose too much without error feedback (Streaming DiLoCo's ablation; MuLoCo has 0.9,
# SparseLoCo 0.95), fine ones nothing that matters.
FEEDBACK = MappingProxyType({"1bit": 0.9, "2bit": 0.9, "top-k": 0.95, "top-k-12bit": 0.95})


def _defaults(
    method: str, steps: int, codec: CodecName, rate: float, momentum: float, **more: float | str
) -> Settings:
    values = {
        "density": 64 / CHUNKS_OF,
        "feedback_decay": FEEDBACK.get(codec, 0.0),
        "fragments": 1,
        "delay": 0,
        "mixing": 0.0,
        "average": "plain",
        "weight_decay": 0.0,
        **more,
    }
    return Settings(
        method=method,
        inner_steps=steps,
        codec=codec,
        outer_learning_rate=rate,
        outer_momentum=momentum,
        **values,  # type: ignore[arg-type]
    )


# What each method's paper has, where it has a figure. NoLoCo's rate and momentum are its β and α;
# the codec of DeMo and DisTrO is that of the coefficients.
DEFAULTS = MappingProxyType(
    {
        each.method: each
        for each in (
            _defaults("diloco", 30, "int8", 0.7, 0.9),
            _defaults("streaming", 30, "e3m0", 0.7, 0.9, fragments=3, delay=1, mixing=0.5),
            _defaults("sparseloco", 30, "top-k", 1.0, 0.0),
            _defaults("muloco", 30, "2bit", 0.8, 0.9),
            _defaults("noloco", 50, "bf16", 0.7, 0.5),
            _defaults("demo", 1, "bf16", 1.0, 0.0, density=32 / CHUNKS_OF, feedback_decay=0.999),
            _defaults(
                "distro",
                *(1, "1bit", 1.0, 0.0),
                density=4 / CHUNKS_OF,
                feedback_decay=0.995,
                delay=1,
            ),
        )
    }
)


def resolve_settings(
    swarm: Swarm,
    optimizer: Optimizer,
    *,
    inner_steps: int | None = None,
    codec: CodecName | None = None,
    density: float | None = None,
) -> Settings:
    """The recipe's settings, the method's own where it says nothing.

    `inner_steps`, `codec` and `density` are what `auto` was found to be (`swarm.adapting`); without
    them it is the method's own. Raises UserError for keys that the method has no use for, and for
    values that do not go together.
    """
    own = DEFAULTS[swarm.method]
    codec = codec if swarm.codec == "auto" else swarm.codec
    values = {
        "inner_steps": swarm.inner_steps if swarm.inner_steps != "auto" else inner_steps,
        "codec": codec,
        "density": swarm.density if swarm.density != "auto" else density,
        "outer_learning_rate": swarm.outer_learning_rate,
        "outer_momentum": swarm.outer_momentum,
        "feedback_decay": swarm.feedback_decay,
        "fragments": swarm.fragments,
        "delay": swarm.delay,
        "mixing": swarm.mixing,
    }
    if codec is not None and swarm.feedback_decay is None:
        values["feedback_decay"] = FEEDBACK.get(codec, 0.0)
    given = {key: value for key, value in values.items() if value is not None}
    more = {"average": swarm.average, "weight_decay": optimizer.weight_decay}
    settings = Settings(**{**vars(own), **given, **more})
    mistakes = list(_mistakes(swarm, optimizer, settings))
    if mistakes:
        raise UserError(mistakes)
    return settings


def refuse_too_few_bytes(swarm: Swarm, method: Method, fragments: int) -> None:
    """Raise UserError where `max_bytes` refuses what an honest peer may have to send."""
    most = max(method.most_bytes(round) for round in range(fragments))
    if swarm.max_bytes is not None and swarm.max_bytes < most:
        raise UserError(
            Mistake(
                f"contributions may have {swarm.max_bytes} bytes, and the codec needs up to {most}",
                "leave it out, or take a coarser codec",
                "swarm.max_bytes",
            )
        )


def _mistakes(swarm: Swarm, optimizer: Optimizer, settings: Settings) -> Iterator[Mistake]:
    """What does not go together, each by its key."""
    method, steps = settings.method, settings.inner_steps
    dct = method in ("demo", "distro")
    if swarm.density is not None and not dct and settings.codec not in SPARSE:
        yield Mistake(
            f"`density` is of sparse codecs, and the codec is {settings.codec}",
            "leave it out, or write `codec: top-k`",
            "swarm.density",
        )
    if settings.codec in SPARSE and swarm.trust.aggregation in ("median", "trimmed-mean"):
        yield Mistake(
            f"of {settings.codec} contributions most values are zero, and so is any median of them",
            "write `aggregation: centred-clip`, or `mean`",
            "swarm.trust.aggregation",
        )
    if method == "noloco":
        if settings.codec not in ("fp32", "bf16"):
            yield Mistake(
                f"noloco sends weights as well, which {settings.codec} is too coarse for",
                "write `codec: bf16`",
                "swarm.codec",
            )
        if swarm.feedback_decay is not None:
            yield Mistake("noloco has no error feedback", "leave it out", "swarm.feedback_decay")
    if method == "muloco" and optimizer.name != "muon":
        yield Mistake(
            f"muloco is DiLoCo with Muon inside, and the optimizer is {optimizer.name}",
            "write `optimizer: muon`, or `method: diloco`",
            "optimizer.name",
        )
    if settings.fragments > steps:
        yield Mistake(
            f"{settings.fragments} fragments do not come round in {steps} steps",
            f"at most `fragments: {steps}`",
            "swarm.fragments",
        )
    between = max(1, steps // settings.fragments)
    if settings.delay > between:
        yield Mistake(
            f"an exchange is still under way when the next begins, {between} steps later",
            f"at most `delay: {between}`",
            "swarm.delay",
        )

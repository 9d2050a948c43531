"""The recipe's `swarm` section: how machines over slow links train one model together."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainwright.recipe.section import (
    Count,
    Fraction,
    NotNegative,
    NotTruth,
    Positive,
    Section,
    Share,
    refusal,
)

Method = Literal["diloco", "streaming", "sparseloco", "demo", "distro", "noloco", "muloco"]
GRADIENT_METHODS = ("demo", "distro")  # which exchange gradients at every step
CodecName = Literal["fp32", "bf16", "int8", "e3m0", "2bit", "1bit", "top-k", "top-k-12bit"]
Aggregation = Literal["mean", "trimmed-mean", "median", "centred-clip"]


class Trust(Section):
    """What is done about peers that send what they should not."""

    clip_to_median: bool = Field(
        True, description="Scale contributions whose norm is above the median down to it."
    )
    aggregation: Aggregation = Field(
        "mean",
        description="How contributions become one: their mean, or one that a minority of liars "
        "cannot move far (`trimmed-mean`, `median`, `centred-clip`).",
    )
    conduct: bool = Field(
        True,
        description="Watch for copied, stale, empty, random and reversed contributions, and "
        "exclude peers that keep sending them.",
    )
    scores: bool = Field(
        True,
        description="Peers try each other's contributions on data, and low scores lose weight.",
    )


class Swarm(Section):
    """Peers train alone for some steps, exchange what changed, and agree on the next weights."""

    method: Method = Field(
        "sparseloco", description="What is exchanged, and what is made of it (docs/swarm.md)."
    )
    inner_steps: Count | Literal["auto"] = Field(
        "auto",
        description="Steps of each peer between two exchanges of the same weights; `auto` is the "
        "least number, of the method's or more, behind which the exchange hides.",
    )
    codec: CodecName | Literal["auto"] | None = Field(
        None,
        description="How contributions are written; default the method's own. `auto` is the "
        "finest that hides behind the steps. `top-k` is what SparseLoCo has: a share of the values "
        "of each chunk, in 2 bits, with entropy-coded places (`top-k-12bit`: in 12 bits).",
    )
    density: Annotated[float, Field(gt=0, le=1), NotTruth] | Literal["auto"] | None = Field(
        None,
        description="Share of the values that `top-k`, DeMo and DisTrO keep; default the "
        "method's own.",
        examples=[0.015625],
    )
    outer_learning_rate: Positive | None = Field(
        None, description="Learning rate of the outer step; default the method's own."
    )
    outer_momentum: Fraction | None = Field(
        None, description="Momentum of the outer step; default the method's own."
    )
    feedback_decay: Share | None = Field(
        None,
        description="Share of what was not sent that the next contribution takes up (error "
        "feedback); default the method's own.",
    )
    fragments: Count | None = Field(
        None,
        description="Parts of the model that `streaming` exchanges in turn; default 3.",
    )
    delay: Annotated[int, Field(ge=0), NotTruth] | None = Field(
        None,
        description="Steps that go on while an exchange is under way (`streaming`'s τ, default 1; "
        "0 waits).",
    )
    mixing: Fraction | None = Field(
        None,
        description="Share of a peer's own weights when agreed ones arrive (`streaming`'s α); "
        "default 0.5.",
    )
    average: Literal["plain", "radial"] = Field(
        "plain",
        description="Mean weighted by tokens, or of lengths and directions apart (`radial`), "
        "which keeps the length of contributions that point apart.",
    )
    quorum: Count = Field(
        2, description="Contributions that a round needs; with fewer it changes nothing."
    )
    grace: NotNegative = Field(
        10.0, description="Seconds that a round waits for the others once it has its quorum."
    )
    deadline: Positive = Field(
        600.0, description="Seconds after which a round ends, by each peer's own clock."
    )
    silence: Positive = Field(
        30.0, description="Seconds without a sign of life after which nobody waits for a peer."
    )
    snapshot_every: Count = Field(
        10, description="Rounds between snapshots of the agreed weights, which joiners begin with."
    )
    max_bytes: Count | None = Field(
        None,
        description="Most bytes of a contribution; default what the codec can need.",
    )
    trust: Trust = Field(default_factory=Trust, description="What is done about liars.")

    @model_validator(mode="after")
    def keys_fit_the_method(self) -> Swarm:
        own = {
            "fragments": ("streaming",),
            "mixing": ("streaming",),
            "delay": ("streaming", "diloco", "muloco", "sparseloco", "distro"),
        }
        for key, methods in own.items():
            if getattr(self, key) is not None and self.method not in methods:
                listed = " or ".join(methods)
                raise refusal(
                    f"`{key}` is of {listed}, and the method is {self.method}",
                    f"leave it out, or write `method: {methods[0]}`",
                    key,
                )
        if self.method in GRADIENT_METHODS:
            if self.inner_steps not in ("auto", 1):
                raise refusal(
                    f"{self.method} exchanges gradients at every step",
                    "leave `inner_steps` out",
                    "inner_steps",
                )
            if self.codec is not None:
                what = f"{self.method} has a codec of its own"
                raise refusal(what, "leave `codec` out", "codec")
        if self.method == "noloco" and self.trust.aggregation != "mean":
            raise refusal(
                "of a pair no liar can be outvoted",
                "write `aggregation: mean`",
                "trust.aggregation",
            )
        return self

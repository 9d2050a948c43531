"""The recipe's `adapter` section: small matrices that are trained instead of the model's own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainwright.recipe.section import Count, Fraction, NotTruth, Positive, Section, refusal


class Adapter(Section):
    """Low-rank adapters (LoRA) on a model whose own weights stay as they are."""

    rank: Count = Field(16, description="Rank of the matrices.")
    alpha: Positive | None = Field(
        None,
        description="What they are scaled by is alpha / rank; default twice the rank.",
        examples=[32],
    )
    dropout: Fraction = Field(
        0.0, description="Share of an adapter's inputs set to zero in training."
    )
    targets: list[str] | Literal["all-linear"] = Field(
        "all-linear",
        description="Names of the layers that get adapters, such as q_proj, embed_tokens or a "
        "whole path; `all-linear` is every matrix of the blocks.",
        examples=[["q_proj", "v_proj"]],
    )
    rslora: bool = Field(False, description="Scale by alpha / √rank (rsLoRA, arXiv:2312.03732).")
    dora: bool = Field(
        False, description="Train each output's magnitude apart (DoRA, arXiv:2402.09353)."
    )
    init: Literal["default", "gaussian", "pissa"] = Field(
        "default",
        description="First values: random and zero (`default`, `gaussian`), or the weight's own "
        "largest singular vectors (`pissa`, arXiv:2404.02948).",
    )
    plus_ratio: Annotated[float, Field(ge=1), NotTruth] = Field(
        1.0,
        description="How much faster the second matrix learns than the first (LoRA+, "
        "arXiv:2402.12354); 16 is usual.",
    )
    train_also: list[str] = Field(
        default_factory=list,
        description="Layers trained whole beside the adapters.",
        examples=[["lm_head", "embed_tokens"]],
    )
    quantise: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="How the model's own weights are held: `nf4` (4 bits, QLoRA, with double "
        "quantisation) or `int8`.",
    )
    path: str | None = Field(
        None,
        description="Directory of an adapter in PEFT's layout to go on from.",
        examples=["./my-adapter"],
    )

    @model_validator(mode="after")
    def sensible(self) -> Adapter:
        if self.quantise != "none" and self.init == "pissa":
            raise refusal(
                "pissa changes the model's own weights, which are quantised",
                "write `init: default`",
                "init",
            )
        if not self.targets and not self.train_also:
            raise refusal(
                "no layer is trained", "write `targets: all-linear`, or name some", "targets"
            )
        return self

    def __hash__(self) -> int:
        # Its lists would forbid it; the planner remembers what it found out of each adapter.
        return hash((self.rank, self.quantise, self.dora))

    @property
    def scale_alpha(self) -> float:
        """`alpha`, or twice the rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

"""The recipe's `objective` section: what is optimised."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from trainwright.recipe.section import Fraction, NotNegative, NotTruth, Positive, Section, refusal

Kind = Literal["next_token", "sft", "dpo", "kto", "orpo", "cpo", "simpo", "reward", "distill"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TrainOn = Literal["completion", "assistant", "all"]

# The terms that `loss` may name: `objectives.preference` has a function for each but `sft`, which
# is the mean cross entropy of the chosen answers' tokens.
PREFERENCE_LOSSES = (
    *("sigmoid", "cdpo", "robust", "hinge", "ipo", "exo", "nca", "bco", "sppo", "apo_zero"),
    *("apo_down", "aot", "aot_unpaired", "discopop", "sigmoid_norm", "sft"),
)

SMOOTHED = ("cdpo", "robust", "exo", "aot", "aot_unpaired")  # those that read label_smoothing
# Those that look at the two answers apart, where an f-divergence has no place.
APART = ("nca", "bco", "sppo", "apo_zero", "apo_down", "aot", "aot_unpaired")

# Which kinds each key belongs to; the others refuse it.
KINDS_OF: dict[str, tuple[Kind, ...]] = {
    "train_on": ("sft", "distill"),
    "loss": ("dpo",),
    "beta": ("dpo", "kto", "orpo", "cpo", "simpo", "distill"),
    "label_smoothing": ("dpo", "cpo"),
    "divergence": ("dpo",),
    "sft_weight": ("orpo", "cpo", "simpo"),
    "margin": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "center": ("reward",),
    "reference": ("dpo", "kto"),
    "cache_reference": ("dpo", "kto"),
    "teacher": ("distill",),
    "temperature": ("distill",),
    "mix": ("distill",),
}
PAIRED: tuple[Kind, ...] = ("dpo", "orpo", "cpo", "simpo", "reward")
BETAS: dict[str, float] = {
    **dict.fromkeys(("dpo", "kto", "orpo", "cpo"), 0.1),
    "simpo": 2.0,
    "distill": 0.5,
}


class Objective(Section):
    """What is optimised. A plain string means `kind`."""

    shorthand = "kind"

    kind: Kind = Field(
        "next_token",
        description="`next_token` on plain text; `sft` on examples and conversations; from pairs "
        "of a better and a worse answer `dpo`, `orpo`, `cpo` or `simpo`, or `reward`, which makes "
        "a model that scores answers; `kto` from answers marked good or bad; "
        "`distill` on examples, towards a teacher's answers.",
    )
    train_on: TrainOn | None = Field(
        None,
        description="Which tokens of an example are trained: the last answer (`completion`), "
        "every `assistant` turn (the default for conversations), or `all`. For sft and distill.",
        examples=["completion"],
    )
    loss: str | dict[str, float] = Field(
        "sigmoid",
        description="dpo's loss, or several with weights: "
        + ", ".join(f"`{name}`" for name in PREFERENCE_LOSSES)
        + ".",
        examples=[{"sigmoid": 1.0, "sft": 0.2}],
    )
    beta: NotNegative | None = Field(
        None,
        description="How dearly moving away from the reference is paid (dpo, kto), or the weight "
        "of the preference (orpo, cpo, simpo); default 0.1, for simpo 2. For distill, where the "
        "divergence lies between KL(teacher‖student) at 0 and KL(student‖teacher) at 1; default "
        "0.5.",
        examples=[0.1],
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5), NotTruth] = Field(
        0.0, description="Share of pairs taken to be the wrong way round. For dpo and cpo."
    )
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = Field(
        "reverse_kl",
        description="The f-divergence that keeps dpo's model near the reference "
        "(arXiv:2309.16240); alpha's order is 0.5.",
    )
    sft_weight: NotNegative | None = Field(
        None,
        description="Weight of the chosen answers' cross entropy; default 1, for simpo 0.",
        examples=[1.0],
    )
    margin: NotNegative = Field(
        0.5,
        description="simpo's target margin: by how much `beta` times the mean log-probability of "
        "the chosen answer's tokens should be ahead.",
    )
    desirable_weight: Positive = Field(1.0, description="kto's weight of good answers.")
    undesirable_weight: Positive = Field(1.0, description="kto's weight of bad answers.")
    center: NotNegative = Field(
        0.0,
        description="reward's weight of the squared sum of a pair's two scores, which keeps scores "
        "around 0; 0.01 is usual.",
        examples=[0.01],
    )
    reference: str | None = Field(
        None,
        description="Directory or hub id of dpo's and kto's reference model; default the model as "
        "it was at the start (with an adapter, the model without it).",
        examples=["./reference-model"],
    )
    cache_reference: bool = Field(
        False,
        description="Whether dpo and kto take what the reference makes of every answer once, "
        "before they train, and keep it in the cache for later runs. A second model is then not "
        "kept in memory.",
    )
    teacher: str | None = Field(
        None,
        description="Directory or hub id of the model that distill learns from. Its vocabulary is "
        "the trained model's.",
        examples=["./teacher-model"],
    )
    temperature: Positive = Field(
        1.0, description="What distill divides both models' logits by before it compares them."
    )
    mix: Fraction = Field(
        0.0,
        description="Weight of the answers' own cross entropy in distill's loss; the divergence "
        "has the rest.",
    )

    @model_validator(mode="after")
    def only_its_own_keys(self) -> Objective:
        fields = type(self).model_fields
        for key, owners in KINDS_OF.items():
            if self.kind not in owners and getattr(self, key) != fields[key].default:
                kinds = " and ".join(owners)
                raise refusal(
                    f"`{key}` belongs to {kinds}, and the objective is {self.kind}",
                    "leave it out, or change `kind`",
                    key,
                )
        return self

    @model_validator(mode="after")
    def beta_in_its_range(self) -> Objective:
        if self.kind == "distill" and self.strength > 1:
            what = f"beta is {self.strength:g}, and lies between two divergences, 0 and 1"
            raise refusal(what, "write `beta: 0.5`", "beta")
        if self.kind != "distill" and self.beta == 0:
            raise refusal("beta is 0, and nothing would be learnt", "write `beta: 0.1`", "beta")
        return self

    @model_validator(mode="after")
    def has_a_teacher(self) -> Objective:
        if self.kind == "distill" and not self.teacher:
            fix = "write `teacher: DIRECTORY`, or a hub id"
            raise refusal("distill learns from a teacher, and none is named", fix, "teacher")
        return self

    @model_validator(mode="after")
    def known_losses(self) -> Objective:
        for name, weight in self.losses.items():
            if name not in PREFERENCE_LOSSES:
                near = ", ".join(PREFERENCE_LOSSES)
                raise refusal(f"there is no loss `{name}`", f"write some of {near}", "loss")
            if not 0 < weight < float("inf"):
                raise refusal(f"`{name}` has the weight {weight}", "give a number above 0", "loss")
        if not self.losses:
            raise refusal("no loss is given", "write `loss: sigmoid`", "loss")
        if self.kind == "dpo" and self.label_smoothing and not set(self.losses) & set(SMOOTHED):
            what = f"{' and '.join(self.losses)} would not heed label_smoothing"
            raise refusal(
                what, "write `loss: cdpo` or `robust`, or leave it out", "label_smoothing"
            )
        if "exo" in self.losses and not self.label_smoothing:
            what = "exo compares with the distribution (1 - e, e), and its e, label_smoothing, is 0"
            raise refusal(what, "write `label_smoothing: 0.001`", "label_smoothing")
        apart = [name for name in self.losses if name in APART]
        if self.divergence != "reverse_kl" and apart:
            what = f"{' and '.join(apart)} would not heed the divergence {self.divergence}"
            raise refusal(what, "leave it at reverse_kl, or write `loss: sigmoid`", "divergence")
        return self

    @property
    def losses(self) -> dict[str, float]:
        """dpo's losses by name, with their weights."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else dict(self.loss)

    @property
    def strength(self) -> float:
        """`beta`, or the kind's default."""
        return self.beta if self.beta is not None else BETAS[self.kind]

    @property
    def chosen_weight(self) -> float:
        """`sft_weight`, or the kind's default."""
        default = 0.0 if self.kind == "simpo" else 1.0
        return default if self.sft_weight is None else self.sft_weight

    @property
    def needs_reference(self) -> bool:
        """Whether answers are compared with what a reference makes of them."""
        return self.kind == "kto" or (self.kind == "dpo" and self.losses.keys() != {"sft"})

    @property
    def gives_scores(self) -> bool:
        """Whether the model is trained to score texts, and not to write them."""
        return self.kind == "reward"

    @property
    def sequences(self) -> int:
        """Sequences that an example has: two where answers are compared."""
        return 2 if self.kind in (*PAIRED, "kto") else 1

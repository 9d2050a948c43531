"""What every section of the recipe is made of: closed, frozen models and bounded numbers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def refusal(what: str, fix: str, key: str = "") -> PydanticCustomError:
    """An error to raise in a validator; `key` is relative to the section that raises it."""
    context = {"what": what, "fix": fix, "key": key}
    return PydanticCustomError("recipe", "{what}; {fix}", context)


def _no_truth(value: Any) -> Any:
    # pydantic reads `true` as 1, which turns a slip such as `steps: true` into a run of one step.
    if isinstance(value, bool):
        raise refusal("true and false are not numbers", "write a number")
    return value


NotTruth = BeforeValidator(_no_truth)
Count = Annotated[int, Field(gt=0), NotTruth]
Positive = Annotated[float, Field(gt=0), NotTruth]
NotNegative = Annotated[float, Field(ge=0), NotTruth]
Share = Annotated[float, Field(ge=0, le=1), NotTruth]
Fraction = Annotated[float, Field(ge=0, lt=1), NotTruth]


class Section(BaseModel):
    """A part of the recipe: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    # The key that a plain string in this section's place stands for.
    shorthand: ClassVar[str] = ""
    # Words that stand for the section with none of its keys given.
    words: ClassVar[tuple[str, ...]] = ()
    # Groups of keys of which one excludes the others: "steps | epochs | tokens".
    alternatives: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def expand(cls, value: Any) -> Any:
        """A plain string as the keys that it stands for; everything else as it is."""
        if isinstance(value, str) and value in cls.words:
            return {}
        return {cls.shorthand: value} if cls.shorthand and isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return cls.expand(value)

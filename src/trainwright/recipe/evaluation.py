"""The recipe's `evaluation` section: held-out loss, completions to look at, tasks with answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainwright.recipe.section import Count, NotNegative, NotTruth, Section, refusal

TaskKind = Literal["exact_match", "multiple_choice"]

# Keys that only a task whose answers are generated has.
GENERATED = ("max_new_tokens", "stop", "extract", "ignore_case")


class Sampling(Section):
    """Completions written during evaluation."""

    prompts: list[str] = Field(
        default_factory=list,
        description="Prompts to complete.",
        examples=[["Once upon a time"]],
    )
    chat: bool | None = Field(
        None,
        description="Put prompts into the chat template as a user's turn; default where the run "
        "learns from examples and its tokenizer has a template.",
        examples=[True],
    )
    max_new_tokens: Count = Field(48, description="Most tokens to add to a prompt.")
    temperature: NotNegative = Field(0.7, description="0 is greedy.")
    top_p: Annotated[float, Field(gt=0, le=1), NotTruth] = Field(
        0.95, description="Nucleus sampling's probability mass."
    )


class Task(Section):
    """Questions with right answers, from a file. A plain string means `path`."""

    shorthand = "path"

    path: Path = Field(
        description="JSON lines (or an array, CSV, Parquet): rows of `prompt` or `messages`, with "
        "`answer` (a text, or a list of those that count), or with `choices` and the `answer`'s "
        "index or letter.",
        examples=["./questions.jsonl"],
    )
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = Field(
        None, description="What results go by; default the file's name.", examples=["arithmetic"]
    )
    kind: TaskKind | None = Field(
        None,
        description="`exact_match`: the model answers, greedily, and its text must be an accepted "
        "one; `multiple_choice`: the likeliest choice must be the right one. Default by the rows.",
        examples=["exact_match"],
    )
    chat: bool = Field(
        False,
        description="Put `prompt` into the chat template as a user's turn. `messages` always are.",
    )
    rows: Count | None = Field(None, description="Only the first so many rows.", examples=[200])
    while_training: bool = Field(
        False, description="Run it at every evaluation, not at the end only."
    )
    max_new_tokens: Count = Field(64, description="Most tokens of an answer (exact_match).")
    stop: list[str] = Field(
        default_factory=list,
        description="Texts at which an answer ends, as at the end of a turn (exact_match).",
        examples=[["\n"]],
    )
    extract: str | None = Field(
        None,
        description="Regular expression; of its last match in the model's text the first group, or "
        "all of it, is the answer (exact_match).",
        examples=[r"#### (-?\d+)"],
    )
    ignore_case: bool = Field(
        False, description="Take capital and small letters for the same (exact_match)."
    )

    @model_validator(mode="after")
    def readable_expression(self) -> Task:
        try:
            re.compile(self.extract or "")
        except re.error as error:
            what = f"`{self.extract}` is no regular expression: {error}"
            raise refusal(what, "mend it, or leave it out", "extract") from None
        return self

    @model_validator(mode="after")
    def only_its_own_keys(self) -> Task:
        fields = type(self).model_fields
        for key in GENERATED if self.kind == "multiple_choice" else ():
            if getattr(self, key) != fields[key].get_default(call_default_factory=True):
                what = f"`{key}` belongs to exact_match, and the task is multiple_choice"
                raise refusal(what, "leave it out, or change `kind`", key)
        return self

    @model_validator(mode="after")
    def name_of_file(self) -> Task:
        if self.name is None and not re.match(r"[A-Za-z0-9]", self.title):
            raise refusal(f"{self.path} makes no name", "give the task a `name`", "path")
        return self

    @property
    def title(self) -> str:
        """`name`, or one made of the file's."""
        return self.name or re.sub(r"[^A-Za-z0-9._-]+", "-", self.path.name.split(".")[0])


class Evaluation(Section):
    """Held-out loss, samples and tasks, during training and at its end."""

    every: Count | None = Field(
        None,
        description="Steps between evaluations; default every other checkpoint. The last step is "
        "always evaluated.",
        examples=[100],
    )
    rows: Count | None = Field(
        None,
        description="Most held-out rows to score during training, shared among several sources; "
        "the last evaluation scores them all.",
        examples=[64],
    )
    samples: Sampling = Field(default_factory=Sampling, description="Completions to show.")
    tasks: list[Task] = Field(
        default_factory=list,
        description="Questions with right answers, run when training ends.",
        examples=[["./questions.jsonl"]],
    )

    @model_validator(mode="after")
    def distinct_names(self) -> Evaluation:
        titles = [task.title for task in self.tasks]
        for number, title in enumerate(titles):
            if title in titles[:number]:
                what = f"two tasks are called {title}"
                raise refusal(what, "give one of them another `name`", f"tasks.{number}")
        return self

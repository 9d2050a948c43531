"""What a row of a dataset is made into: one or two sequences of text, ready to be tokenised.

The way of the data: file → row (`formats_rows`) → Example (`formats`) → text and spans
(`templates`) → token ids and a mask (`masks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# One turn in OpenAI's form, as the formats leave it: `role` is system, user, assistant or tool;
# `content` is always text. There may be `reasoning_content`, `tool_calls` (with arguments as
# objects, not as JSON text), `name`, `tool_call_id`, and `train: False` for a turn not to learn.
Message = Mapping[str, Any]


class RowRefusedError(ValueError):
    """A row that cannot be trained on; the caller adds the row's name.

    `what` says what is wrong with the row, `fix` what to change, in the data or in the recipe.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what} (fix: {fix})" if fix else what)
        self.what = what
        self.fix = fix


@dataclass(frozen=True)
class Text:
    """Plain text, to which no chat template is applied.

    The prompt is trained on only with `train_on: all`; it is "" where the whole text is the target.
    """

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Turns for a chat template.

    Messages before number `first` (from 0) are the prompt, the rest the completion: what the row
    gives as such, or else the last answer. `tools` are the functions that the assistant may call,
    as JSON schemas in OpenAI's form.
    """

    messages: tuple[Message, ...]
    first: int
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Example:
    """One row, understood.

    `name` says where it stands ("faq.jsonl:12"). `sequences` holds one for supervised training and
    KTO, and (chosen, rejected) for preferences. `label` is KTO's: whether the answer is desirable.
    `margin` is by how much a reward model should score a pair's chosen answer higher.
    """

    name: str
    sequences: tuple[Text | Conversation, ...]
    label: bool | None = None
    margin: float = 0.0

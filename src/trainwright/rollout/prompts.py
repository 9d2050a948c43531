"""A conversation's prompt: its turns as the chat template writes them, up to the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from trainwright.data.examples import Message
from trainwright.errors import Mistake, UserError


def chat_prompt(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids after which the model writes the assistant's next turn, as in training.

    `tools` are functions as JSON schemas, `variables` the template's own (`enable_thinking`).
    Raises UserError where the tokenizer has no template, or the template refuses the turns.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, so turns cannot be told apart",
            "complete a plain text instead, or use a model with a chat template",
        )
    variables = dict(variables or {})
    taken = variables.keys() & signature(tokenizer.apply_chat_template).parameters.keys()
    if taken:
        raise UserError(f"{sorted(taken)[0]!r} is no variable of a template", "leave it out")
    # transformers renders templates in a sandbox. What the template writes as a special token is
    # one, also where the tokenizer takes the same characters in a plain text for text.
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            add_generation_prompt=True,
            return_dict=False,
            tokenizer_kwargs={"split_special_tokens": False},
            **variables,
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        what = f"the chat template cannot be used: {reason}"
        raise UserError(Mistake(what, "mend it or the turns, or give another")) from error
    return ids

"""Preference rows: two answers to one prompt, with the prompt written out or in both of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from trainwright.data.examples import Conversation, Message, RowRefusedError, Text
from trainwright.data.formats_chat import (
    check_order,
    messages_of,
    text_of,
    tools_of,
    with_system,
)

# How Anthropic's HH-RLHF writes conversations: "\n\nHuman: … \n\nAssistant: …".
_HH = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def pair_of(row: Mapping[str, Any]) -> tuple[Text | Conversation, Text | Conversation]:
    """(chosen, rejected) of a row with our column names, over the same prompt.

    The prompt is `prompt` (text or turns) or the turns in `conversations` or `messages`; without
    one, it is what chosen and rejected both begin with. Raises RowRefusedError.
    """
    prompt = row.get("prompt")
    if prompt is None:
        prompt = row.get("conversations", row.get("messages"))
    answers = row["chosen"], row["rejected"]
    if all(isinstance(answer, str) for answer in answers):
        texts = tuple(
            text_of(answer, f"`{name}`")
            for name, answer in zip(("chosen", "rejected"), answers, strict=True)
        )
        if all(_is_hh(text) for text in texts) and not prompt:
            return _pair(row, (), tuple(_hh_turns(text) for text in texts))
        if isinstance(prompt, str) and not row.get("system") and not _is_hh(prompt):
            return _texts(text_of(prompt, "`prompt`"), texts)
        if prompt is None:
            return _texts_sharing(texts)
    context: tuple[Message, ...] = ()
    if isinstance(prompt, str):
        asked = {"role": "user", "content": text_of(prompt, "`prompt`")}
        # As a prompt it ends with "\n\nAssistant:", after which the answer is to come.
        from_hh = _hh_turns(prompt.removesuffix("\n\nAssistant:"))
        context = from_hh if _is_hh(prompt) else (asked,)
    elif prompt is not None:
        context = messages_of(prompt, "turn of the prompt")
    turns = [
        ({"role": "assistant", "content": text_of(answer, f"`{name}`")},)
        if isinstance(answer, str)
        else messages_of(answer, f"turn of `{name}`")
        for name, answer in zip(("chosen", "rejected"), answers, strict=True)
    ]
    return _pair(row, context, turns)


def _pair(
    row: Mapping[str, Any], context: tuple[Message, ...], answers: Sequence[tuple[Message, ...]]
) -> tuple[Conversation, Conversation]:
    """Two conversations; the prompt reaches to the first turn in which they differ."""
    whole = []
    for answer in answers:
        # Chosen and rejected may repeat the prompt that the row has in a column of its own.
        is_whole = answer[0]["role"] in ("user", "system")
        whole.append(with_system(row, answer if is_whole else (*context, *answer)))
    for name, messages in zip(("chosen", "rejected"), whole, strict=True):
        _check(messages, name)
    chosen, rejected = whole
    pairs = zip(chosen, rejected, strict=False)
    first = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    shortest = min(len(chosen), len(rejected))
    if first == len(chosen) == len(rejected):
        first -= 1  # the same answer twice: its last turn is the completion
    if first == shortest:
        raise RowRefusedError(
            "one of chosen and rejected is only the beginning of the other",
            "give two answers to the same prompt",
        )
    if chosen[first]["role"] != "assistant" or rejected[first]["role"] != "assistant":
        what = f"chosen and rejected differ in turn {first + 1}, before the assistant's answer"
        raise RowRefusedError(what, "give two answers to the same prompt")
    if first == 0:
        raise RowRefusedError(
            "chosen and rejected have no prompt in common",
            "name the prompt's column: `columns: {prompt: YOURS}`",
        )
    tools = tools_of(row.get("tools"))
    return Conversation(chosen, first, tools), Conversation(rejected, first, tools)


def _check(messages: tuple[Message, ...], name: str) -> None:
    try:
        check_order(messages)
    except RowRefusedError as error:
        raise RowRefusedError(f"`{name}`: {error.what}", error.fix) from None
    if messages[-1]["role"] != "assistant":
        what = f"`{name}` does not end with the assistant's answer"
        raise RowRefusedError(what, "end it with the answer")


def _texts(prompt: str, answers: Sequence[str]) -> tuple[Text, Text]:
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer.strip():
            raise RowRefusedError(f"`{name}` is empty", "write the answer, or delete the row")
    return Text(prompt, answers[0]), Text(prompt, answers[1])


def _texts_sharing(answers: Sequence[str]) -> tuple[Text, Text]:
    """Two texts cut after the words that both begin with."""
    chosen, rejected = answers
    pairs = zip(chosen, rejected, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    # Back to where a word begins, so that no word is cut; its leading space belongs to the answer.
    while shared and not chosen[shared - 1 : shared].isspace():
        shared -= 1
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    if not chosen[:shared].strip():
        raise RowRefusedError(
            "there is no `prompt`, and chosen and rejected do not begin alike",
            "name the prompt's column: `columns: {prompt: YOURS}`",
        )
    return _texts(chosen[:shared], (chosen[shared:], rejected[shared:]))


def _is_hh(text: str) -> bool:
    return text.startswith("\n\nHuman:")


def _hh_turns(text: str) -> tuple[Message, ...]:
    parts = _HH.split(text)
    return tuple(
        {"role": _HH_ROLES[speaker], "content": said.strip()}
        for speaker, said in zip(parts[1::2], parts[2::2], strict=True)
    )

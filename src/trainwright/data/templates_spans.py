"""Which characters of a rendered conversation the assistant writes, turn by turn.

What is trained of a turn is what the model has to write when it is asked for one: all that comes
after the generation prompt, with the marks that end the turn, without the header before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainwright.data.examples import Conversation, Message, RowRefusedError
from trainwright.data.templates import ChatTemplate, Span

# Stands for an answer; of a private plane of Unicode, so that no text has it.
_STAND_IN = "\U000f0a11answer\U000f0a12"


def render_with_spans(
    template: ChatTemplate,
    conversation: Conversation,
    wanted: Sequence[int],
    marks: re.Pattern[str],
) -> tuple[str, list[Span]]:
    """A conversation's text, and the characters that the turns numbered `wanted` (from 0) write.

    `marks` matches the tokenizer's special tokens, none of which may be cut. The spans come from
    the template's `{% generation %}` blocks where it has them, else from rendering the conversation
    turn by turn. Raises RowRefusedError where the template does not tell what the assistant writes,
    and where it leaves out what is to be learned or the tools.
    """
    messages, tools = conversation.messages, conversation.tools
    if wanted and template.marks_answers(tools):
        text, spans = _from_marks(template, conversation, wanted, marks)
    else:
        text = template.render(messages, tools)
        turns = _Turns(template, conversation, text, marks)
        spans = [turns.span(turn) for turn in wanted]
        for turn, (begin, end) in zip(wanted, spans, strict=True):
            _require_kept(messages, turn, text[begin:end], template.name)
    _require_context(conversation, text, template.name)
    return text, spans


def _from_marks(
    template: ChatTemplate,
    conversation: Conversation,
    wanted: Sequence[int],
    marks: re.Pattern[str],
) -> tuple[str, list[Span]]:
    messages = conversation.messages
    text, marked = template.render_marked(messages, conversation.tools)
    if not marked:
        what = f"the chat template `{template.name}` marks nothing of this row as the assistant's"
        raise RowRefusedError(
            what, "put its answers between {% generation %} and {% endgeneration %}"
        )
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(marked) == len(answers):
        spans = [marked[answers.index(turn)] for turn in wanted]
        for turn, (begin, end) in zip(wanted, spans, strict=True):
            _require_kept(messages, turn, text[begin:end], template.name)
        return text, spans
    for turn in wanted:
        _require_kept(messages, turn, text, template.name)
    if len(wanted) == len(answers):
        return text, marked
    # Several marks a turn, and not all turns wanted: the marks that lie in the turns.
    turns = _Turns(template, conversation, text, marks)
    both = [
        (max(begin, mark[0]), min(end, mark[1]))
        for begin, end in map(turns.span, wanted)
        for mark in marked
    ]
    return text, [span for span in both if span[0] < span[1]]


class _Turns:
    """Finds the spans of turns in a rendered conversation by rendering other conversations."""

    def __init__(
        self,
        template: ChatTemplate,
        conversation: Conversation,
        text: str,
        marks: re.Pattern[str],
    ) -> None:
        self._template = template
        self._messages = conversation.messages
        self._tools = conversation.tools
        self._text = text
        self._marks = marks

    def span(self, turn: int) -> Span:
        """What turn number `turn` writes; RowRefusedError where that cannot be told."""
        text, messages = self._text, self._messages
        before = self._rendered(messages[:turn], prompt=True)
        bare = self._rendered(messages[:turn])
        asks = before is not None and before != bare  # whether the template has a header to add
        is_last = turn == len(messages) - 1
        after = text if is_last else self._rendered(messages[: turn + 1])
        # Where every turn adds to what was there, its span is what it adds.
        if (
            asks
            and before is not None
            and after is not None
            and after.startswith(before)
            and text.startswith(after)
        ):
            return len(before), len(after)
        return self._span_by_stand_in(turn, before, asks)

    def _span_by_stand_in(self, turn: int, before: str | None, asks: bool) -> Span:
        """The span of a turn that the template writes differently with other turns after it.

        Another answer in its place changes the text from where the answer begins to where it ends.
        """
        text, messages = self._text, self._messages
        stand_in: Message = {"role": "assistant", "content": _STAND_IN}
        whole = self._rendered([*messages[:turn], stand_in, *messages[turn + 1 :]])
        last = self._rendered([*messages[:turn], stand_in])
        if whole is None or last is None or whole.count(_STAND_IN) != 1:
            raise self._ambiguous(turn, "it refuses another answer in its place, or writes it anew")
        begin = _shared_length(text, whole)
        after_whole = whole[whole.index(_STAND_IN) + len(_STAND_IN) :]
        if not text.endswith(after_whole) or len(text) - len(after_whole) < begin:
            raise self._ambiguous(turn, "what it writes in other turns depends on this one")
        end = len(text) - len(after_whole)
        header_end, _, after_last = last.partition(_STAND_IN)
        end += self._length_of_end(after_whole, after_last, turn)
        if before is None:
            return begin, end
        if text.startswith(before) and (asks or not text[len(before) : begin].strip()):
            return min(len(before), begin), end
        # Text between the generation prompt and the answer (such as an empty thought) is the
        # model's to write, wherever the header stands now.
        if header_end.startswith(before):
            between = header_end[len(before) :]
            if (asks or not between.strip()) and text[:begin].endswith(between):
                begin -= len(between)
        return begin, end

    def _length_of_end(self, after_whole: str, after_last: str, turn: int) -> int:
        """Characters that end the turn: those that follow it in any case, no mark cut in two."""
        length = _shared_length(after_whole, after_last)
        cut = True
        while cut:
            cut = False
            for text in (after_whole, after_last):
                for mark in self._marks.finditer(text):
                    if mark.start() < length < mark.end():
                        length, cut = mark.start(), True
        if length < len(after_last) and not self._marks.search(after_last[:length]):
            raise self._ambiguous(turn, "it ends a turn otherwise when another follows")
        return length

    def _rendered(self, messages: Sequence[Message], *, prompt: bool = False) -> str | None:
        try:
            return self._template.render(messages, self._tools, add_generation_prompt=prompt)
        except RowRefusedError:
            return None

    def _ambiguous(self, turn: int, reason: str) -> RowRefusedError:
        return RowRefusedError(
            f"what the assistant writes in turn {turn + 1} cannot be told from the chat template "
            f"`{self._template.name}`: {reason}",
            "put the answers in the template between {% generation %} and {% endgeneration %}, "
            'or give the turn "train": false',
        )


def _require_kept(messages: Sequence[Message], turn: int, written: str, name: str) -> None:
    """Refuse a turn of which the template leaves out something that is to be learned.

    Reasoning may be missing from turns before the last one: templates drop it there on purpose.
    """
    message = messages[turn]
    flat = _without_space(written)
    is_last = turn == len(messages) - 1
    content: str = message["content"]
    answer = content if is_last else content.rpartition("</think>")[2]
    missing = ""
    if _without_space(answer) not in flat:
        missing = "part of the answer"
    elif is_last and _without_space(message.get("reasoning_content") or "") not in flat:
        missing = "the reasoning"
    for call in message.get("tool_calls") or ():
        if call["function"]["name"] not in written:
            missing = f"the call of `{call['function']['name']}`"
    if missing:
        what = f"the chat template `{name}` leaves out {missing} in turn {turn + 1}"
        raise RowRefusedError(
            what, "name a template that writes it (`qwen` has tools and reasoning)"
        )


def _require_context(conversation: Conversation, text: str, name: str) -> None:
    """Refuse a conversation of which the template leaves out a system message, question or tool."""
    flat = ""
    for number, message in enumerate(conversation.messages, start=1):
        content = message["content"].strip()
        if message["role"] not in ("system", "user") or content in text:
            continue
        flat = flat or _without_space(text)
        if _without_space(content) not in flat:
            place = "the system message" if message["role"] == "system" else f"turn {number}"
            what = f"the chat template `{name}` leaves out {place}"
            raise RowRefusedError(what, "name a template that writes it, or delete it from the row")
    names = [tool["function"].get("name", "") for tool in conversation.tools]
    if names and not any(each in text for each in names):
        what = f"the row has tools, but the chat template `{name}` does not write them"
        fix = "name a template that does (`qwen`, `llama3` or `mistral`), or delete `tools`"
        raise RowRefusedError(what, fix)


def _shared_length(one: str, other: str) -> int:
    """Characters with which both begin, found by halving: comparing slices is fast."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _without_space(text: str) -> str:
    return "".join(text.split())

"""Sequences of text as token ids, with a mask that says which of them are trained on.

Text is tokenised whole, as it is when the model is used; characters that are to be trained are then
looked up in the tokens. A token is trained if it holds any such character: so is the one that joins
a prompt's last space to the first word of the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from trainwright.data.encode import Encoder
from trainwright.data.examples import Conversation, Message, RowRefusedError, Text
from trainwright.data.templates import ChatTemplate, Span
from trainwright.data.templates_spans import render_with_spans
from trainwright.errors import Mistake, UserError

__all__ = [
    "Encoded",
    "Renderer",
    "RowRefusedError",
    "TrainOn",
    "cut",
    "encode_many",
    "encode_sequence",
]

TrainOn = Literal["completion", "assistant", "all"]

_AT_ONCE = 512  # sequences tokenised together
_STAND_IN = "\U000f0a13"  # an answer, to see what a template writes after one


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sequence, and which of them are targets.

    `trained` says of each token whether predicting it counts. It never holds for the first token,
    before which there is nothing to predict it from.
    """

    ids: NDArray[np.int64]  # [tokens]
    trained: NDArray[np.bool_]  # [tokens]

    @property
    def targets(self) -> int:
        """Tokens that are trained on."""
        return int(self.trained.sum())


class Renderer:
    """A saved tokenizer with a chat template: text and its tokens' places in it.

    `directory` is one that `tokenizers.save_tokenizer` wrote. Without a template only `Text` can be
    encoded. Raises UserError for a template that cannot write a plain answer, and for one that
    writes nothing to end it: its model could never learn to stop.
    """

    def __init__(self, directory: Path, template: ChatTemplate | None = None) -> None:
        self.template = template
        encoder = Encoder(directory)
        self._prefix, self._suffix = encoder.prefix, encoder.suffix
        self._eos_id = encoder.eos_id
        # In a rendered conversation the template's special tokens are tokens, whatever the
        # tokenizer makes of the same characters in plain text.
        self._chat = _bare_tokenizer(directory, split_special_tokens=False)
        config = json.loads((directory / "tokenizer_config.json").read_text())
        split = bool(config.get("split_special_tokens"))
        self._plain = _bare_tokenizer(directory, split_special_tokens=True) if split else self._chat
        added = self._chat.get_added_tokens_decoder().values()
        longest_first = sorted((each.content for each in added), key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        if template is not None:
            self._require_end(template)

    @cached_property
    def end_of_turn(self) -> str:
        """What the template writes after an answer, such as "<|im_end|>\\n"; "" without one."""
        if self.template is None:
            return ""
        asked = {"role": "user", "content": "?"}
        answer = {"role": "assistant", "content": _STAND_IN}
        text = self.template.render([asked, answer])
        if _STAND_IN not in text:
            what = f"the chat template `{self.template.name}` writes no plain text as an answer"
            raise RowRefusedError(what, "name another with `tokenizer.chat_template`")
        return text.partition(_STAND_IN)[2]

    @cached_property
    def stop_id(self) -> int | None:
        """The token at which an answer ends; None where the template ends it with plain text.

        Generation stops there. It need not be the tokenizer's EOS.
        """
        ids = self._chat.encode(self.end_of_turn, add_special_tokens=False).ids
        specials = self._chat.get_added_tokens_decoder()
        return next((token for token in ids if token in specials), None)

    def _require_end(self, template: ChatTemplate) -> None:
        try:
            end = self.end_of_turn
        except RowRefusedError as error:
            raise UserError(Mistake(error.what, error.fix)) from error
        if not end:
            what = f"the chat template `{template.name}` writes nothing after an answer"
            fix = "write {{ eos_token }} after the assistant's content, so that the model can stop"
            raise UserError(Mistake(what, fix))

    def prompt_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        **variables: Any,
    ) -> list[int]:
        """Tokens to generate an answer after, as they stand before an answer in training.

        `variables` are the template's own. Raises RowRefusedError where it refuses the turns, and
        without a template.
        """
        if self.template is None:
            raise _no_template()
        text = self.template.render(messages, tools, add_generation_prompt=True, **variables)
        return list(self._chat.encode(text, add_special_tokens=False).ids)

    def continued(self, prompt: str | Sequence[Message], answer: str = "") -> tuple[list[int], int]:
        """Tokens of a prompt that an answer follows, and how many of them hold nothing of it.

        The prompt is plain text, or turns for the template. Text is tokenised whole: the token that
        joins the prompt's last space to the answer's first word belongs to the answer. Raises
        RowRefusedError as `prompt_ids` does.
        """
        chat = not isinstance(prompt, str)
        if isinstance(prompt, str):
            text = prompt
        elif self.template is not None:
            text = self.template.render(prompt, add_generation_prompt=True)
        else:
            raise _no_template()
        [encoding] = self.encodings([text + answer], chat=chat)
        prefix = self._prefix
        if chat or encoding.ids[: len(prefix)] == prefix:
            prefix = []
        answered = _tokens_in(encoding, [(len(text), len(text + answer))])
        before = int(answered.argmax()) if answered.any() else len(answered)
        return [*prefix, *encoding.ids], len(prefix) + before

    def place(self, sequence: Text | Conversation, train_on: TrainOn) -> tuple[str, list[Span]]:
        """A sequence's text, and its characters that are trained. Raises RowRefusedError."""
        if isinstance(sequence, Text):
            text = sequence.prompt + sequence.completion
            spans = [(0 if train_on == "all" else len(sequence.prompt), len(text))]
        else:
            text, spans = self._place_conversation(sequence, train_on)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                what = "the text holds half a surrogate pair, which no tokenizer can read"
                raise RowRefusedError(what, "mend or delete the row") from None
        return text, spans

    def _place_conversation(
        self, conversation: Conversation, train_on: TrainOn
    ) -> tuple[str, list[Span]]:
        if self.template is None:
            raise _no_template()
        answers = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        left_out = [i for i in answers if conversation.messages[i].get("train") is False]
        if train_on == "all":
            text, spans = render_with_spans(self.template, conversation, left_out, self._marks)
            ends = [0, *(end for _, end in spans)]
            return text, list(zip(ends, [*(begin for begin, _ in spans), len(text)], strict=True))
        first = conversation.first if train_on == "completion" else 0
        wanted = [i for i in answers if i >= first and i not in left_out]
        if not wanted:
            what = "no turn of the assistant is trained on"
            raise RowRefusedError(what, 'delete the row, or mark a turn with "train": true')
        return render_with_spans(self.template, conversation, wanted, self._marks)

    def encodings(self, texts: Sequence[str], *, chat: bool) -> list[Encoding]:
        """Tokens of texts with the characters that each stands for, without BOS and EOS."""
        return (self._chat if chat else self._plain).encode_batch(texts, add_special_tokens=False)

    def finish(self, encoding: Encoding, spans: Sequence[Span], *, chat: bool) -> Encoded:
        """Ids and mask of an encoded text: plain text gets BOS and EOS, a chat has its own.

        Neither is ever written twice. Raises RowRefusedError where nothing is trained on.
        """
        ids = encoding.ids
        trained = _tokens_in(encoding, spans)
        if not chat:
            prefix = [] if ids[: len(self._prefix)] == self._prefix else self._prefix
            suffix = [] if ids[-1:] == [self._eos_id] else self._suffix
            ids = [*prefix, *ids, *suffix]
            around = np.zeros(len(prefix), np.bool_), trained, np.ones(len(suffix), np.bool_)
            trained = np.concatenate(around)
        trained[:1] = False
        if not trained.any():
            raise RowRefusedError("no token of the row is trained on", "delete the row")
        return Encoded(np.array(ids, np.int64), trained)


def encode_sequence(
    sequence: Text | Conversation, renderer: Renderer, *, train_on: TrainOn = "completion"
) -> Encoded:
    """Ids and mask of one sequence.

    `train_on` "completion" trains the completion of a text and the assistant's turns from a
    conversation's `first` on; "assistant" all turns of the assistant; "all" every token. Turns with
    "train": false are left out in any case. Raises RowRefusedError for a sequence that the template
    cannot write, or of which nothing would be trained.
    """
    [encoded] = encode_many([sequence], renderer, train_on=train_on)
    if isinstance(encoded, RowRefusedError):
        raise encoded
    return encoded


def encode_many(
    sequences: Iterable[Text | Conversation],
    renderer: Renderer,
    *,
    train_on: TrainOn = "completion",
) -> Iterator[Encoded | RowRefusedError]:
    """`encode_sequence` of many, in order and many at a time: a refusal takes its row's place."""
    waiting = iter(sequences)
    while group := list(islice(waiting, _AT_ONCE)):
        results: list[Encoded | RowRefusedError | None] = [None] * len(group)
        placed: dict[int, tuple[str, list[Span]]] = {}
        for number, sequence in enumerate(group):
            try:
                placed[number] = renderer.place(sequence, train_on)
            except RowRefusedError as error:
                results[number] = error
        for chat in (False, True):
            numbers = [i for i in placed if isinstance(group[i], Conversation) is chat]
            encodings = renderer.encodings([placed[i][0] for i in numbers], chat=chat)
            for number, encoding in zip(numbers, encodings, strict=True):
                try:
                    results[number] = renderer.finish(encoding, placed[number][1], chat=chat)
                except RowRefusedError as error:
                    results[number] = error
        for result in results:
            assert result is not None
            yield result


def cut(encoded: Encoded, length: int, keep: Literal["start", "end"] = "start") -> Encoded | None:
    """The first or last `length` tokens; None where no target is among them.

    The first token that is kept is no target any more: what it followed is gone.
    """
    if len(encoded.ids) <= length:
        return encoded
    kept = slice(None, length) if keep == "start" else slice(len(encoded.ids) - length, None)
    trained = encoded.trained[kept].copy()
    trained[:1] = False
    return Encoded(encoded.ids[kept], trained) if trained.any() else None


def _no_template() -> RowRefusedError:
    what = "the row is a conversation, but the tokenizer has no chat template"
    return RowRefusedError(
        what, "name one: `chatml`, `plain` or a file, as `tokenizer.chat_template`"
    )


def _tokens_in(encoding: Encoding, spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Which tokens hold a character of a span. [tokens]"""
    places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    begins = places[:, 0]
    # Some tokens stand for no character (a space put before the text): they count where they are.
    ends = np.maximum(places[:, 1], begins + 1)
    trained = np.zeros(len(places), np.bool_)
    for begin, end in spans:
        trained |= (begins < end) & (ends > begin)
    return trained


def _bare_tokenizer(directory: Path, *, split_special_tokens: bool) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # What it would add is added here; and GPT-2's would also take the spaces from a token's place.
    tokenizer.post_processor = None
    tokenizer.encode_special_tokens = split_special_tokens
    return tokenizer

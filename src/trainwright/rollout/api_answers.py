"""What the server answers: OpenAI's JSON objects, whole or as the events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"


@dataclass
class Choice:
    """One continuation, as far as it has come."""

    index: int
    text: str = ""
    tokens: int = 0
    reason: str | None = None


@dataclass(frozen=True)
class Answer:
    """The frame that the choices of one request stand in; `chat` or plain text."""

    chat: bool
    model: str
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, choices: Sequence[Choice]) -> Json:
        """The answer to a request that is no stream."""
        listed = []
        for choice in choices:
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            said = {"message": message} if self.chat else {"text": choice.text}
            listed.append(self._choice(choice.index, said, choice.reason))
        kind = "chat.completion" if self.chat else "text_completion"
        return self._framed(kind, listed, usage=self.usage(choices))

    def piece(
        self, index: int, text: str, reason: str | None = None, *, role: bool = False
    ) -> Json:
        """An event with the next text of a choice, or what it ends with."""
        delta: Json = {"role": "assistant"} if role else {}
        if text or role:
            delta["content"] = text
        said = {"delta": delta} if self.chat else {"text": text}
        return self._framed(self._event, [self._choice(index, said, reason)])

    def counted(self, choices: Sequence[Choice]) -> Json:
        """The event that tells the tokens' numbers, for `include_usage`."""
        return self._framed(self._event, [], usage=self.usage(choices))

    def usage(self, choices: Sequence[Choice]) -> Json:
        """Tokens of the prompts, each once, and of all choices."""
        made = sum(choice.tokens for choice in choices)
        prompt = self.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
        }

    @property
    def _event(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _choice(self, index: int, said: Json, reason: str | None) -> Json:
        return {"index": index, **said, "logprobs": None, "finish_reason": reason}

    def _framed(self, kind: str, choices: list[Json], **more: Any) -> Json:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.number}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


def event(value: Mapping[str, Any]) -> bytes:
    """A JSON object as a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()

"""From tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Tokens of the prompt that the first new ones are decoded with: a tokenizer may write a token
# otherwise at the beginning of a text (without its space) than inside it.
CONTEXT = 6


class Detokenizer:
    """Turns one text's new tokens into characters, holding back those that are not yet whole."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.tokens = list(prompt[-CONTEXT:])
        self.start = 0  # the context begins here
        self.read = len(self.tokens)  # tokens before this are written

    def add(self, token: int) -> str:
        """The characters that `token` completes; empty while one is incomplete."""
        self.tokens.append(token)
        text = self._unwritten()
        if text.endswith("�"):
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        """What was held back, with incomplete characters as the tokenizer shows them."""
        text = self._unwritten()
        self._advance()
        return text

    def _advance(self) -> None:
        self.start, self.read = self.read, len(self.tokens)

    def _unwritten(self) -> str:
        whole = self._decode(self.tokens[self.start :])
        return whole[len(self._decode(self.tokens[self.start : self.read])) :]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class StopScanner:
    """Passes text on until one of the stop strings appears, in however many pieces it comes."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""  # may be the beginning of a stop string

    def add(self, text: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string has been met."""
        self.held += text
        places = [self.held.find(stop) for stop in self.stops]
        met = [place for place in places if place >= 0]
        if met:
            shown, self.held = self.held[: min(met)], ""
            return shown, True
        safe = len(self.held) - self._beginning()
        shown, self.held = self.held[:safe], self.held[safe:]
        return shown, False

    def flush(self) -> str:
        """What was held back, once no more comes."""
        shown, self.held = self.held, ""
        return shown

    def _beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self.stops), default=0)
        for length in range(min(longest - 1, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-length:]) for stop in self.stops):
                return length
        return 0

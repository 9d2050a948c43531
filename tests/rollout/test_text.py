"""Text as it comes: whole characters, the tokenizer's own spaces, nothing of a stop string."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rollout.byte_tokenizer import byte_tokenizer
from trainwright.rollout.text import Detokenizer, StopScanner

TEXT = "naïve 日本 🙂 — done\n"


def test_characters_are_never_split() -> None:
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer, tokenizer("Lily: ")["input_ids"])
    tokens = tokenizer(TEXT)["input_ids"]
    assert len(tokens) > len(TEXT)
    pieces = [detokenizer.add(token) for token in tokens]
    assert [piece for piece in pieces if piece] == list(TEXT)


def test_a_character_cut_off_is_shown_as_the_tokenizer_shows_it() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer("ab🙂")["input_ids"][:-1]
    detokenizer = Detokenizer(tokenizer, [])
    pieces = [detokenizer.add(token) for token in tokens] + [detokenizer.flush()]
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert pieces[:2] == ["a", "b"]


@pytest.mark.shared
@pytest.mark.parametrize("split", [0, 1, 9])
def test_spaces_are_those_of_the_whole_text(shared: Path, split: int) -> None:
    """Sentencepiece's first token drops its space; a continuation's must not."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "weights" / "stories260K_hf")
    tokens = tokenizer("Once upon a time, there was a café.\nShe said: 好")["input_ids"]
    detokenizer = Detokenizer(tokenizer, tokens[: split + 1])
    text = "".join(detokenizer.add(token) for token in tokens[split + 1 :]) + detokenizer.flush()
    head = tokenizer.decode(tokens[: split + 1], skip_special_tokens=True)
    assert head + text == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "met"),
    [
        (["one two three"], ["two"], "one ", True),
        (["one t", "w", "o three"], ["two"], "one ", True),
        (["one t", "wi", "ce"], ["two"], "one twice", False),
        (["aa", "ab"], ["aab"], "a", True),
        (["x<e", "nd", ">y"], ["<end>", "<e n"], "x", True),
        (["abc"], ["c", "b"], "a", True),
        (["abab", "abac"], ["abac"], "abab", True),
        (["ends with th"], ["the"], "ends with th", False),
        (["no stops"], [], "no stops", False),
    ],
)
def test_stop_strings_across_pieces(
    pieces: list[str], stops: list[str], shown: str, met: bool
) -> None:
    scanner = StopScanner(stops)
    text, found = "", False
    for piece in pieces:
        part, found = scanner.add(piece)
        text += part
        assert shown.startswith(text)
        if found:
            break
    assert found == met
    assert text + ("" if found else scanner.flush()) == shown


def test_text_that_cannot_begin_a_stop_string_is_not_held_back() -> None:
    scanner = StopScanner(["\n\n", "User:"])
    assert scanner.add("Hello U")[0] == "Hello "
    assert scanner.add("p")[0] == "Up"
    assert scanner.add(" there\n")[0] == " there"

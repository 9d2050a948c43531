"""Text to token ids with a saved tokenizer, in threads, without importing transformers.

The ids are those that the directory's AutoTokenizer gives; each document ends with EOS.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

Tokens = NDArray[Any]  # uint16 or uint32

# A document longer than two pieces is encoded piece by piece: the library needs some 200 bytes a
# token, and one text runs on one thread only.
_PIECE = 1 << 18  # characters
_OVERLAP = 1 << 12  # characters that a piece shares with the next
_AGREEING = 16  # tokens in a row on which two pieces must agree before they are joined there
_PIECES_AT_ONCE = 8

_BYTE_FALLBACK = re.compile("<0x[0-9A-F]{2}>")  # how SentencePiece writes a byte


def byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}


class Encoder:
    """A saved tokenizer: ids of whole documents, and of its special tokens.

    `prefix` and `suffix` are what its post-processor puts around a text (usually BOS, or nothing).
    `pad_id` and `eos_id` exist in every directory that `tokenizers.save_tokenizer` wrote.
    """

    def __init__(self, directory: Path) -> None:
        self._backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
        # Some saved tokenizers cut every text at a length somebody once used.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._config = json.loads((directory / "tokenizer_config.json").read_text())
        self._backend.encode_special_tokens = bool(self._config.get("split_special_tokens"))
        self.bos_id = self._special("bos_token")
        self.eos_id = self._special("eos_token")
        self.pad_id = self._special("pad_token")
        around = self._backend.encode("a").ids
        bare = self._backend.encode("a", add_special_tokens=False).ids
        begin = next(i for i in range(len(around)) if around[i : i + len(bare)] == bare)
        self.prefix = around[:begin]
        self.suffix = around[begin + len(bare) :]
        if self.eos_id is not None and (not self.suffix or self.suffix[-1] != self.eos_id):
            self.suffix = [*self.suffix, self.eos_id]

    @cached_property
    def vocabulary(self) -> int:
        """Rows that an embedding needs: the highest id and one."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest type that holds every id."""
        return np.uint16 if self.vocabulary <= 1 << 16 else np.uint32

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Ids of each document: prefix, text, suffix and EOS, as `dtype`."""
        short = [i for i, text in enumerate(texts) if len(text) <= 2 * _PIECE]
        encodings = self._backend.encode_batch_fast(
            [texts[i] for i in short], add_special_tokens=False
        )
        by_index = dict(zip(short, encodings, strict=True))
        return [
            self._wrapped(
                np.array(by_index[i].ids, self.dtype) if i in by_index else self._encode_long(text)
            )
            for i, text in enumerate(texts)
        ]

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of text that a token stands for; nothing for special tokens."""
        piece = self._backend.id_to_token(token)
        if piece is None or token in self.specials:
            return b""
        if self._is_byte_level and all(character in _BYTE_OF for character in piece):
            return bytes(_BYTE_OF[character] for character in piece)
        if _BYTE_FALLBACK.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    @cached_property
    def specials(self) -> dict[int, str]:
        """Special tokens by id."""
        added = self._backend.get_added_tokens_decoder()
        return {token: each.content for token, each in added.items() if each.special}

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = json.loads(self._backend.to_str())["decoder"] or {}
        parts = [decoder, *decoder.get("decoders", ())]
        return any(part.get("type") == "ByteLevel" for part in parts)

    def _special(self, name: str) -> int | None:
        token = self._config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        return None if content is None else self._backend.token_to_id(content)

    def _wrapped(self, ids: Tokens) -> Tokens:
        dtype = self.dtype
        around = np.array(self.prefix, dtype), ids, np.array(self.suffix, dtype)
        return np.concatenate(around)

    def _encode_long(self, text: str) -> Tokens:
        """The ids of one encoding of `text`, from overlapping pieces.

        Each piece is joined to the next at a place, well inside their overlap, from which both
        give the same tokens; a tokenizer that nowhere agrees with itself gets the text whole.
        """
        starts = range(0, len(text) - _OVERLAP, _PIECE)
        joined: list[Tokens] = []
        last: tuple[Encoding, Tokens] | None = None
        begin = 0  # tokens of `last` before this one are another piece's
        for group in range(0, len(starts), _PIECES_AT_ONCE):
            pieces = [
                text[start : start + _PIECE + _OVERLAP]
                for start in starts[group : group + _PIECES_AT_ONCE]
            ]
            for encoding in self._backend.encode_batch(pieces, add_special_tokens=False):
                piece = encoding, np.array(encoding.ids, self.dtype)
                if last is not None:
                    cut = _agreement(last, piece)
                    if cut is None:
                        whole = self._backend.encode_batch_fast([text], add_special_tokens=False)
                        return np.array(whole[0].ids, self.dtype)
                    joined.append(last[1][begin : cut[0]])
                    begin = cut[1]
                last = piece
        assert last is not None
        return np.concatenate([*joined, last[1][begin:]])


def _agreement(
    earlier: tuple[Encoding, Tokens], later: tuple[Encoding, Tokens]
) -> tuple[int, int] | None:
    """Indices, in each of two overlapping pieces, of the token where both start to agree."""
    # The first characters of the later piece and the last of the earlier one lack their context.
    for place in range(_OVERLAP // 4, _OVERLAP // 2):
        first = _token_starting_at(earlier[0], _PIECE + place)
        second = _token_starting_at(later[0], place)
        if first is None or second is None:
            continue
        a = earlier[1][first : first + _AGREEING]
        b = later[1][second : second + _AGREEING]
        if len(a) == _AGREEING and np.array_equal(a, b):
            return first, second
    return None


def _token_starting_at(encoding: Encoding, character: int) -> int | None:
    """The first token of a character, if it begins there."""
    token = encoding.char_to_token(character)
    characters = None if token is None else encoding.token_to_chars(token)
    return token if characters is not None and characters[0] == character else None

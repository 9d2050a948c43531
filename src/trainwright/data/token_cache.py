"""One source as tokens on disk: written once, streamed, then memory-mapped by every worker.

A folder of flat little-endian arrays, one a column; `folders` sees to it that they are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainwright.data.digests import text_hash
from trainwright.data.encode import Encoder
from trainwright.data.folders import has_its_sizes, read_facts
from trainwright.data.readers import Document

FORMAT = 1  # part of every key: a change of layout or meaning makes new caches

_ARRAYS: dict[str, np.dtype[Any]] = {
    "offsets": np.dtype("<i8"),  # [documents + 1], in tokens
    "text_bytes": np.dtype("<i8"),  # [documents], UTF-8 bytes of the text
    "lead_bytes": np.dtype("<i8"),  # [documents], of its first token where no BOS goes before it
    "text_hashes": np.dtype("<u8"),  # [documents], of the text
    "names": np.dtype("u1"),  # ids end to end, UTF-8
    "name_offsets": np.dtype("<i8"),  # [documents + 1]
}
_BATCH_CHARACTERS = 1 << 22  # of text held and encoded at once
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class TokenCache:
    """The tokens of one source, memory-mapped.

    `tokens` uint16 or uint32 [tokens]; document `i` is `tokens[offsets[i] : offsets[i + 1]]`, with
    its BOS (where the tokenizer adds one) and its EOS.
    """

    directory: Path
    facts: dict[str, Any]

    @cached_property
    def tokens(self) -> NDArray[np.integer]:
        return self._map("tokens", np.dtype(self.facts["dtype"]))

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        return self._map("offsets", _ARRAYS["offsets"])

    @cached_property
    def text_bytes(self) -> NDArray[np.int64]:
        return self._map("text_bytes", _ARRAYS["text_bytes"])

    @cached_property
    def lead_bytes(self) -> NDArray[np.int64]:
        return self._map("lead_bytes", _ARRAYS["lead_bytes"])

    @cached_property
    def text_hashes(self) -> NDArray[np.uint64]:
        return self._map("text_hashes", _ARRAYS["text_hashes"])

    @property
    def documents(self) -> int:
        """Documents in the source, without the empty ones."""
        return self.facts["documents"]

    @property
    def dropped(self) -> int:
        """Documents left out because they were empty or only white space."""
        return self.facts["dropped"]

    def name(self, document: int) -> str:
        """The id of a document, as its source gave it."""
        begin, end = self._name_offsets[document : document + 2]
        return self._names[begin:end].tobytes().decode(errors="replace")

    @cached_property
    def _names(self) -> NDArray[np.uint8]:
        return self._map("names", _ARRAYS["names"])

    @cached_property
    def _name_offsets(self) -> NDArray[np.int64]:
        return self._map("name_offsets", _ARRAYS["name_offsets"])

    def _map(self, name: str, dtype: np.dtype) -> Any:
        return np.memmap(self.directory / f"{name}.bin", dtype=dtype, mode="r")


def open_cache(directory: Path) -> TokenCache | None:
    """The cache in `directory`, or None if it is missing, unfinished or of the wrong size."""
    if not has_its_sizes(directory):
        return None
    return TokenCache(directory, read_facts(directory))


def write_cache(
    directory: Path,
    documents: Iterable[Document],
    encoder: Encoder,
    *,
    dropped: Callable[[], int],
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Encode `documents` into the empty folder `directory`; returns `TokenCache.facts`.

    Only a batch of documents is held at a time. `dropped()` is asked at the end for the number of
    empty documents; `progress(documents, text bytes)` is told after every batch. A document that
    the tokenizer turns into nothing counts as empty too.
    """
    columns = {name: _Column(directory, name, dtype) for name, dtype in _ARRAYS.items()}
    columns["tokens"] = _Column(directory, "tokens", np.dtype(encoder.dtype).newbyteorder("<"))
    count = empty = position = name_position = text_total = 0
    around = len(encoder.prefix) + len(encoder.suffix)
    columns["offsets"].write([0])
    columns["name_offsets"].write([0])
    try:
        for batch in _batches(documents):
            encoded = encoder.encode([document.text for document in batch])
            pairs = [(d, t) for d, t in zip(batch, encoded, strict=True) if len(t) > around]
            empty += len(batch) - len(pairs)
            names = [d.id.encode(errors="backslashreplace") for d, _ in pairs]
            sizes = [len(d.text.encode()) for d, _ in pairs]
            for _, tokens in pairs:
                columns["tokens"].write(tokens)
            columns["offsets"].write(position + np.cumsum([len(t) for _, t in pairs], dtype="i8"))
            columns["name_offsets"].write(
                name_position + np.cumsum(list(map(len, names)), dtype="i8")
            )
            columns["names"].write(np.frombuffer(b"".join(names), "u1"))
            columns["text_bytes"].write(sizes)
            columns["lead_bytes"].write([_lead_bytes(encoder, t) for _, t in pairs])
            columns["text_hashes"].write(np.array([text_hash(d.text) for d, _ in pairs], "u8"))
            count += len(pairs)
            position += sum(len(tokens) for _, tokens in pairs)
            name_position += sum(map(len, names))
            text_total += sum(sizes)
            progress(count, text_total)
    finally:
        for column in columns.values():
            column.close()
    return {
        "dtype": columns["tokens"].dtype.str,
        "documents": count,
        "tokens": position,
        "text_bytes": text_total,
        "dropped": dropped() + empty,
    }


def _lead_bytes(encoder: Encoder, tokens: NDArray[np.integer]) -> int:
    """Bytes of a document that no token predicts: its first token's, unless BOS stands before."""
    return 0 if encoder.prefix else len(encoder.token_bytes(int(tokens[0])))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Column:
    """One array's file while it grows."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype) -> None:
        self.dtype = dtype
        self._file = (directory / f"{name}.bin").open("wb")

    def write(self, values: Any) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())

    def close(self) -> None:
        self._file.close()

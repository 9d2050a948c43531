"""One source as tokens on disk: written once, streamed, then memory-mapped by every worker.

A folder of flat little-endian arrays, one a column; `folders` sees to it that they are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
_EXAMPLE_ARRAYS: dict[str, np.dtype[Any]] = {
    "trained": np.dtype("u1"),  # [tokens]: 1 where the token is a target
    "part_lengths": np.dtype("<i8"),  # [documents * parts], tokens of each sequence
    "values": np.dtype("<f4"),  # [documents], what an objective knows of each
}
_BATCH_CHARACTERS = 1 << 22  # of text held and encoded at once
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class TokenCache:
    """The tokens of one source, memory-mapped.

    `tokens` uint16 or uint32 [tokens]; document `i` is `tokens[offsets[i] : offsets[i + 1]]`, with
    its BOS (where the tokenizer adds one) and its EOS. Documents that are examples have `parts`
    sequences, end to end, and say of each token whether it is trained.
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
    def parts(self) -> int:
        """Sequences of each document."""
        return self.facts.get("parts", 1)

    @cached_property
    def trained(self) -> NDArray[np.uint8] | None:
        """Whether each token is a target; None where all are."""
        return self._map("trained", _EXAMPLE_ARRAYS["trained"]) if "parts" in self.facts else None

    @cached_property
    def part_lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence [documents, parts]."""
        if "parts" not in self.facts:
            return np.diff(self.offsets)[:, None]
        flat = self._map("part_lengths", _EXAMPLE_ARRAYS["part_lengths"])
        return flat.reshape(self.documents, self.parts)

    @cached_property
    def values(self) -> NDArray[np.float32] | None:
        """What the objective knows of each example: its label or margin."""
        return self._map("values", _EXAMPLE_ARRAYS["values"]) if "parts" in self.facts else None

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
    empty = 0
    around = len(encoder.prefix) + len(encoder.suffix)
    with CacheWriter(directory, encoder.dtype) as writer:
        for batch in _batches(documents):
            encoded = encoder.encode([document.text for document in batch])
            pairs = [(d, t) for d, t in zip(batch, encoded, strict=True) if len(t) > around]
            empty += len(batch) - len(pairs)
            writer.add(
                names=[d.id for d, _ in pairs],
                tokens=[tokens for _, tokens in pairs],
                text_bytes=[len(d.text.encode()) for d, _ in pairs],
                hashes=[text_hash(d.text) for d, _ in pairs],
                lead_bytes=[_lead_bytes(encoder, tokens) for _, tokens in pairs],
            )
            progress(writer.documents, writer.text_bytes)
    return writer.facts | {"dropped": dropped() + empty}


class CacheWriter:
    """A cache while it grows, in an empty folder.

    With `parts`, documents are examples of so many sequences each.
    """

    def __init__(self, directory: Path, dtype: type[np.integer], parts: int | None = None) -> None:
        arrays = _ARRAYS | (_EXAMPLE_ARRAYS if parts else {})
        self._columns = {name: _Column(directory, name, kind) for name, kind in arrays.items()}
        self._columns["tokens"] = _Column(directory, "tokens", np.dtype(dtype).newbyteorder("<"))
        self._parts = parts
        self.documents = self.tokens = self.text_bytes = self._name_position = 0
        self._write("offsets", [0])
        self._write("name_offsets", [0])

    def add(
        self,
        *,
        names: Sequence[str],
        tokens: Sequence[NDArray[np.integer]],
        text_bytes: Sequence[int],
        hashes: Sequence[int],
        lead_bytes: Sequence[int],
        **columns: Any,
    ) -> None:
        """Append documents; for examples also `trained`, `part_lengths` and `values`."""
        encoded_names = [name.encode(errors="backslashreplace") for name in names]
        for each in tokens:
            self._write("tokens", each)
        lengths = [len(each) for each in tokens]
        self._write("offsets", self.tokens + np.cumsum(lengths, dtype="i8"))
        sizes = np.cumsum([len(name) for name in encoded_names], dtype="i8")
        self._write("name_offsets", self._name_position + sizes)
        self._write("names", np.frombuffer(b"".join(encoded_names), "u1"))
        self._write("text_bytes", text_bytes)
        self._write("lead_bytes", lead_bytes)
        self._write("text_hashes", np.array(hashes, "u8"))
        for name, values in columns.items():
            self._write(name, values)
        self.documents += len(names)
        self.tokens += sum(lengths)
        self.text_bytes += sum(text_bytes)
        self._name_position += sum(map(len, encoded_names))

    @property
    def facts(self) -> dict[str, Any]:
        """What `TokenCache.facts` holds, but for what was dropped."""
        facts = {
            "dtype": self._columns["tokens"].dtype.str,
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
        }
        return facts | ({"parts": self._parts} if self._parts else {})

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for column in self._columns.values():
            column.close()

    def _write(self, name: str, values: Any) -> None:
        self._columns[name].write(values)


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

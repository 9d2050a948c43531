"""Chosen documents of several token caches, seen as one list with one token address space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainwright.data.token_cache import TokenCache

Ints = NDArray[np.int64]


class Corpus:
    """Documents `0 … documents - 1`, taken from `caches` in order.

    `chosen` holds for each cache the indices of its documents that belong here. Addresses count
    the tokens of all caches end to end: document `i` is at `starts[i] … starts[i] + lengths[i]`.
    `names` goes before the ids of each cache's documents, where there are several caches.
    """

    def __init__(
        self, caches: Sequence[TokenCache], chosen: Sequence[Ints], names: Sequence[str]
    ) -> None:
        self._caches, self._chosen, self._names = list(caches), list(chosen), list(names)
        self._bases = np.cumsum([0, *(len(cache.tokens) for cache in caches)])
        self._firsts = np.cumsum([0, *map(len, chosen)])
        offsets = [np.asarray(cache.offsets) for cache in caches]
        pairs = list(zip(offsets, chosen, strict=True))
        self.parts = caches[0].parts if caches else 1
        # What a reference makes of each sequence [documents, parts], if it was asked beforehand.
        self.reference: NDArray[np.float32] | None = None
        self.lengths: Ints = np.concatenate([o[c + 1] - o[c] for o, c in pairs])
        self.starts: Ints = np.concatenate(
            [o[c] + base for (o, c), base in zip(pairs, self._bases, strict=False)]
        )

    @property
    def caches(self) -> list[TokenCache]:
        """Where the documents are from."""
        return self._caches

    def set_reference(self, scores: Mapping[Path, NDArray[np.float32]]) -> None:
        """Take up a reference's scores of all documents of each cache [documents, parts].

        They go by the caches' directories.
        """
        pairs = zip(self._caches, self._chosen, strict=True)
        self.reference = np.concatenate([scores[each.directory][chosen] for each, chosen in pairs])

    @property
    def documents(self) -> int:
        """Documents here."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Their tokens, BOS and EOS included."""
        return int(self.lengths.sum())

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of their texts."""
        return self._total("text_bytes")

    @property
    def lead_bytes(self) -> int:
        """Bytes of first tokens that nothing predicts; 0 where the tokenizer adds a BOS."""
        return self._total("lead_bytes")

    @property
    def is_masked(self) -> bool:
        """Whether its documents are examples, of which some tokens only are trained."""
        return self._caches[0].trained is not None

    @property
    def targets(self) -> int:
        """Tokens that are predicted: all but each document's first; of examples those trained."""
        if not self.is_masked:
            return self.tokens - self.documents
        total = 0
        for cache, chosen in zip(self._caches, self._chosen, strict=True):
            assert cache.trained is not None
            before = np.concatenate([[0], np.cumsum(cache.trained, dtype=np.int64)])
            offsets = np.asarray(cache.offsets)
            total += int((before[offsets[chosen + 1]] - before[offsets[chosen]]).sum())
        return total

    def read(self, addresses: Ints) -> Ints:
        """The tokens at `addresses`."""
        return self._read("tokens", addresses)

    def trained(self, addresses: Ints) -> NDArray[np.bool_]:
        """Whether the tokens at `addresses` are targets; for examples only."""
        return self._read("trained", addresses).astype(bool)

    def part_lengths(self, documents: Ints) -> Ints:
        """Tokens of each sequence of these documents [documents, parts]."""
        return self._of_documents("part_lengths", documents, (self.parts,), np.int64)

    def values(self, documents: Ints) -> NDArray[np.float32]:
        """What the objective knows of these examples [documents]."""
        return self._of_documents("values", documents, (), np.float32)

    def _read(self, column: str, addresses: Ints) -> Ints:
        if len(self._caches) == 1:
            return getattr(self._caches[0], column)[addresses].astype(np.int64)
        found = np.empty(len(addresses), dtype=np.int64)
        owner = np.searchsorted(self._bases, addresses, side="right") - 1
        for index in np.unique(owner).tolist():
            here = owner == index
            found[here] = getattr(self._caches[index], column)[addresses[here] - self._bases[index]]
        return found

    def _of_documents(
        self, column: str, documents: Ints, shape: tuple[int, ...], dtype: Any
    ) -> NDArray[Any]:
        found = np.empty((len(documents), *shape), dtype=dtype)
        owner = np.searchsorted(self._firsts, documents, side="right") - 1
        for index in np.unique(owner).tolist():
            here = owner == index
            inside = self._chosen[index][documents[here] - self._firsts[index]]
            found[here] = getattr(self._caches[index], column)[inside]
        return found

    def name(self, document: int) -> str:
        """The id of a document; with its source's name before it where there are several."""
        cache, inside = self._place(document)
        name = self._caches[cache].name(inside)
        return f"{self._names[cache]}/{name}" if len(self._caches) > 1 else name

    def bytes_of(self, document: int) -> int:
        """UTF-8 bytes of a document's text."""
        cache, inside = self._place(document)
        return int(self._caches[cache].text_bytes[inside])

    def _place(self, document: int) -> tuple[int, int]:
        cache = int(np.searchsorted(self._firsts, document, side="right")) - 1
        return cache, int(self._chosen[cache][document - self._firsts[cache]])

    def _total(self, column: str) -> int:
        pairs = zip(self._caches, self._chosen, strict=True)
        return sum(int(getattr(cache, column)[chosen].sum()) for cache, chosen in pairs)

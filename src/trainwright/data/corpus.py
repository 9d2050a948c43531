"""Chosen documents of several token caches, seen as one list with one token address space."""

from __future__ import annotations

from collections.abc import Sequence

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
        self.lengths: Ints = np.concatenate([o[c + 1] - o[c] for o, c in pairs])
        self.starts: Ints = np.concatenate(
            [o[c] + base for (o, c), base in zip(pairs, self._bases, strict=False)]
        )

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

    def read(self, addresses: Ints) -> Ints:
        """The tokens at `addresses`."""
        if len(self._caches) == 1:
            return self._caches[0].tokens[addresses].astype(np.int64)
        tokens = np.empty(len(addresses), dtype=np.int64)
        owner = np.searchsorted(self._bases, addresses, side="right") - 1
        for index in np.unique(owner).tolist():
            here = owner == index
            tokens[here] = self._caches[index].tokens[addresses[here] - self._bases[index]]
        return tokens

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

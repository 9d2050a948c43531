"""`batch(step)`: the rows that a step trains on, a pure function of data, seed and step.

Nothing is iterated and nothing remembered but a few epochs' layouts, so any worker can ask for
any rows of any step, in any order, and a resumed run sees what an unbroken one would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from trainwright.data.corpus import Corpus
from trainwright.data.order import EndToEnd, Interleaving, row_shares, shuffled
from trainwright.data.packing import Layout, Packing, pack, ranges

IGNORED = -100  # a label that is not trained

# A mixture's source smaller than this many rows is packed several passes at a time, lest its
# rows be mostly padding.
_ROWS_WORTH_PACKING = 64


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, all arrays [rows, sequence].

    `labels[r, i]` is the token to predict at position `i`, already shifted: the next token of the
    same document, also where that stands in another row; -100 at a document's last token and at
    padding. `position_ids` restart at each document, and at the beginning of a row. `segment_ids`
    number the documents in a row from 0, padding is -1; None if every row is one document without
    padding. `documents` names the documents in each row.

    Of examples, some tokens only are trained, and labels are -100 at the others. An example may
    have several sequences: each then counts as a document but for its name, so that of pairs the
    chosen answers have even segments and the rejected odd ones. `values` [rows, most examples in a
    row] is what the objective knows of each example, 0 where a row has fewer; `reference` [rows,
    most sequences in a row] likewise what a reference makes of each sequence, if that is known.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    segment_ids: NDArray[np.int32] | None
    documents: tuple[tuple[str, ...], ...]
    values: NDArray[np.float32] | None = None
    reference: NDArray[np.float32] | None = None

    @property
    def examples(self) -> int:
        """Documents or examples in the batch."""
        return sum(map(len, self.documents))

    @property
    def weight(self) -> int:
        """Trained targets in the batch."""
        return int(np.count_nonzero(self.labels != IGNORED))

    def row_hashes(self) -> list[int]:
        """A 63-bit hash of each row's ids, labels and segments: equal rows, equal hashes."""
        segments = self.segment_ids
        if segments is None:
            segments = np.zeros(self.input_ids.shape, dtype=np.int32)
        hashes = []
        for row in zip(self.input_ids, self.labels, segments, strict=True):
            content = b"".join(np.ascontiguousarray(part).tobytes() for part in row)
            value = hashlib.blake2b(content, digest_size=8).digest()
            hashes.append(int.from_bytes(value, "little") >> 1)
        return hashes


class Stream:
    """A corpus as an endless stream of rows, reshuffled each round.

    A round is `passes` passes over the documents, packed together. It always has the same number
    of rows, because every packing's count depends on the documents' lengths alone.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        packing: Packing,
        sequence_length: int,
        seed: int,
        number: int = 0,
        shuffle: bool = True,
        passes: int = 1,
    ) -> None:
        self.corpus, self.packing, self.sequence_length = corpus, packing, sequence_length
        self.seed, self.number, self.shuffle, self.passes = seed, number, shuffle, passes
        self.layout = lru_cache(maxsize=2)(self._layout)

    def _layout(self, round: int) -> Layout:
        passes = range(round * self.passes, (round + 1) * self.passes)
        order = np.concatenate([self._documents(number) for number in passes])
        layout = pack(self.packing, self.corpus.lengths, order, self.sequence_length)
        if not self.shuffle:
            return layout
        # Rows too: a long document would otherwise fill whole batches, one after the other.
        return layout.reordered(shuffled(layout.rows, self.seed, "rows", self.number, round))

    def _documents(self, number: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.corpus.documents)
        return shuffled(self.corpus.documents, self.seed, "documents", self.number, number)

    @cached_property
    def rows(self) -> int:
        """Rows in a round."""
        return self.layout(0).rows


@dataclass(frozen=True)
class PackingFigures:
    """How well documents fill the rows of an epoch."""

    rows: int
    filled: float  # share of positions that are not padding
    longest: int  # tokens of the longest document
    split: int  # documents that stand in more than one row
    visible: float  # share of the rows' causal squares that lies within documents


@dataclass(frozen=True)
class ListedDocument:
    """A document as a list shows it."""

    name: str
    tokens: int
    text_bytes: int
    first_tokens: tuple[int, ...]


def mixture(
    corpora: Sequence[Corpus],
    weights: Sequence[float],
    *,
    packing: Packing,
    sequence_length: int,
    seed: int,
    shuffle: bool,
) -> tuple[list[Stream], Interleaving]:
    """A stream for each corpus, and how their rows alternate so that tokens go by `weights`.

    An epoch has as many tokens as all corpora together. Rows are not mixed within: each holds
    documents of one corpus.
    """
    streams = []
    for number, corpus in enumerate(corpora):
        wanted = _ROWS_WORTH_PACKING * sequence_length
        passes = 1 if packing == "none" else max(1, -(-wanted // corpus.tokens))
        stream = Stream(
            corpus,
            packing=packing,
            sequence_length=sequence_length,
            seed=seed,
            number=number,
            shuffle=shuffle,
            passes=passes,
        )
        streams.append(stream)
    tokens_per_row = [s.corpus.tokens * s.passes / s.rows for s in streams]
    shares = row_shares(weights, tokens_per_row)
    mean = sum(share * tokens for share, tokens in zip(shares, tokens_per_row, strict=True))
    rows = max(1, round(sum(corpus.tokens for corpus in corpora) / mean))
    return streams, Interleaving(shares, rows, seed, shuffle)


class Batches:
    """Random access to the batches of training data (endless) or of held-out data (one epoch).

    Row `g` of all is row `g % batch_rows` of batch `g // batch_rows`; a batch may begin in one
    epoch and end in the next. Held-out data ends with a batch that may be short; of several
    streams, `names` in all, it has one's rows after the other's.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        batch_rows: int,
        pad_id: int,
        interleaving: Interleaving | None = None,
        endless: bool = True,
        names: Sequence[str] = (),
    ) -> None:
        self.interleaving: Interleaving | EndToEnd | None = interleaving
        if interleaving is None and len(streams) != 1:
            if endless:
                raise ValueError("several endless streams need an interleaving")
            self.interleaving = EndToEnd(tuple(stream.rows for stream in streams))
        self.streams, self.names = list(streams), tuple(names)
        self.batch_rows, self.pad_id, self.endless = batch_rows, pad_id, endless

    @property
    def sequence_length(self) -> int:
        """Tokens in a row."""
        return self.streams[0].sequence_length

    @property
    def are_examples(self) -> bool:
        """Whether documents are examples, of which some tokens only are trained."""
        return self.streams[0].corpus.is_masked

    @property
    def rows_per_epoch(self) -> int:
        """Rows in an epoch."""
        if self.interleaving is not None:
            return self.interleaving.rows_per_epoch
        return self.streams[0].rows

    @property
    def rows(self) -> int:
        """The same, as held-out data has it: all the rows there are."""
        return self.rows_per_epoch

    def by_source(self) -> dict[str, Batches]:
        """Held-out data of several sources: each one's rows by themselves. Else nothing."""
        return {
            name: Batches([stream], batch_rows=self.batch_rows, pad_id=self.pad_id, endless=False)
            for name, stream in zip(self.names, self.streams, strict=bool(self.names))
        }

    def packing_figures(self) -> PackingFigures:
        """Figures of the first epoch's packing; the others' differ in order only."""
        shares = (1.0,) if self.interleaving is None else self.interleaving.shares
        filled, visible, split, longest = 0.0, 0.0, 0, 0
        for share, stream in zip(shares, self.streams, strict=True):
            layout = stream.layout(0)
            filled += share * float(layout.length.sum()) / (layout.rows * self.sequence_length)
            squares = float(np.square(layout.length, dtype=np.float64).sum())
            visible += share * squares / (layout.rows * self.sequence_length**2)
            runs = np.bincount(layout.document, minlength=stream.corpus.documents)
            split += int((runs > stream.passes).sum())
            longest = max(longest, int(stream.corpus.lengths.max()))
        return PackingFigures(self.rows_per_epoch, filled, longest, split, visible)

    def listed(self, count: int) -> list[ListedDocument]:
        """The first `count` documents, source by source, in the order of their sources."""
        found: list[ListedDocument] = []
        for stream in self.streams:
            corpus = stream.corpus
            for document in range(min(count - len(found), corpus.documents)):
                length = int(corpus.lengths[document])
                begin = int(corpus.starts[document]) + np.arange(min(length, 24))
                first = tuple(corpus.read(begin).tolist())
                text_bytes = corpus.bytes_of(document)
                found.append(ListedDocument(corpus.name(document), length, text_bytes, first))
        return found

    def epoch_steps(self, batch_rows: int | None = None) -> int:
        """Batches that cover an epoch, the last one maybe in part."""
        return -(-self.rows_per_epoch // (batch_rows or self.batch_rows))

    @property
    def documents(self) -> int:
        """Documents in all sources."""
        return sum(stream.corpus.documents for stream in self.streams)

    @property
    def tokens(self) -> int:
        """Tokens in all sources, BOS and EOS included."""
        return sum(stream.corpus.tokens for stream in self.streams)

    @property
    def targets(self) -> int:
        """Tokens that are predicted when every document is seen once."""
        return sum(stream.corpus.targets for stream in self.streams)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the documents' texts."""
        return sum(stream.corpus.text_bytes for stream in self.streams)

    @property
    def target_bytes(self) -> int:
        """UTF-8 bytes of text that the targets stand for: divide by these for bits per byte.

        All of `text_bytes` where the tokenizer adds a BOS; else without each document's first
        token, which nothing predicts. EOS is a target of no bytes, so that its cost counts.
        """
        if self.are_examples:
            return 0  # what is trained of an example are no whole texts
        return self.text_bytes - sum(stream.corpus.lead_bytes for stream in self.streams)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Rows `rows` of the global batch of `step`, which counts from 0.

        Raises IndexError for a step before the first or, in held-out data, after the last.
        """
        if step < 0 or (not self.endless and step >= self.epoch_steps()):
            raise IndexError(f"there is no batch {step}")
        first = step * self.batch_rows
        count = self.batch_rows
        if not self.endless:
            count = min(count, self.rows_per_epoch - first)
        return self.read(range(first, first + count)[rows])

    def read(self, rows: Sequence[int]) -> Batch:
        """The batch made of any rows, numbered over all epochs."""
        numbers = np.asarray(rows, dtype=np.int64)
        shape = (len(numbers), self.sequence_length)
        has_reference = self.streams[0].corpus.reference is not None
        batch = _Filling(
            input_ids=np.full(shape, self.pad_id, dtype=np.int64),
            labels=np.full(shape, IGNORED, dtype=np.int64),
            position_ids=np.zeros(shape, dtype=np.int64),
            segment_ids=np.full(shape, -1, dtype=np.int32),
            documents=[()] * len(numbers),
            values=[np.zeros(0, np.float32)] * len(numbers) if self.are_examples else None,
            reference=[np.zeros(0, np.float32)] * len(numbers) if has_reference else None,
        )
        stream_of = np.zeros_like(numbers)
        if self.interleaving is not None:
            stream_of, numbers = self.interleaving.locate(numbers)
        for index in np.unique(stream_of).tolist():
            stream = self.streams[index]
            rounds, row_in_round = np.divmod(numbers, stream.rows)
            for round in np.unique(rounds[stream_of == index]).tolist():
                places = np.flatnonzero((stream_of == index) & (rounds == round))
                batch.fill(places, stream.corpus, stream.layout(round), row_in_round[places])
        # An example's row may end in a segment of its own: objectives look for its number there.
        whole = not self.are_examples and bool((batch.segment_ids == 0).all())
        return Batch(
            batch.input_ids,
            batch.labels,
            batch.position_ids,
            None if whole else batch.segment_ids,
            tuple(batch.documents),
            _side_by_side(batch.values),
            _side_by_side(batch.reference),
        )


@dataclass
class _Filling:
    """A batch while its rows are put in."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    segment_ids: NDArray[np.int32]
    documents: list[tuple[str, ...]]
    values: list[NDArray[np.float32]] | None  # of examples
    reference: list[NDArray[np.float32]] | None

    def fill(
        self, places: NDArray[np.int64], corpus: Corpus, layout: Layout, rows: NDArray[np.int64]
    ) -> None:
        """Put rows `rows` of `layout` into rows `places` of the batch."""
        runs = layout.first_run[rows + 1] - layout.first_run[rows]
        taken = ranges(layout.first_run[rows], runs)
        document, length = layout.document[taken], layout.length[taken]
        names = [corpus.name(index) for index in document.tolist()]
        borders = np.concatenate([[0], np.cumsum(runs)]).tolist()
        for place_of_row, first, end in zip(places.tolist(), borders, borders[1:], strict=False):
            self.documents[place_of_row] = tuple(names[first:end])
            if self.values is not None:
                self.values[place_of_row] = corpus.values(document[first:end])
            if self.reference is not None and corpus.reference is not None:
                self.reference[place_of_row] = corpus.reference[document[first:end]].reshape(-1)
        # Where each run begins: its address among the tokens, its place in the flattened batch.
        address = corpus.starts[document] + layout.start[taken]
        if corpus.parts > 1:  # examples are never split: a run for each of their sequences
            lengths = corpus.part_lengths(document)
            address = (address[:, None] + np.cumsum(lengths, 1) - lengths).reshape(-1)
            length = lengths.reshape(-1)
            runs = runs * corpus.parts
        number = ranges(np.zeros_like(runs), runs)
        ends = np.cumsum(length)
        row_begins = np.repeat((ends - length)[np.cumsum(runs) - runs], runs)
        place = np.repeat(places, runs) * self.input_ids.shape[1] + ends - length - row_begins

        source, target = ranges(address, length), ranges(place, length)
        self.input_ids.reshape(-1)[target] = corpus.read(source)
        self.position_ids.reshape(-1)[target] = ranges(np.zeros_like(length), length)
        self.segment_ids.reshape(-1)[target] = np.repeat(number, length)
        if corpus.parts > 1:
            end_of_text = address + length
        else:
            end_of_text = corpus.starts[document] + corpus.lengths[document]
        followed = source + 1 < np.repeat(end_of_text, length)
        if corpus.is_masked:
            followed[followed] = corpus.trained(source[followed] + 1)
        self.labels.reshape(-1)[target[followed]] = corpus.read(source[followed] + 1)


def _side_by_side(rows: list[NDArray[np.float32]] | None) -> NDArray[np.float32] | None:
    """Rows of several lengths as one array, 0 where a row is shorter."""
    if rows is None:
        return None
    array = np.zeros((len(rows), max(map(len, rows))), np.float32)
    for row, values in enumerate(rows):
        array[row, : len(values)] = values
    return array

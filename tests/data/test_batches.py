"""Batches: exact cover, masks and positions token by token, purity, mixtures, held-out data."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.data.made import made_cache, made_corpus
from trainwright.data.batches import IGNORED, Batch, Batches, Stream, mixture
from trainwright.data.corpus import Corpus

PACKINGS = ["concat", "best-fit", "none"]
LENGTHS = [5, 3, 40, 2, 17, 9, 8, 33, 4, 12, 2, 6, 25, 16, 7]


def made_batches(
    folder: Path, packing: str, *, lengths=LENGTHS, rows=4, length=8, **settings
) -> Batches:
    endless = settings.pop("endless", True)
    settings = {"seed": 1, **settings}
    corpus = made_corpus(folder, lengths)
    stream = Stream(corpus, packing=packing, sequence_length=length, **settings)
    return Batches([stream], batch_rows=rows, pad_id=10**6, endless=endless)


def segments_of(batch: Batch) -> np.ndarray:
    if batch.segment_ids is None:
        return np.zeros(batch.input_ids.shape, dtype=np.int32)
    return batch.segment_ids


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_holds_every_token_and_every_target_once(tmp_path, packing, shuffle, epoch):
    batches = made_batches(tmp_path / "c", packing, shuffle=shuffle)
    count = batches.rows_per_epoch
    batch = batches.read(range(epoch * count, (epoch + 1) * count))

    ends = np.cumsum(LENGTHS)  # token t is followed by t + 1, unless it ends a document
    every = set(range(ends[-1]))
    inputs = Counter(batch.input_ids[segments_of(batch) >= 0].tolist())
    targets = Counter(batch.labels[batch.labels != IGNORED].tolist())
    assert targets == Counter(every - set((ends - LENGTHS).tolist()))
    assert max(inputs.values()) == 1
    # Only a last token that would stand alone in a row is left out of the inputs.
    missing = every - set(inputs)
    if packing == "concat":
        assert len(missing) <= 1 and missing <= set((ends - 1).tolist())
    else:
        assert missing == {end - 1 for end, n in zip(ends, LENGTHS, strict=True) if n % 8 == 1}
    assert batch.weight == batches.targets == sum(targets.values())


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_token_by_token(tmp_path, packing):
    batches = made_batches(tmp_path / "c", packing, length=11)
    document_of = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    batch = batches.read(range(batches.rows_per_epoch))
    segments = segments_of(batch)
    for row in range(len(batch.input_ids)):
        names, last = [], None
        for i, token in enumerate(batch.input_ids[row].tolist()):
            if segments[row, i] < 0:
                assert token == batches.pad_id and batch.labels[row, i] == IGNORED
                assert batch.position_ids[row, i] == 0
                assert (segments[row, i:] == -1).all()
                break
            document = int(document_of[token])
            begins = last is None or document != last
            if begins:
                names.append(f"doc{document}")
            assert segments[row, i] == len(names) - 1
            assert batch.position_ids[row, i] == (
                0 if begins else batch.position_ids[row, i - 1] + 1
            )
            if not begins:
                assert token == batch.input_ids[row, i - 1] + 1
            ends = token + 1 == len(document_of) or document_of[token + 1] != document
            assert batch.labels[row, i] == (IGNORED if ends else token + 1)
            last = document
        assert batch.documents[row] == tuple(names)


def test_a_document_that_goes_on_in_the_next_row_loses_no_target(tmp_path):
    batches = made_batches(tmp_path / "c", "concat", lengths=[20], shuffle=False)
    batch = batches.read(range(3))
    assert batch.labels[:, -1].tolist() == [8, 16, IGNORED]
    assert batch.position_ids[1].tolist() == list(range(8))


def test_segments_are_none_only_where_every_row_is_one_whole_document(tmp_path):
    whole = made_batches(tmp_path / "a", "concat", lengths=[64], shuffle=False)
    assert whole.batch(0).segment_ids is None
    mixed = made_batches(tmp_path / "b", "concat", lengths=[8, 4, 4], rows=2, shuffle=False)
    assert mixed.batch(0).segment_ids.tolist() == [[0] * 8, [0] * 4 + [1] * 4]
    # The same row has the same hash beside whichever others it stands.
    assert mixed.batch(0, slice(0, 1)).segment_ids is None
    assert mixed.batch(0, slice(0, 1)).row_hashes() == mixed.batch(0).row_hashes()[:1]


def test_hashes_tell_rows_apart(tmp_path):
    batch = made_batches(tmp_path / "c", "best-fit").read(range(40))
    hashes = batch.row_hashes()
    rows = {batch.input_ids[i].tobytes() + segments_of(batch)[i].tobytes() for i in range(40)}
    assert len(set(hashes)) == len(rows)
    assert all(0 <= value < 2**63 for value in hashes)
    masked = batch.labels.copy()
    masked[0, 0] = IGNORED
    changed = Batch(batch.input_ids, masked, batch.position_ids, batch.segment_ids, batch.documents)
    assert changed.row_hashes()[0] != hashes[0] and changed.row_hashes()[1:] == hashes[1:]


@pytest.mark.parametrize("packing", PACKINGS)
def test_batches_are_pure(tmp_path, packing):
    """Any order of calls, any slices of rows, a fresh object: the same rows."""
    batches = made_batches(tmp_path / "c", packing)
    steps = 3 * batches.epoch_steps()
    straight = [batches.batch(step).row_hashes() for step in range(steps)]
    for step in np.random.default_rng(0).permutation(steps).tolist():
        parts = [batches.batch(step, slice(a, a + 2)).row_hashes() for a in (2, 0)]
        assert parts[1] + parts[0] == straight[step]
    corpus = batches.streams[0].corpus
    fresh = Batches(
        [Stream(corpus, packing=packing, sequence_length=8, seed=1)], batch_rows=4, pad_id=10**6
    )
    assert fresh.batch(steps - 1).row_hashes() == straight[-1]
    other = Stream(corpus, packing=packing, sequence_length=8, seed=2)
    other_seed = Batches([other], batch_rows=4, pad_id=10**6)
    assert other_seed.batch(0).row_hashes() != straight[0]


def test_another_process_makes_the_same_batches(tmp_path):
    batches = made_batches(tmp_path / "c", "best-fit")
    script = f"""
import numpy as np
from pathlib import Path
from trainwright.data.batches import Batches, Stream
from trainwright.data.corpus import Corpus
from trainwright.data.token_cache import TokenCache
facts = {{"dtype": "<u4", "documents": {len(LENGTHS)}, "dropped": 0}}
cache = TokenCache(Path({str(tmp_path / "c")!r}), facts)
corpus = Corpus([cache], [np.arange({len(LENGTHS)})], ["made"])
stream = Stream(corpus, packing="best-fit", sequence_length=8, seed=1)
print(Batches([stream], batch_rows=4, pad_id=10**6).batch(17).row_hashes())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(batches.batch(17).row_hashes())


def test_batches_go_over_the_border_of_epochs(tmp_path):
    batches = made_batches(tmp_path / "c", "none", lengths=[4] * 6, rows=4)
    assert batches.rows_per_epoch == 6 and batches.epoch_steps() == 2
    names = [name for step in range(3) for (name,) in batches.batch(step).documents]
    every = sorted(f"doc{i}" for i in range(6))
    assert sorted(names[:6]) == every and sorted(names[6:]) == every


def test_epochs_are_shuffled_anew(tmp_path):
    batches = made_batches(tmp_path / "c", "none", lengths=[4] * 30, rows=30)
    assert batches.batch(0).documents != batches.batch(1).documents
    unshuffled = made_batches(tmp_path / "d", "none", lengths=[4] * 30, rows=30, shuffle=False)
    assert unshuffled.batch(7).documents == tuple((f"doc{i}",) for i in range(30))


def test_documents_meet_others_in_the_next_epoch(tmp_path):
    """Documents are shuffled before they are packed, differently each epoch and in each stream."""
    corpus = made_corpus(tmp_path / "c", [4] * 40)

    def neighbours(stream: Stream, round: int) -> set[frozenset[int]]:
        layout = stream.layout(round)
        return set(map(frozenset, layout.document.reshape(-1, 2).tolist()))

    for packing in ("concat", "best-fit"):
        one, two = (
            Stream(corpus, packing=packing, sequence_length=8, seed=1, number=number)
            for number in (0, 1)
        )
        groups = [neighbours(one, 0), neighbours(one, 1), neighbours(two, 0)]
        assert all(len(a & b) < 10 for a, b in [groups[:2], groups[1:], groups[::2]])


def test_rows_of_one_document_are_shuffled_each_epoch(tmp_path):
    corpus = made_corpus(tmp_path / "c", [320])
    streams = [
        Stream(corpus, packing="concat", sequence_length=8, seed=1, number=number)
        for number in (0, 1)
    ]
    starts = [streams[number].layout(round).start for number, round in [(0, 0), (0, 1), (1, 0)]]
    assert all(sorted(each) == list(range(0, 320, 8)) for each in starts)
    assert len({tuple(each) for each in starts}) == 3


def test_long_documents_do_not_fill_batches_alone(tmp_path):
    batches = made_batches(tmp_path / "c", "concat", lengths=[800, 800, 800, 800], rows=16)
    assert all(len(set(batches.batch(step).documents)) > 1 for step in range(5))


def test_held_out_batches_end(tmp_path):
    batches = made_batches(tmp_path / "c", "none", lengths=[4] * 6, shuffle=False, endless=False)
    assert [len(batches.batch(step).input_ids) for step in range(batches.epoch_steps())] == [4, 2]
    assert batches.batch(1, slice(0, 4)).documents == (("doc4",), ("doc5",))
    assert batches.batch(1, slice(2, 4)).input_ids.shape == (0, 8)
    for step in (2, -1):
        with pytest.raises(IndexError):
            batches.batch(step)


def test_figures(tmp_path):
    batches = made_batches(tmp_path / "c", "concat")
    assert batches.documents == len(LENGTHS) and batches.tokens == sum(LENGTHS)
    assert batches.text_bytes == 3 * sum(LENGTHS)
    assert batches.target_bytes == 3 * sum(LENGTHS) - 2 * len(LENGTHS)
    figures = made_batches(tmp_path / "d", "best-fit", lengths=[8, 20, 4]).packing_figures()
    # Rows: 8 | 8 of 20 | 8 of 20 | the 4 left and 4.
    assert (figures.rows, figures.filled, figures.longest, figures.split) == (4, 1.0, 20, 1)
    assert figures.visible == (3 * 8**2 + 4**2 + 4**2) / (4 * 8**2)  # rows 8, 8, 8 and 4 + 4


def test_several_caches_are_one_corpus(tmp_path):
    caches = [made_cache(tmp_path / "a", [3, 4, 5]), made_cache(tmp_path / "b", [6, 2], 100)]
    corpus = Corpus(caches, [np.array([0, 2]), np.array([1])], ["a", "b"])
    assert corpus.lengths.tolist() == [3, 5, 2]
    tokens = [
        corpus.read(np.arange(start, start + length)).tolist()
        for start, length in zip(corpus.starts.tolist(), corpus.lengths.tolist(), strict=True)
    ]
    assert tokens == [[0, 1, 2], [7, 8, 9, 10, 11], [106, 107]]
    assert [corpus.name(i) for i in range(3)] == ["a/doc0", "a/doc2", "b/doc1"]
    stream = Stream(corpus, packing="concat", sequence_length=4, seed=0, shuffle=False)
    batch = Batches([stream], batch_rows=1, pad_id=0).read(range(3))
    assert batch.labels.tolist() == [
        [1, 2, IGNORED, 8],
        [9, 10, 11, IGNORED],
        [107, IGNORED, IGNORED, IGNORED],
    ]


@pytest.mark.parametrize("packing", PACKINGS)
def test_mixture_keeps_weights_in_tokens(tmp_path, packing):
    """A tiny source, a middling one and one of long documents, weights far from their sizes."""
    random = np.random.default_rng(0)
    lengths = [[5, 9], random.integers(4, 30, 200).tolist(), random.integers(100, 900, 20).tolist()]
    corpora = [made_corpus(tmp_path / str(i), each, 10**5 * i) for i, each in enumerate(lengths)]
    weights = [0.2, 0.5, 0.3]
    streams, interleaving = mixture(
        corpora, weights, packing=packing, sequence_length=32, seed=5, shuffle=True
    )
    batches = Batches(streams, batch_rows=8, pad_id=10**7, interleaving=interleaving)

    batch = batches.read(range(interleaving.rows))
    tokens = batch.input_ids[segments_of(batch) >= 0]
    shares = np.bincount(tokens // 10**5, minlength=3) / len(tokens)
    assert np.abs(shares - weights).max() < 0.01
    if packing != "none":  # however small a source, its rows are full
        assert len(tokens) > 0.94 * batch.input_ids.size
    # An epoch is as many tokens as the sources have together.
    epochs = interleaving.rows / batches.rows_per_epoch
    assert len(tokens) / epochs == pytest.approx(sum(map(sum, lengths)), rel=0.03)
    # Every document of a source is seen about equally often, and nothing is mixed up in a row.
    seen = Counter(name for row in batch.documents for name in row)
    assert len(seen) == len({f"doc{i}" for i in range(200)})
    picked = [17, 3, 900, 3]
    assert batches.read(picked).row_hashes() == [batch.row_hashes()[i] for i in picked]


def test_mixture_reshuffles_each_pass(tmp_path):
    corpora = [made_corpus(tmp_path / "a", [8] * 50), made_corpus(tmp_path / "b", [8] * 50, 1000)]
    streams, interleaving = mixture(
        corpora, [1.0, 1.0], packing="none", sequence_length=8, seed=5, shuffle=True
    )
    batches = Batches(streams, batch_rows=100, pad_id=0, interleaving=interleaving)
    first = batches.read(range(200)).input_ids[:, 0]
    own = first[first < 1000]
    assert sorted(own[:50]) == sorted(own[50:100]) and own[:50].tolist() != own[50:100].tolist()
    assert own[:50].tolist() != (first[first >= 1000][:50] - 1000).tolist()

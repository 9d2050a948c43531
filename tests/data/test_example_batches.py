"""Examples in batches: every sequence whole, its own targets and nothing else, packed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainwright.data.batches import IGNORED, Batches, Stream
from trainwright.data.corpus import Corpus
from trainwright.data.token_cache import CacheWriter, TokenCache

SEQUENCE, PAD = 32, 0


def made(folder: Path, parts: int, count: int, start: int) -> tuple[TokenCache, list[Any]]:
    """A cache of examples with ids that say where they come from, and the examples."""
    folder.mkdir()
    rng = np.random.default_rng(start)
    examples = []
    with CacheWriter(folder, np.uint16, parts) as writer:
        for number in range(count):
            sequences = []
            for part in range(parts):
                length = int(rng.integers(3, SEQUENCE // parts + 1))
                ids = 1000 * (start + number) + 100 * part + np.arange(length) + 1
                trained = rng.random(length) < 0.5
                trained[0], trained[-1] = False, True
                sequences.append((ids % 60000 + 1, trained))
            value = float(rng.random())
            examples.append((f"row {start + number}", sequences, value))
            writer.add(
                names=[f"row {start + number}"],
                tokens=[np.concatenate([ids for ids, _ in sequences])],
                text_bytes=[10],
                hashes=[start + number],
                lead_bytes=[0],
                trained=np.concatenate([trained for _, trained in sequences]),
                part_lengths=[len(ids) for ids, _ in sequences],
                values=[value],
            )
    return TokenCache(folder, writer.facts | {"dropped": 0}), examples


@pytest.mark.parametrize("packing", ["best-fit", "none"])
@pytest.mark.parametrize("parts", [1, 2])
def test_rows_hold_examples_whole(parts: int, packing: Any, tmp_path: Path) -> None:
    first, some = made(tmp_path / "a", parts, 17, 0)
    second, others = made(tmp_path / "b", parts, 9, 30)
    corpus = Corpus(
        [first, second], [np.arange(17), np.arange(0, 9, 2)], ["", ""]
    )  # of the second, every other one
    expected = {name: (s, v) for name, s, v in [*some, *others[::2]]}
    stream = Stream(corpus, packing=packing, sequence_length=SEQUENCE, seed=3)
    batches = Batches([stream], batch_rows=4, pad_id=PAD, endless=False)
    seen = []
    for step in range(batches.epoch_steps()):
        batch = batches.batch(step)
        assert batch.segment_ids is not None and batch.values is not None
        for row, names in enumerate(batch.documents):
            place = segment = 0
            for number, name in enumerate(names):
                name = name.lstrip("/")
                sequences, value = expected[name]
                assert batch.values[row, number] == np.float32(value)
                seen.append(name)
                for ids, trained in sequences:
                    span = slice(place, place + len(ids))
                    assert (batch.input_ids[row, span] == ids).all()
                    assert (batch.segment_ids[row, span] == segment).all()
                    assert (batch.position_ids[row, span] == np.arange(len(ids))).all()
                    want = np.where(trained[1:], ids[1:], IGNORED)
                    assert (batch.labels[row, span] == [*want, IGNORED]).all()
                    place, segment = place + len(ids), segment + 1
            assert (batch.segment_ids[row, place:] == -1).all()
            assert (batch.labels[row, place:] == IGNORED).all()
            assert (batch.input_ids[row, place:] == PAD).all()
            assert (batch.values[row, len(names) :] == 0).all()
    assert sorted(seen) == sorted(expected)
    if packing == "none":
        assert batches.rows_per_epoch == len(expected)


def test_examples_of_one_row_are_the_same_wherever_they_are_packed(tmp_path: Path) -> None:
    cache, _ = made(tmp_path / "a", 2, 12, 0)
    corpus = Corpus([cache], [np.arange(12)], [""])
    weights = set()
    for packing in ("best-fit", "none"):
        stream = Stream(corpus, packing=packing, sequence_length=SEQUENCE, seed=1)
        batches = Batches([stream], batch_rows=64, pad_id=PAD, endless=False)
        batch = batches.batch(0)
        weights.add((batch.weight, batch.examples))
    assert len(weights) == 1

"""Made-up token caches and recipes for the tests of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainwright.data.batches import Batches
from trainwright.data.corpus import Corpus
from trainwright.data.prepare import prepare_data
from trainwright.data.token_cache import TokenCache
from trainwright.errors import UserError
from trainwright.recipe.schema import Recipe

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "Straße, naïve café: 世界 🙂 — and some more words.\n",
    "A short one.",
    "x",
    "The quick brown fox jumps over the lazy dog. " * 9,
    "\tTabs\tand   spaces  \r\nand </s> <s> <pad> as text.\n\n",
    "0123456789 " * 40,
    "line\n" * 60,
]


def made_cache(folder: Path, lengths: list[int], first_token: int = 0) -> TokenCache:
    """A cache of documents with these lengths, in which every token of all documents differs."""
    folder.mkdir(parents=True)
    total = sum(lengths)
    names = [f"doc{i}".encode() for i in range(len(lengths))]

    def write(name: str, values: Any, dtype: str) -> None:
        np.asarray(values, dtype=dtype).tofile(folder / f"{name}.bin")

    write("tokens", np.arange(first_token, first_token + total), "<u4")
    write("offsets", np.cumsum([0, *lengths]), "<i8")
    write("text_bytes", [3 * length for length in lengths], "<i8")
    write("lead_bytes", [2] * len(lengths), "<i8")
    write("text_hashes", np.arange(len(lengths)), "<u8")
    write("names", np.frombuffer(b"".join(names), "u1"), "u1")
    write("name_offsets", np.cumsum([0, *map(len, names)]), "<i8")
    return TokenCache(folder, {"dtype": "<u4", "documents": len(lengths), "dropped": 0})


def made_corpus(folder: Path, lengths: list[int], first_token: int = 0) -> Corpus:
    """All documents of a made cache."""
    cache = made_cache(folder, lengths, first_token)
    return Corpus([cache], [np.arange(len(lengths))], ["made"])


def made_recipe(folder: Path, **changes: Any) -> Recipe:
    """A small recipe on the text files in `folder/texts`, with its cache in `folder/cache`."""
    data = {
        "sources": [{"path": str(folder / "texts"), "kind": "text"}],
        "validation": 0.25,
        "sequence_length": 32,
        "cache": str(folder / "cache"),
    }
    values: dict[str, Any] = {
        "model": {"family": "llama", "preset": "4m"},
        "tokenizer": "bytes",
        "training": {"steps": 10, "batch_sequences": 4},
    }
    values.update(changes)
    values["data"] = {**data, **changes.get("data", {})}
    return Recipe.model_validate(values)


def write_texts(folder: Path, texts: list[str] = TEXTS) -> None:
    """One file a text in `folder/texts`."""
    (folder / "texts").mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number:03}.txt").write_bytes(text.encode())


def texts_of(batches: Batches) -> dict[str, str]:
    """The documents of an epoch by name, from nothing but the rows of unshuffled batches."""
    assert not batches.streams[0].shuffle
    texts: dict[str, list[int]] = {}
    batch = batches.read(range(batches.rows_per_epoch))
    segments = batch.segment_ids
    for row, names in enumerate(batch.documents):
        for number, name in enumerate(names):
            here = segments[row] == number if segments is not None else slice(None)
            texts.setdefault(name, []).extend(batch.input_ids[row][here].tolist())
    return {
        name: bytes(token for token in ids if token < 256).decode(errors="replace")
        for name, ids in texts.items()
    }


def unshuffled(cache: Path) -> dict[str, object]:
    return {"shuffle": False, "cache": str(cache)}


def hashes(batches: Batches) -> list[int]:
    return batches.read(range(2 * batches.rows_per_epoch)).row_hashes()


def said(recipe: Recipe, **more: Any) -> str:
    """What preparing the recipe's data complains about."""
    with pytest.raises(UserError) as caught:
        prepare_data(recipe, **more)
    return str(caught.value)

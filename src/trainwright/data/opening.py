"""Prepared data as workers open it: memory maps and a description, in milliseconds.

Neither a source nor transformers is touched here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainwright.data.batches import Batches, Stream, mixture
from trainwright.data.corpus import Corpus
from trainwright.data.token_cache import TokenCache, open_cache
from trainwright.data.tokenizers import load_tokenizer
from trainwright.errors import Mistake, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DESCRIPTION, TOKENIZER = "data.json", "tokenizer"  # what `prepare_data` leaves in a directory


@dataclass(frozen=True)
class SourceSummary:
    """What came of a source: its documents for training, or its held-out ones.

    `dropped` documents were empty; `also_trained` held-out ones are word for word in the training
    data too. Tokens include BOS and EOS. Of a whole source of examples, train and validation alike,
    `lost` says how many were "cut", or left out as "too long" or "bad", and `lost_rows` names the
    first of each.
    """

    name: str
    split: str  # "train" or "validation"
    documents: int
    tokens: int
    text_bytes: int
    dropped: int = 0
    also_trained: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    lost_rows: dict[str, list[str]] = field(default_factory=dict)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token: how well the tokenizer suits the source."""
        return self.text_bytes / max(self.tokens, 1)


@dataclass(frozen=True)
class PreparedData:
    """A recipe's data, ready to be trained on.

    `validation` has one entry a source of its own, or "validation" where a share is held out;
    `vocabulary` is the number of rows that an embedding needs.
    """

    train: Batches
    validation: dict[str, Batches]
    summary: tuple[SourceSummary, ...]
    tokenizer_directory: Path
    vocabulary: int
    pad_id: int

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer; loaded at the first use, since that imports transformers."""
        return load_tokenizer(self.tokenizer_directory)

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """`tokenizer`, as a function."""
        return self.tokenizer


def open_data(directory: Path, seed: int | None = None) -> PreparedData:
    """Open what `prepare_data` left in `directory`, in the order of another seed if one is given.

    Raises UserError where it left nothing, or where the token cache is gone since.
    """
    try:
        description = json.loads((directory / DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        what = f"{directory / DESCRIPTION} cannot be read: {error}"
        raise UserError(what, fix="start the run again: its data is then prepared anew") from error
    if seed is not None:
        description["seed"] = seed
    return open_description(description, directory / TOKENIZER)


def open_description(description: dict[str, Any], tokenizer: Path) -> PreparedData:
    """The data of a description as `prepare._describe` makes it."""
    settings = {key: description[key] for key in ("packing", "sequence_length", "seed", "shuffle")}
    shape = {"batch_rows": description["batch_rows"], "pad_id": description["pad_id"]}
    names = [part["name"] for part in description["train"]]
    caches = [require_cache(Path(part["cache"])) for part in description["train"]]
    threshold, weights = description["threshold"], description["weights"]

    kept = [chosen(cache, threshold, held_out=False) for cache in caches]
    if weights[0] is None:
        train = Batches([Stream(Corpus(caches, kept, names), **settings)], **shape)
    else:
        _require_documents(kept, names)
        corpora = [Corpus([cache], [each], [""]) for cache, each in zip(caches, kept, strict=True)]
        streams, interleaving = mixture(corpora, weights, **settings)
        train = Batches(streams, interleaving=interleaving, **shape)

    def held_out(corpora: Mapping[str, Corpus]) -> Batches:
        streams = [Stream(each, **{**settings, "shuffle": False}) for each in corpora.values()]
        several = list(corpora) if len(corpora) > 1 else []
        return Batches(streams, endless=False, names=several, **shape)

    validation = {}
    for part in description["validation"]:
        corpus = whole_corpus(require_cache(Path(part["cache"])))
        validation[part["name"]] = held_out({part["name"]: corpus})
    if threshold:
        apart = [chosen(cache, threshold, held_out=True) for cache in caches]
        held = {
            name: Corpus([cache], [documents], [""])
            for name, cache, documents in zip(names, caches, apart, strict=True)
            if len(documents)
        }
        validation["validation"] = held_out(held)
    summary = tuple(SourceSummary(**each) for each in description["summary"])
    return PreparedData(
        train, validation, summary, tokenizer, description["vocabulary"], description["pad_id"]
    )


def chosen(cache: TokenCache, threshold: int, *, held_out: bool) -> NDArray[np.int64]:
    """Documents of a cache on one side of the split."""
    below = np.asarray(cache.text_hashes) < np.uint64(threshold)
    return np.flatnonzero(below if held_out else ~below)


def whole_corpus(cache: TokenCache) -> Corpus:
    """All documents of one cache."""
    return Corpus([cache], [np.arange(cache.documents)], [""])


def require_cache(folder: Path) -> TokenCache:
    """The token cache in `folder`; UserError where it is gone."""
    cache = open_cache(folder)
    if cache is None:
        raise UserError(
            f"the token cache {folder} is gone or damaged",
            fix="start the run again: its data is then prepared anew",
        )
    return cache


def _require_documents(kept: Sequence[NDArray[np.int64]], names: Sequence[str]) -> None:
    for number, (name, documents) in enumerate(zip(names, kept, strict=True)):
        if len(documents) == 0:
            what = f"all documents of {name} are held out, so it cannot have its weight in training"
            fix = "name held-out files in `data.validation`, or take a smaller share"
            raise UserError(Mistake(what, fix, key=f"data.sources.{number}"))

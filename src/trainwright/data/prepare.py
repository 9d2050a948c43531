"""From a recipe to batches: tokenizer and token caches built once, then opened in milliseconds.

`prepare_data` does the work and writes down what it found; `open_data`, in every worker, maps
what is there without reading a source or importing transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainwright.data.batches import Batches, Stream, mixture
from trainwright.data.build import OpenedSource, build_tokens, build_vocabulary, open_source
from trainwright.data.corpus import Corpus
from trainwright.data.digests import digest
from trainwright.data.encode import Encoder
from trainwright.data.folders import cache_folder, file_hashes
from trainwright.data.packing import Packing
from trainwright.data.sources import check_source, source_names
from trainwright.data.split import held_out_below
from trainwright.data.token_cache import TokenCache, open_cache
from trainwright.data.tokenizers import embedding_rows, load_tokenizer
from trainwright.errors import Mistake, UserError
from trainwright.files import write_json
from trainwright.recipe.presets import model_config
from trainwright.recipe.schema import Recipe, Source, TokenizerSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_DESCRIPTION, _TOKENIZER = "data.json", "tokenizer"


@dataclass(frozen=True)
class SourceSummary:
    """What came of a source: its documents for training, or its held-out ones.

    `dropped` documents were empty; `also_trained` held-out ones are word for word in the training
    data too. Tokens include BOS and EOS.
    """

    name: str
    split: str  # "train" or "validation"
    documents: int
    tokens: int
    text_bytes: int
    dropped: int = 0
    also_trained: int = 0

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


def prepare_data(
    recipe: Recipe,
    model_path: str | None = None,
    *,
    directory: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> PreparedData:
    """Build what is missing in the cache, and open it.

    `model_path` is the directory or hub id of the pretrained model (default: the recipe's). In
    `directory`, if given, `data.json` and `tokenizer/` are left for `open_data`. `progress` is told
    now and then what is being done. Any number of processes may prepare the same data at once: the
    first does the work, the others wait.

    Raises UserError with all that is wrong with the sources, for a tokenizer that does not fit,
    and where `directory` already belongs to a run on other data.
    """
    say = progress or (lambda message: None)
    held_out = recipe.data.validation if isinstance(recipe.data.validation, list) else []
    keys = [f"data.sources.{i}" for i in range(len(recipe.data.sources))]
    keys += [f"data.validation.{i}" for i in range(len(held_out))]
    sections = [*recipe.data.sources, *held_out]
    root = cache_folder(recipe.data.cache)
    count = len(recipe.data.sources)
    names = [*source_names(recipe.data.sources), *source_names(held_out)]
    sources = _open_sources(sections, names, keys, root)
    share = 0.0 if isinstance(recipe.data.validation, list) else recipe.data.validation
    rows = _embedding_rows(recipe, model_path or recipe.model.path)
    tokenizer = build_vocabulary(
        recipe.tokenizer, model_path or recipe.model.path, sources[:count], share, rows, root, say
    )
    _require_room(Encoder(tokenizer).vocabulary, rows, recipe)
    folders = [build_tokens(source, tokenizer, root, say) for source in sources]
    description = _describe(recipe, sources, count, folders, share, tokenizer)
    if directory is not None:
        tokenizer = _write(description, tokenizer, directory)
    return _open(description, tokenizer)


def prepare_held_out(
    sources: Sequence[Source],
    tokenizer: str | Path,
    *,
    sequence_length: int,
    packing: Packing = "concat",
    batch_rows: int = 8,
    cache: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Batches]:
    """Batches of each source, in order and once, to score a finished model on.

    `tokenizer` is its directory or hub id. Raises UserError as `prepare_data` does.
    """
    say = progress or (lambda message: None)
    root = cache_folder(cache)
    opened = _open_sources(sources, source_names(sources), [""] * len(sources), root)
    section = TokenizerSection(path=str(tokenizer))
    folder = build_vocabulary(section, None, [], 0.0, None, root, say)
    pad_id = Encoder(folder).pad_id
    assert pad_id is not None
    result = {}
    for source in opened:
        each = _cache(build_tokens(source, folder, root, say))
        corpus = Corpus([each], [np.arange(each.documents)], [source.name])
        stream = Stream(
            corpus, packing=packing, sequence_length=sequence_length, seed=0, shuffle=False
        )
        result[source.name] = Batches([stream], batch_rows=batch_rows, pad_id=pad_id, endless=False)
    return result


def _open_sources(
    sections: Sequence[Source], names: Sequence[str], keys: Sequence[str], cache: Path
) -> list[OpenedSource]:
    """Sources with their files found and hashed; UserError with all that is wrong with them."""
    mistakes = [
        mistake
        for section, key in zip(sections, keys, strict=True)
        for mistake in check_source(section, key)
    ]
    if mistakes:
        raise UserError(mistakes)
    return [
        open_source(section, name, key, cache)
        for section, name, key in zip(sections, names, keys, strict=True)
    ]


def open_data(directory: Path) -> PreparedData:
    """Open what `prepare_data` left in `directory`; takes milliseconds.

    Raises UserError where it left nothing, or where the token cache is gone since.
    """
    try:
        description = json.loads((directory / _DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        what = f"{directory / _DESCRIPTION} cannot be read: {error}"
        raise UserError(what, fix="start the run again: its data is then prepared anew") from error
    return _open(description, directory / _TOKENIZER)


def _embedding_rows(recipe: Recipe, model_path: str | None) -> int | None:
    if model_path is not None:
        return embedding_rows(Path(model_path).expanduser())
    return model_config(recipe.model).get("vocab_size")


def _require_room(vocabulary: int, rows: int | None, recipe: Recipe) -> None:
    if rows is None or vocabulary <= rows:
        return
    pretrained = recipe.model.path is not None
    raise UserError(
        Mistake(
            f"the tokenizer has {vocabulary:,} tokens, but the model's vocabulary only {rows:,}",
            "use the model's own tokenizer: leave `tokenizer` out"
            if pretrained
            else f"leave `model.config.vocab_size` out, or set it to at least {vocabulary}",
            key="tokenizer" if pretrained else "model.config.vocab_size",
        )
    )


def _describe(
    recipe: Recipe,
    sources: Sequence[OpenedSource],
    count: int,
    folders: Sequence[Path],
    share: float,
    tokenizer: Path,
) -> dict[str, Any]:
    """All that `_open` needs, as JSON values; the first `count` sources are for training."""
    caches = [_cache(folder) for folder in folders]
    threshold = held_out_below([cache.text_hashes for cache in caches[:count]], share)
    hashes = [file_hashes(folder) for folder in folders]
    order = {
        "threshold": threshold,
        "sequence_length": recipe.data.sequence_length,
        "packing": recipe.data.packing,
        "shuffle": recipe.data.shuffle,
        "seed": recipe.seed,
        "batch_rows": recipe.batch_sequences,
        "weights": [source.weight for source in recipe.data.sources],
    }
    tokens = [(each["tokens.bin"], each["offsets.bin"]) for each in hashes]
    encoder = Encoder(tokenizer)
    assert encoder.pad_id is not None
    return {
        # What a run may not change between its start and its continuation.
        "identity": digest([order, tokens, file_hashes(tokenizer)["tokenizer.json"]]),
        **order,
        "pad_id": encoder.pad_id,
        "vocabulary": encoder.vocabulary,
        "train": [_part(*each) for each in zip(sources[:count], folders, strict=False)],
        "validation": [_part(*each) for each in zip(sources[count:], folders[count:], strict=True)],
        "summary": [asdict(each) for each in _summarise(sources, caches, count, threshold)],
    }


def _part(source: OpenedSource, folder: Path) -> dict[str, str]:
    return {"name": source.name, "cache": str(folder)}


def _summarise(
    sources: Sequence[OpenedSource], caches: Sequence[TokenCache], count: int, threshold: int
) -> list[SourceSummary]:
    def summary(index: int, split: str, chosen: np.ndarray, **more: int) -> SourceSummary:
        corpus = Corpus([caches[index]], [chosen], [""])
        return SourceSummary(
            sources[index].name, split, corpus.documents, corpus.tokens, corpus.text_bytes, **more
        )

    training = [_chosen(cache, threshold, held_out=False) for cache in caches[:count]]
    result = [
        summary(index, "train", chosen, dropped=caches[index].dropped)
        for index, chosen in enumerate(training)
    ]
    if threshold:
        for index in range(count):
            chosen = _chosen(caches[index], threshold, held_out=True)
            if len(chosen):
                result.append(summary(index, "validation", chosen))
    if count < len(caches):
        trained = np.concatenate([cache.text_hashes for cache in caches[:count]])
        for index in range(count, len(caches)):
            cache = caches[index]
            again = int(np.isin(cache.text_hashes, trained).sum())
            everything = np.arange(cache.documents)
            more = {"dropped": cache.dropped, "also_trained": again}
            result.append(summary(index, "validation", everything, **more))
    return result


def _chosen(cache: TokenCache, threshold: int, *, held_out: bool) -> np.ndarray:
    below = np.asarray(cache.text_hashes) < np.uint64(threshold)
    return np.flatnonzero(below if held_out else ~below)


def _write(description: dict[str, Any], tokenizer: Path, directory: Path) -> Path:
    """Leave the tokenizer and then `data.json` in `directory`; returns the tokenizer's copy."""
    known = None
    if (directory / _DESCRIPTION).is_file():
        known = json.loads((directory / _DESCRIPTION).read_text()).get("identity")
    if known not in (None, description["identity"]):
        raise UserError(
            Mistake(
                f"the data differs from what the run in {directory} began with: its sources or "
                "their tokens have changed since",
                "restore them to continue the run, or choose another `run_directory`",
                key="data.sources",
            )
        )
    copy = directory / _TOKENIZER
    if known is None or not copy.is_dir():
        shutil.rmtree(copy, ignore_errors=True)
        ours = shutil.ignore_patterns("manifest.json", "verified.json")
        shutil.copytree(tokenizer, copy, ignore=ours)
    write_json(directory / _DESCRIPTION, description)
    return copy


def _open(description: dict[str, Any], tokenizer: Path) -> PreparedData:
    settings = {key: description[key] for key in ("packing", "sequence_length", "seed", "shuffle")}
    shape = {"batch_rows": description["batch_rows"], "pad_id": description["pad_id"]}
    names = [part["name"] for part in description["train"]]
    caches = [_cache(Path(part["cache"])) for part in description["train"]]
    threshold, weights = description["threshold"], description["weights"]

    kept = [_chosen(cache, threshold, held_out=False) for cache in caches]
    if weights[0] is None:
        train = Batches([Stream(Corpus(caches, kept, names), **settings)], **shape)
    else:
        _require_documents(kept, names)
        corpora = [Corpus([cache], [each], [""]) for cache, each in zip(caches, kept, strict=True)]
        streams, interleaving = mixture(corpora, weights, **settings)
        train = Batches(streams, interleaving=interleaving, **shape)

    def held_out(corpus: Corpus) -> Batches:
        stream = Stream(corpus, **{**settings, "shuffle": False})
        return Batches([stream], endless=False, **shape)

    validation = {}
    for part in description["validation"]:
        cache = _cache(Path(part["cache"]))
        validation[part["name"]] = held_out(Corpus([cache], [np.arange(cache.documents)], [""]))
    if threshold:
        chosen = [_chosen(cache, threshold, held_out=True) for cache in caches]
        validation["validation"] = held_out(Corpus(caches, chosen, names))
    summary = tuple(SourceSummary(**each) for each in description["summary"])
    return PreparedData(
        train, validation, summary, tokenizer, description["vocabulary"], description["pad_id"]
    )


def _require_documents(kept: Sequence[np.ndarray], names: Sequence[str]) -> None:
    for number, (name, chosen) in enumerate(zip(names, kept, strict=True)):
        if len(chosen) == 0:
            what = f"all documents of {name} are held out, so it cannot have its weight in training"
            fix = "name held-out files in `data.validation`, or take a smaller share"
            raise UserError(Mistake(what, fix, key=f"data.sources.{number}"))


def _cache(folder: Path) -> TokenCache:
    cache = open_cache(folder)
    if cache is None:
        raise UserError(
            f"the token cache {folder} is gone or damaged",
            fix="start the run again: its data is then prepared anew",
        )
    return cache

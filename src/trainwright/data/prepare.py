"""From a recipe to batches: what is missing in the cache is built, then all of it is opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from trainwright.data.batches import Batches, Stream
from trainwright.data.build import OpenedSource, build_tokens, build_vocabulary, open_source
from trainwright.data.build_examples import ExampleRules, build_examples
from trainwright.data.corpus import Corpus
from trainwright.data.digests import digest
from trainwright.data.encode import Encoder
from trainwright.data.folders import cache_folder, file_hashes, locked
from trainwright.data.masks import TrainOn
from trainwright.data.opening import (
    DESCRIPTION,
    TOKENIZER,
    PreparedData,
    SourceSummary,
    chosen,
    open_data,
    open_description,
    require_cache,
    whole_corpus,
)
from trainwright.data.packing import Packing
from trainwright.data.sources import check_source, source_names
from trainwright.data.split import held_out_below
from trainwright.data.templates import ChatTemplate, find_template
from trainwright.data.token_cache import TokenCache
from trainwright.data.tokenizers import embedding_rows
from trainwright.errors import Mistake, UserError
from trainwright.files import write_atomically, write_json
from trainwright.recipe.presets import model_config
from trainwright.recipe.schema import Objective, Recipe, Source, TokenizerSection

__all__ = ["PreparedData", "SourceSummary", "open_data", "prepare_data", "prepare_held_out"]

Say = Callable[[str], None]
DEFAULT_TEMPLATE = "plain"  # of a tokenizer without one: no token of its own is needed


class _Encoded(NamedTuple):
    """A source whose tokens are in the cache."""

    name: str
    folder: Path
    cache: TokenCache


def prepare_data(
    recipe: Recipe,
    model_path: str | None = None,
    *,
    directory: Path | None = None,
    progress: Say | None = None,
) -> PreparedData:
    """Build what is missing in the cache, and open it.

    `model_path` is the directory or hub id of the pretrained model (default: the recipe's). In
    `directory`, if given, `data.json` and `tokenizer/` are left for `open_data`. `progress` is told
    now and then what is being done. Any number of processes may prepare the same data at once: the
    first does the work, the others wait.

    Raises UserError with all that is wrong with the sources, for a tokenizer that does not fit,
    and where `directory` already belongs to a run on other data.
    """
    say = progress or _say_nothing
    root = cache_folder(recipe.data.cache)
    own = recipe.data.validation if isinstance(recipe.data.validation, list) else []
    share = 0.0 if isinstance(recipe.data.validation, list) else recipe.data.validation
    lists = {"data.sources": recipe.data.sources, "data.validation": own}
    sources = _open_sources(lists, root, examples=recipe.learns_examples)
    training = sources[: len(recipe.data.sources)]

    model = model_path or recipe.model.path
    rows = (
        embedding_rows(Path(model).expanduser())
        if model is not None
        else model_config(recipe.model).get("vocab_size")
    )
    tokenizer = build_vocabulary(recipe.tokenizer, model, training, share, rows, root, say)
    encoder = Encoder(tokenizer)
    _require_room(encoder.vocabulary, rows, pretrained=model is not None)

    template: ChatTemplate | None = None
    if recipe.learns_examples:
        template = chosen_template(recipe, tokenizer)
        folders = [
            build_examples(source, tokenizer, template, example_rules(recipe), root, say)
            for source in sources
        ]
        encoded = _opened(sources, folders)
    else:
        encoded = _encode(sources, tokenizer, root, say)
    count = len(training)
    description = _describe(recipe, encoded[:count], encoded[count:], share, tokenizer)
    description["chat_template"] = None
    if template is not None:
        description["chat_template"] = [template.source, template.tool_source]
    if directory is not None:
        tokenizer = _leave(description, tokenizer, directory)
    return open_description(description, tokenizer)


def prepare_held_out(
    sources: Sequence[Source],
    tokenizer: str | Path,
    *,
    sequence_length: int,
    packing: Packing = "concat",
    batch_rows: int = 8,
    objective: Objective | None = None,
    cache: Path | None = None,
    progress: Say | None = None,
) -> dict[str, Batches]:
    """Batches of each source by name, in order and once: to score a finished model on.

    They are plain text, or examples as an `objective` takes them, which no packing splits.
    `tokenizer` is its directory or hub id. Raises UserError as `prepare_data` does.
    """
    say = progress or _say_nothing
    root = cache_folder(cache)
    opened = _open_sources({"": sources}, root, examples=objective is not None)
    section = TokenizerSection(path=str(tokenizer))
    folder = build_vocabulary(section, None, [], 0.0, None, root, say)
    pad_id = Encoder(folder).pad_id
    assert pad_id is not None  # every folder that `build_vocabulary` made has one

    def batches(corpus: Corpus) -> Batches:
        stream = Stream(
            corpus, packing=packing, sequence_length=sequence_length, seed=0, shuffle=False
        )
        return Batches([stream], batch_rows=batch_rows, pad_id=pad_id, endless=False)

    if objective is None:
        encoded = _encode(opened, folder, root, say)
    else:
        packing, rules = "best-fit", rules_of(objective, sequence_length)
        template = _template(None, folder)
        built = [build_examples(each, folder, template, rules, root, say) for each in opened]
        encoded = _opened(opened, built)
    return {each.name: batches(whole_corpus(each.cache)) for each in encoded}


def example_rules(recipe: Recipe) -> ExampleRules:
    """How the recipe's rows become sequences: a row of the batch holds at least one example."""
    data = recipe.data
    return rules_of(recipe.objective, data.sequence_length, data.too_long, data.bad_rows)


def rules_of(
    objective: Objective,
    sequence_length: int,
    too_long: Literal["cut", "drop"] = "cut",
    bad_rows: Literal["refuse", "drop"] = "refuse",
) -> ExampleRules:
    """How an objective's examples become sequences in rows of `sequence_length` tokens."""
    imitates = objective.kind in ("sft", "distill")
    default: TrainOn = "assistant" if imitates else "completion"
    return ExampleRules(
        objective.kind,
        objective.train_on or default,
        sequence_length // objective.sequences,
        too_long,
        bad_rows,
    )


def chosen_template(recipe: Recipe, tokenizer: Path) -> ChatTemplate:
    """The chat template that the recipe names, the tokenizer's own, or a plain one."""
    section = recipe.tokenizer
    return _template(None if section is None else section.chat_template, tokenizer)


def _template(name: str | None, tokenizer: Path) -> ChatTemplate:
    found = find_template(name, tokenizer) or find_template(DEFAULT_TEMPLATE, tokenizer)
    assert found is not None
    return found


def _open_sources(
    lists: Mapping[str, Sequence[Source]], cache: Path, *, examples: bool
) -> list[OpenedSource]:
    """The sources of all lists, their files found and hashed; `lists` goes by recipe key.

    Raises UserError with everything that is wrong with any of them.
    """
    mistakes, found = [], []
    for place, sections in lists.items():
        for number, (section, name) in enumerate(
            zip(sections, source_names(sections), strict=True)
        ):
            key = f"{place}.{number}" if place else ""
            mistakes += check_source(section, key, examples=examples)
            found.append((section, name, key))
    if mistakes:
        raise UserError(mistakes)
    return [open_source(section, name, key, cache) for section, name, key in found]


def _encode(
    sources: Sequence[OpenedSource], tokenizer: Path, root: Path, say: Say
) -> list[_Encoded]:
    return _opened(sources, [build_tokens(source, tokenizer, root, say) for source in sources])


def _opened(sources: Sequence[OpenedSource], folders: Sequence[Path]) -> list[_Encoded]:
    return [
        _Encoded(source.name, folder, require_cache(folder))
        for source, folder in zip(sources, folders, strict=True)
    ]


def _require_room(vocabulary: int, rows: int | None, *, pretrained: bool) -> None:
    if rows is None or vocabulary <= rows:
        return
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
    training: Sequence[_Encoded],
    held_out: Sequence[_Encoded],
    share: float,
    tokenizer: Path,
) -> dict[str, Any]:
    """All that `open_description` needs, as JSON values."""
    threshold = held_out_below([each.cache.text_hashes for each in training], share)
    order = {
        "threshold": threshold,
        "sequence_length": recipe.data.sequence_length,
        "packing": recipe.packing,
        "shuffle": recipe.data.shuffle,
        "seed": recipe.seed,
        "batch_rows": recipe.batch_sequences,
        "weights": [source.weight for source in recipe.data.sources],
    }
    hashes = [file_hashes(each.folder) for each in (*training, *held_out)]
    columns = ("tokens.bin", "offsets.bin", "trained.bin", "values.bin")
    tokens = [[files[name] for name in columns if name in files] for files in hashes]
    encoder = Encoder(tokenizer)
    return {
        # What may not change between a run's start and its continuation.
        "identity": digest([order, tokens, file_hashes(tokenizer)["tokenizer.json"]]),
        **order,
        "pad_id": encoder.pad_id,
        "vocabulary": encoder.vocabulary,
        "train": [{"name": each.name, "cache": str(each.folder)} for each in training],
        "validation": [{"name": each.name, "cache": str(each.folder)} for each in held_out],
        "summary": [asdict(each) for each in _summarise(training, held_out, threshold)],
    }


def _summarise(
    training: Sequence[_Encoded], held_out: Sequence[_Encoded], threshold: int
) -> list[SourceSummary]:
    def summary(source: _Encoded, split: str, corpus: Corpus, **more: Any) -> SourceSummary:
        counts = corpus.documents, corpus.tokens, corpus.text_bytes
        return SourceSummary(source.name, split, *counts, **more)

    def side(source: _Encoded, *, apart: bool) -> Corpus:
        return Corpus([source.cache], [chosen(source.cache, threshold, held_out=apart)], [""])

    def lost(source: _Encoded) -> dict[str, Any]:
        facts = source.cache.facts
        return {"lost": facts.get("lost", {}), "lost_rows": facts.get("rows", {})}

    trained = np.concatenate([each.cache.text_hashes for each in training])
    parts = [
        summary(each, "train", side(each, apart=False), dropped=each.cache.dropped, **lost(each))
        for each in training
    ]
    parts += [summary(each, "validation", side(each, apart=True)) for each in training]
    for each in held_out:
        again = int(np.isin(each.cache.text_hashes, trained).sum())
        corpus = whole_corpus(each.cache)
        more = {"dropped": each.cache.dropped, "also_trained": again, **lost(each)}
        parts.append(summary(each, "validation", corpus, **more))
    return [part for part in parts if part.documents or part.split == "train"]


def _leave(description: dict[str, Any], tokenizer: Path, directory: Path) -> Path:
    """Write the tokenizer and then `data.json` into `directory`; returns the tokenizer's copy."""
    directory.mkdir(parents=True, exist_ok=True)
    file, copy = directory / DESCRIPTION, directory / TOKENIZER
    with locked(directory / ".data.lock"):
        known = json.loads(file.read_text())["identity"] if file.is_file() else None
        if known not in (None, description["identity"]):
            raise UserError(
                Mistake(
                    f"the data differs from what the run in {directory} began with: its sources "
                    "or their tokens have changed since",
                    "restore them to continue the run, or choose another `run_directory`",
                    key="data.sources",
                )
            )
        if known is None or not copy.is_dir():
            shutil.rmtree(copy, ignore_errors=True)
            ours = shutil.ignore_patterns("manifest.json", "verified.json")
            shutil.copytree(tokenizer, copy, ignore=ours)
            if description["chat_template"] is not None:
                _save_template(copy, *description["chat_template"])
        write_json(file, description)
    return copy


def _save_template(tokenizer: Path, source: str, tool_source: str | None) -> None:
    """What a model was trained with is saved with it, in the form that transformers reads."""
    write_atomically(tokenizer / "chat_template.jinja", source)
    if tool_source is not None:
        more = tokenizer / "additional_chat_templates"
        more.mkdir(exist_ok=True)
        write_atomically(more / "tool_use.jinja", tool_source)
    file = tokenizer / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("chat_template", None)
    # A template writes special tokens as text, which are then to be read as tokens.
    config["split_special_tokens"] = False
    write_json(file, config)


def _say_nothing(message: str) -> None:
    pass

"""Examples out of sources, encoded once a key: rows → Examples → tokens and masks in the cache."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainwright.data import token_cache
from trainwright.data.build import OpenedSource, Say
from trainwright.data.digests import digest, text_hash
from trainwright.data.encode import Encoder
from trainwright.data.examples import Conversation, Example, RowRefusedError, Text
from trainwright.data.folders import build_once, file_hashes
from trainwright.data.formats import example_of
from trainwright.data.formats_rows import read_dataset_rows, read_rows
from trainwright.data.masks import Encoded, Renderer, TrainOn, cut, encode_many
from trainwright.data.templates import ChatTemplate
from trainwright.errors import Mistake, UserError
from trainwright.recipe.objective import PAIRED, Kind

_FORMAT = 2  # part of every key: a change in how examples are encoded makes new caches
_GROUP = 1024  # examples encoded at once; among them KTO mixes up answers
_NAMED = 20  # rows that are named of those left out, cut or refused


@dataclass(frozen=True)
class ExampleRules:
    """How rows become sequences of tokens.

    `length` is the most tokens of one sequence; longer ones are cut or dropped. `parts` sequences
    make an example.
    """

    kind: Kind
    train_on: TrainOn
    length: int
    too_long: Literal["cut", "drop"]
    bad_rows: Literal["refuse", "drop"] = "refuse"

    @property
    def parts(self) -> int:
        """Sequences of an example."""
        return 2 if self.kind in (*PAIRED, "kto") else 1


@dataclass
class _Losses:
    """How many rows were shortened ("cut") or left out ("too long", "bad"), and the first names."""

    counts: Counter[str] = field(default_factory=Counter)
    rows: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: Literal["cut", "too long", "bad"], name: str) -> None:
        self.counts[what] += 1
        named = self.rows.setdefault(what, [])
        if len(named) < _NAMED:
            named.append(name)


def build_examples(
    source: OpenedSource,
    tokenizer: Path,
    template: ChatTemplate | None,
    rules: ExampleRules,
    cache: Path,
    say: Say,
) -> Path:
    """The folder of a source's examples, encoded if it is not in the cache yet.

    Raises UserError naming the first rows that cannot be understood or hold nothing to train on,
    each with its reason.
    """
    look = None if template is None else [template.source, template.tool_source, template.tokens]
    section = source.section
    reading = [section.format, sorted(section.columns.items())]
    key = [token_cache.FORMAT, _FORMAT, source.fingerprint, file_hashes(tokenizer)]
    key += [look, reading, asdict(rules)]

    def build(folder: Path) -> Mapping[str, Any]:
        say(f"reading examples of {source.name}")
        facts = _write(folder, source, Renderer(tokenizer, template), Encoder(tokenizer), rules)
        if facts["documents"] == 0:
            what = f"{source.name} holds no example that can be trained on"
            fix = "raise `data.sequence_length`, or check the source"
            raise UserError(Mistake(what, fix, key=source.key))
        return facts

    folder = cache / "examples" / digest(key)
    build_once(folder, build, lambda: say(f"waiting for another process that reads {source.name}"))
    return folder


def read_examples(source: OpenedSource, kind: Kind) -> Iterator[Example | Mistake]:
    """The examples of a source in order, at most its limit; a Mistake for a row that is none."""
    section = source.section
    format = None if section.format == "auto" else section.format
    for name, row in islice(_rows(source, kind), section.limit):
        try:
            example = example_of(row, format, section.columns, name)
            yield _fitted(example, kind)
        except RowRefusedError as error:
            yield Mistake(error.what, error.fix, source.key, name)


def _rows(source: OpenedSource, kind: Kind) -> Iterator[tuple[str, Any]]:
    located = source.located
    if located.kind == "stdlib-docs":
        from trainwright.data.stdlib_docs import rows_for

        yield from rows_for(kind)
    elif located.kind == "dataset":
        yield from read_dataset_rows(located, source.section)
    else:
        for file in located.files:
            yield from read_rows(file, located.name_of(file))


def _fitted(example: Example, kind: Kind) -> Example:
    """The example as an objective of that kind takes it. Raises RowRefusedError where it cannot."""
    if kind in PAIRED:
        if len(example.sequences) == 2:
            return example
        what = f"the row is one answer, and {kind} compares two"
        raise RowRefusedError(what, "give rows with `chosen` and `rejected`, or `objective: sft`")
    if kind == "kto":
        if len(example.sequences) == 2:
            fix = "give rows with `label`, or `objective: dpo`"
            raise RowRefusedError("the row is a pair of answers, and kto judges single ones", fix)
        if example.label is None:
            fix = "add `label: true` or `false` to every row"
            raise RowRefusedError("the row does not say whether its answer is good", fix)
        return example
    if len(example.sequences) == 2:  # what is to be imitated is the better one
        return Example(example.name, example.sequences[:1])
    return example


def _write(
    folder: Path, source: OpenedSource, renderer: Renderer, encoder: Encoder, rules: ExampleRules
) -> dict[str, Any]:
    refused: list[Mistake] = []
    total = 0
    losses = _Losses()
    with token_cache.CacheWriter(folder, encoder.dtype, rules.parts) as writer:
        waiting = read_examples(source, rules.kind)
        while group := list(islice(waiting, _GROUP)):
            examples = [each for each in group if isinstance(each, Example)]
            refused += [each for each in group if isinstance(each, Mistake)]
            total += len(group)
            encoded, mistakes = _encode(examples, renderer, rules, source.key)
            refused += mistakes
            if rules.bad_rows == "drop":
                for mistake in refused:
                    losses.add("bad", mistake.where)
                refused = []
            if not refused:
                _add(writer, encoded, rules, losses)
    if refused:
        raise _refusal(refused, total)
    dropped = losses.counts["too long"] + losses.counts["bad"]
    return writer.facts | {"dropped": dropped, "lost": dict(losses.counts), "rows": losses.rows}


Encodings = list[tuple[Example, list[Encoded]]]


def _encode(
    examples: Sequence[Example], renderer: Renderer, rules: ExampleRules, key: str
) -> tuple[Encodings, list[Mistake]]:
    """The examples' sequences as tokens, and what cannot be."""
    sequences = [each.sequences for each in examples]
    if rules.kind == "kto":
        sequences = _with_mismatched(sequences)
    flat = [sequence for each in sequences for sequence in each]
    results = encode_many(flat, renderer, train_on=rules.train_on)
    encoded, mistakes = [], []
    for example, own in zip(examples, sequences, strict=True):
        found = [next(results) for _ in own]
        wrong = next((each for each in found if isinstance(each, RowRefusedError)), None)
        if wrong is not None:
            mistakes.append(Mistake(wrong.what, wrong.fix, key, example.name))
        else:
            encoded.append((example, [each for each in found if isinstance(each, Encoded)]))
    return encoded, mistakes


def _with_mismatched(
    sequences: Sequence[tuple[Text | Conversation, ...]],
) -> list[tuple[Text | Conversation, ...]]:
    """Each answer, and its prompt with the next example's answer, the last one's with the first's.

    KTO measures on those how far the policy has moved (Ethayarajh et al. 2024, section 4.2).
    """
    answers = [each[0] for each in sequences]
    return [
        (own, _answered_by(own, other))
        for own, other in zip(answers, [*answers[1:], *answers[:1]], strict=True)
    ]


def _answered_by(own: Text | Conversation, other: Text | Conversation) -> Text | Conversation:
    if isinstance(own, Text) and isinstance(other, Text):
        return Text(own.prompt, other.completion)
    if isinstance(own, Conversation) and isinstance(other, Conversation):
        answer = other.messages[other.first :]
        return Conversation((*own.messages[: own.first], *answer), own.first, own.tools)
    return own  # a text and a conversation do not mix


def _add(
    writer: token_cache.CacheWriter, encoded: Encodings, rules: ExampleRules, losses: _Losses
) -> None:
    kept: list[tuple[Example, list[Encoded]]] = []
    for example, sequences in encoded:
        if all(len(each.ids) <= rules.length for each in sequences):
            kept.append((example, sequences))
            continue
        # A prompt that a pair shares loses its beginning; a single answer its end.
        keep: Literal["start", "end"] = "end" if rules.parts == 2 else "start"
        shorter = [cut(each, rules.length, keep) for each in sequences]
        whole = [each for each in shorter if each is not None]
        if rules.too_long == "drop" or len(whole) < len(shorter):
            losses.add("too long", example.name)
        else:
            losses.add("cut", example.name)
            kept.append((example, whole))
    if not kept:
        return
    texts = [json.dumps(asdict(e)["sequences"], ensure_ascii=False, default=str) for e, _ in kept]
    tokens: list[NDArray[np.integer]] = [np.concatenate([s.ids for s in own]) for _, own in kept]
    writer.add(
        names=[example.name for example, _ in kept],
        tokens=tokens,
        text_bytes=[len(text.encode()) for text in texts],
        hashes=[text_hash(text) for text in texts],
        lead_bytes=[0] * len(kept),
        trained=np.concatenate([s.trained for _, own in kept for s in own]),
        part_lengths=[len(s.ids) for _, own in kept for s in own],
        values=[_value(example) for example, _ in kept],
    )


def _value(example: Example) -> float:
    """What an objective knows of an example: KTO's label, or by how much a pair's better is."""
    return float(example.label) if example.label is not None else example.margin


def _refusal(refused: Sequence[Mistake], total: int) -> UserError:
    shown = list(refused[:_NAMED])
    if len(refused) < total:
        what = f"{len(refused):,} of {total:,} rows cannot be trained on"
        shown.append(Mistake(what, "mend them, or leave them out with `data.bad_rows: drop`"))
    return UserError(shown)

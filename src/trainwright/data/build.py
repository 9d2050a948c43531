"""The slow part of preparing data, done once a key: train the tokenizer, encode the sources."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from trainwright.data import token_cache, tokenizers
from trainwright.data.digests import digest, file_digest, text_hash
from trainwright.data.encode import Encoder
from trainwright.data.fingerprint import source_fingerprint
from trainwright.data.folders import build_once, file_hashes
from trainwright.data.locate import Located, locate
from trainwright.data.readers import Document
from trainwright.data.sources import read_documents
from trainwright.data.split import held_out_below
from trainwright.errors import Mistake, UserError
from trainwright.recipe.schema import Source, TokenizerSection

_TOKENIZER_FORMAT = 1  # part of every key: a change in how tokenizers are made makes new ones
_SECONDS_BETWEEN_WORDS = 2.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class OpenedSource:
    """A source with its files found and its contents hashed."""

    section: Source
    name: str
    key: str
    located: Located
    fingerprint: str

    def documents(
        self, on_empty: Callable[[Document], None] = lambda d: None
    ) -> Iterator[Document]:
        """Its documents, without the empty ones."""
        return read_documents(self.section, on_empty, self.located)


def open_source(section: Source, name: str, key: str, cache: Path) -> OpenedSource:
    """Find a source's files and hash what they hold."""
    located = locate(section, key)
    return OpenedSource(section, name, key, located, source_fingerprint(section, located, cache))


def build_vocabulary(
    section: TokenizerSection | None,
    model_path: str | None,
    sources: Sequence[OpenedSource],
    share: float,
    rows: int | None,
    cache: Path,
    say: Say,
) -> Path:
    """The folder of the recipe's tokenizer, built if it is not in the cache yet.

    A trained one sees the training documents of `sources` only, without the `share` held out.
    `rows` is the size of the model's embedding, None if it follows from the tokenizer.
    """
    key: list[Any] = [_TOKENIZER_FORMAT]
    train = section.train if section is not None else None
    if train is not None:
        key += [train.vocab_size, train.bytes, share, [each.fingerprint for each in sources]]
    elif section is not None and section.path == "bytes":
        key += ["bytes"]
    elif (reference := section.path if section is not None else model_path) is not None:
        directory = tokenizers.download_tokenizer(reference)
        files = {each for pattern in tokenizers.TOKENIZER_FILES for each in directory.glob(pattern)}
        contents = [(file.name, file_digest(file)) for file in sorted(files)]
        # transformers decides what the files mean, and may do so differently in another version.
        key += [contents, rows, version("transformers")]
        section, model_path = None, str(directory)

    def build(folder: Path) -> Mapping[str, Any]:
        texts: Iterator[str] = iter(())
        if train is not None:
            say(f"training a tokenizer of {train.vocab_size:,} tokens")
            texts = _training_texts(sources, share, train.bytes)
        tokenizers.build_tokenizer(section, model_path, texts, directory=folder, vocabulary=rows)
        return {}

    folder = cache / "tokenizers" / digest(key)
    build_once(folder, build, lambda: say("waiting for another process to make the tokenizer"))
    return folder


def build_tokens(source: OpenedSource, tokenizer: Path, cache: Path, say: Say) -> Path:
    """The folder of a source's tokens, encoded if it is not in the cache yet."""
    key = [token_cache.FORMAT, source.fingerprint, file_hashes(tokenizer)]

    def build(folder: Path) -> Mapping[str, Any]:
        say(f"tokenising {source.name}")
        empty: list[None] = []
        spoken = time.monotonic()

        def tell(documents: int, size: int) -> None:
            nonlocal spoken
            if time.monotonic() - spoken > _SECONDS_BETWEEN_WORDS:
                spoken = time.monotonic()
                say(f"tokenising {source.name}: {documents:,} documents, {size / 1e6:,.0f} MB")

        facts = token_cache.write_cache(
            folder,
            source.documents(lambda document: empty.append(None)),
            Encoder(tokenizer),
            dropped=lambda: len(empty),
            progress=tell,
        )
        if facts["documents"] == 0:
            raise _no_text(source)
        return facts

    folder = cache / "tokens" / digest(key)
    build_once(
        folder, build, lambda: say(f"waiting for another process that tokenises {source.name}")
    )
    return folder


def _training_texts(
    sources: Sequence[OpenedSource], share: float, most_bytes: int
) -> Iterator[str]:
    """Texts of the training documents, at most `most_bytes` of them, evenly from all."""
    hashes, sizes = [], []
    for source in sources:
        pairs = [(text_hash(d.text), len(d.text.encode())) for d in source.documents()]
        if not pairs:
            raise _no_text(source)
        hashes.append(np.array([each for each, _ in pairs], dtype=np.uint64))
        sizes.append(np.array([size for _, size in pairs], dtype=np.int64))
    threshold = held_out_below(hashes, share)
    kept = [(each >= np.uint64(threshold)).tolist() for each in hashes]
    total = sum(int(size[keep].sum()) for size, keep in zip(sizes, kept, strict=True))

    def texts() -> Iterator[str]:
        for source, keeps in zip(sources, kept, strict=True):
            for document, keep in zip(source.documents(), keeps, strict=True):
                if keep:
                    yield document.text

    return tokenizers.spread_evenly(texts(), most_bytes / max(total, 1))


def _no_text(source: OpenedSource) -> UserError:
    what = f"{source.name} holds no text: every document in it is empty"
    return UserError(Mistake(what, "check its path and `field`", key=source.key))

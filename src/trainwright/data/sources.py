"""A source of the recipe as a stream of documents, checked before it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trainwright.data.locate import KIND_OF, Located, bare_ending, locate
from trainwright.data.readers import READERS, Document, decode_text, open_bytes, reading
from trainwright.errors import Mistake, UserError
from trainwright.recipe.schema import Source

_FIRST_BYTES = 65_536  # of a text file are looked at by `check_source`

__all__ = ["Document", "check_source", "read_documents", "source_names"]


def read_documents(
    source: Source,
    on_empty: Callable[[Document], None] = lambda document: None,
    located: Located | None = None,
) -> Iterator[Document]:
    """The documents of `source` in a fixed order, at most `source.limit`.

    Documents that are empty or only white space are passed to `on_empty` instead and do not count.
    `located` spares looking for the files again. Raises UserError, with the file and line, where
    something cannot be read.
    """
    located = located or locate(source)
    taken = 0
    for document in READERS[located.kind](located, source):
        if not document.text or document.text.isspace():
            on_empty(document)
            continue
        yield document
        taken += 1
        if taken == source.limit:
            return


def check_source(source: Source, key: str = "", *, examples: bool = False) -> list[Mistake]:
    """What is wrong with `source` as far as can be seen quickly; `key` is its recipe key.

    With `examples` its rows are read as such, else as documents.

    Looks for the files, their endings and sizes, and at the first document; a dataset on the hub
    is not looked up.
    """
    try:
        located = locate(source, key)
        if located.kind == "stdlib-docs" and not examples:
            what = "stdlib-docs is made of examples, and next_token learns from plain text"
            return [Mistake(what, "write `python-stdlib`, or another `objective`", key)]
        if examples:
            return []  # rows are looked at one by one when they are read
        if located.kind in ("text", "jsonl") and all(f.stat().st_size == 0 for f in located.files):
            what = "is empty" if len(located.files) == 1 else "holds only empty files"
            return [Mistake(what, "give a file that holds text", key, str(source.path))]
        if located.kind == "text":
            _check_beginning(located.files[0])
        elif located.kind in ("jsonl", "parquet", "arrow"):
            first = Located(located.kind, located.root, located.files[:1])
            next(READERS[located.kind](first, source), None)
    except UserError as error:
        return [
            Mistake(mistake.what, mistake.fix, mistake.key or key, mistake.where)
            for mistake in error.mistakes
        ]
    return []


def _check_beginning(file: Path) -> None:
    """UserError if the first bytes are not text. A character cut at the end is no mistake."""
    with reading(file), open_bytes(file) as stream:
        content = stream.read(_FIRST_BYTES)
    if len(content) == _FIRST_BYTES:
        content = content[: content.rfind(b"\n") + 1]
    decode_text(content, file)


def source_names(sources: Sequence[Source]) -> list[str]:
    """A short name for each source, all different: "python-stdlib", "books", "books-2"."""
    names: list[str] = []
    for source in sources:
        name = wanted = _short_name(source)
        number = 1
        while name in names:
            number += 1
            name = f"{wanted}-{number}"
        names.append(name)
    return names


def _short_name(source: Source) -> str:
    if source.path is None:
        return source.kind or "source"
    plain = [part for part in Path(source.path).parts if not set(part) & set("*?[")]
    path = Path(plain[-1]) if plain and plain[-1] != "/" else Path("files")
    ending = bare_ending(path)
    name = path.name[: path.name.lower().rindex(ending)] if ending in KIND_OF else path.name
    return name or path.name

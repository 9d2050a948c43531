"""Documents out of files, one reader a kind, streamed: no reader holds more than a file's batch."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from trainwright.data.locate import Located
from trainwright.errors import Mistake, UserError
from trainwright.recipe.schema import Source, SourceKind

if TYPE_CHECKING:
    import pyarrow

_ROWS_AT_ONCE = 128  # documents can be large: a batch of rows is held as Python strings


class Document(NamedTuple):
    """A text and its name: a file, or a file and its line or row ("books.jsonl:17")."""

    id: str
    text: str


def _zstd(path: Path) -> IO[bytes]:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
}


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, unpacked if its ending is .gz, .bz2, .xz or .zst."""
    return _OPENERS.get(path.suffix.lower(), lambda plain: plain.open("rb"))(path)


def read_text_files(located: Located, source: Source) -> Iterator[Document]:
    """One document a file. UserError for bytes that are not UTF-8 text."""
    for file in located.files:
        with reading(file), open_bytes(file) as stream:
            content = stream.read()
        yield Document(located.name_of(file), decode_text(content, file))


def read_stdlib(located: Located, source: Source) -> Iterator[Document]:
    """One document a module of the standard library; the few that are not UTF-8 are passed over."""
    for file in located.files:
        try:
            yield Document(located.name_of(file), file.read_bytes().decode())
        except UnicodeDecodeError:
            continue


def read_jsonl(located: Located, source: Source) -> Iterator[Document]:
    """One document a line, numbered from 1; blank lines count, but are no documents."""
    for file in located.files:
        name = located.name_of(file)
        with reading(file), open_bytes(file) as stream:
            for number, line in enumerate(_lines(stream), start=1):
                if not line.isspace():
                    yield Document(f"{name}:{number}", _json_text(line, source.field, file, number))


def read_parquet(located: Located, source: Source) -> Iterator[Document]:
    """One document a row, numbered from 0, streamed by row group. A null is an empty document."""
    from pyarrow.parquet import ParquetFile

    for file in located.files:
        with reading(file), ParquetFile(file) as table:
            _check_column(table.schema_arrow, source.field, file)
            batches = table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[source.field])
            yield from _rows(located.name_of(file), batches)


def read_arrow(located: Located, source: Source) -> Iterator[Document]:
    """One document a row, numbered from 0, of Arrow IPC files or streams."""
    import pyarrow

    for file in located.files:
        with reading(file), pyarrow.memory_map(str(file)) as mapped:
            is_file = mapped.read(6) == b"ARROW1"
            mapped.seek(0)
            reader = pyarrow.ipc.open_file(mapped) if is_file else pyarrow.ipc.open_stream(mapped)
            _check_column(reader.schema, source.field, file)
            numbers = range(reader.num_record_batches) if is_file else None
            batches = reader if numbers is None else map(reader.get_batch, numbers)
            yield from _rows(located.name_of(file), (b.select([source.field]) for b in batches))


def read_dataset(located: Located, source: Source) -> Iterator[Document]:
    """One document a row, numbered from 0, of a Hugging Face dataset."""
    dataset = open_dataset(located, source)
    name = located.hub or located.root.name
    _check_column(dataset.features.arrow_schema, source.field, Path(name))
    tables = dataset.select_columns([source.field]).with_format("arrow").iter(_ROWS_AT_ONCE)
    yield from _rows(name, tables)


READERS: dict[SourceKind, Callable[[Located, Source], Iterator[Document]]] = {
    "text": read_text_files,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "dataset": read_dataset,
    "python-stdlib": read_stdlib,
}


def open_dataset(located: Located, source: Source) -> Any:
    """The `datasets.Dataset` that a source names; UserError where it cannot be had.

    Code shipped with a dataset is never run: the `datasets` library has no such loaders any more,
    and saved folders hold Arrow files and JSON only.
    """
    import datasets

    try:
        if located.hub is None:
            dataset = datasets.load_from_disk(str(located.root))
        else:
            dataset = datasets.load_dataset(located.hub, name=source.subset)
    except Exception as error:  # whatever a hub, a network or a broken folder brings
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        name = located.hub or located.root
        fix = (
            "check its name, `subset` and the network (HF_HUB_OFFLINE must not be set), or give a "
            "folder saved with `save_to_disk`"
            if located.hub
            else "save it anew with `save_to_disk`"
        )
        raise UserError(
            Mistake(f"the dataset cannot be loaded: {reason}", fix, where=str(name))
        ) from error
    if isinstance(dataset, dict):
        if source.split not in dataset:
            what = f"the dataset has no split `{source.split}`"
            fix = f"set `split` to one of {', '.join(map(str, dataset))}"
            raise UserError(Mistake(what, fix, where=str(located.hub or located.root)))
        dataset = dataset[source.split]
    return dataset


def decode_text(content: bytes, file: Path) -> str:
    """UTF-8 bytes as text, without a byte order mark. UserError names the first wrong byte."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _not_text(file, "is UTF-16, not UTF-8", "iconv -f UTF-16 -t UTF-8")
    if b"\0" in content:
        place = f"a zero byte at offset {content.index(0):,}"
        what = f"is not text: it has {place}"
        fix = "leave it out of the source (a glob such as `FOLDER/**/*.txt`), or give its `kind`"
        raise UserError(Mistake(what, fix, where=str(file)))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"is not UTF-8 text: byte 0x{content[error.start]:02x}"
        raise _not_text(file, what, "iconv -f LATIN1 -t UTF-8", line) from None


def _not_text(file: Path, what: str, command: str, line: int | None = None) -> UserError:
    where = f"{file}:{line}" if line else str(file)
    return UserError(Mistake(what, f"convert it, for instance with `{command}`", where=where))


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    # Arrow's own streams have no lines; a buffered reader gives every kind of stream the same.
    reader: Any = stream if hasattr(stream, "peek") else io.BufferedReader(cast(Any, stream))
    for number, line in enumerate(reader):
        yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line


def _json_text(line: bytes, field: str, file: Path, number: int) -> str:
    def refuse(what: str, fix: str) -> UserError:
        return UserError(Mistake(what, fix, where=f"{file}:{number}"))

    try:
        record = json.loads(line.rstrip().decode())
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text: byte 0x{line[error.start]:02x} in column {error.start + 1}"
        raise refuse(what, "convert the file to UTF-8") from None
    except RecursionError:
        raise refuse("is nested too deep", "mend or delete this line") from None
    except json.JSONDecodeError as error:
        if number == 1 and line.lstrip().startswith(b"["):
            fix = "write one object a line: `jq -c '.[]' FILE > FILE.jsonl`"
            raise refuse("is one JSON array, not JSON lines", fix) from None
        what = f"is not valid JSON: {error.msg} (column {error.colno})"
        raise refuse(what, "mend or delete this line") from None
    if isinstance(record, list) and number == 1:
        fix = "write one object a line: `jq -c '.[]' FILE > FILE.jsonl`"
        raise refuse("is one JSON array, not JSON lines", fix)
    if not isinstance(record, dict):
        what = f"is {_type_name(record)}, not an object"
        raise refuse(what, f'every line needs the form {{"{field}": "…"}}')
    if field not in record:
        keys = ", ".join(f"`{key}`" for key in list(record)[:8]) or "no keys at all"
        raise refuse(f"has no key `{field}`; it has {keys}", "set the source's `field`")
    text = record[field]
    if not isinstance(text, str):
        what = f"`{field}` is {_type_name(text)}, not text"
        raise refuse(what, "mend or delete this line, or set the source's `field`")
    return _valid(text, f"{file}:{number}")


def _valid(text: str, where: str) -> str:
    """`text` itself; UserError if it holds half a surrogate pair, which no tokenizer can read."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what = f"holds half a surrogate pair, \\u{ord(text[error.start]):04x}: no valid text"
            raise UserError(Mistake(what, "mend or delete it", where=where)) from None
    return text


def _type_name(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    names |= {dict: "an object", str: "text", type(None): "null"}
    return names[type(value)]


def _check_column(schema: pyarrow.Schema, field: str, file: Path) -> None:
    import pyarrow

    if field not in schema.names:
        columns = ", ".join(f"`{name}`" for name in schema.names[:12])
        what = f"has no column `{field}`; it has {columns}"
        raise UserError(Mistake(what, "set the source's `field`", where=str(file)))
    kind = schema.field(field).type
    inner = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    texts = ("is_string", "is_large_string", "is_string_view")
    if not any(getattr(pyarrow.types, check, lambda _: False)(inner) for check in texts):
        what = f"column `{field}` holds {kind}, not text"
        raise UserError(Mistake(what, "set the source's `field`", where=str(file)))


def _rows(name: str, batches: Iterable[Any]) -> Iterator[Document]:
    row = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
            for text in batch.column(0).slice(start, _ROWS_AT_ONCE).to_pylist():
                yield Document(f"{name}:{row}", text or "")
                row += 1


class reading:  # noqa: N801 - reads as a statement: `with reading(file):`
    """Turns what a broken or unreadable file brings into a UserError that names the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        broken = (OSError, EOFError, zlib.error, lzma.LZMAError)
        if error is None or isinstance(error, UserError):
            return
        # pyarrow's errors are known by name, so that reading text does not import pyarrow.
        if isinstance(error, broken) or type(error).__module__.startswith("pyarrow"):
            reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
            what = f"cannot be read: {reason or type(error).__name__}"
            fix = "check that it is whole, of the kind its ending says, and readable"
            raise UserError(Mistake(what, fix, where=str(self.file))) from error

"""Rows out of files: JSON arrays, JSON lines, Parquet, Arrow and CSV, compressed or not."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from trainwright.data.locate import Located, bare_ending
from trainwright.data.readers import decode_text, open_bytes, open_dataset, reading
from trainwright.errors import Mistake, UserError
from trainwright.recipe.schema import Source

Row = Any  # a JSON object, or a list of messages

_ROWS_AT_ONCE = 128
_SPACE = " \t\r\n"
_ARROW_ENDINGS = (".arrow", ".feather", ".ipc")


def read_rows(path: Path, name: str | None = None) -> Iterator[tuple[str, Row]]:
    """The rows of a file with their names, in order.

    `name` (default: the file's own) begins every row's name. Lines of JSON lines and of CSV are
    numbered from 1 ("faq.jsonl:12"), elements of a JSON array and rows of Parquet and Arrow files
    from 0 ("faq.json[11]"). What a .json or .jsonl file holds is seen from its contents, not from
    its ending. Raises UserError, with the place, for what cannot be read.
    """
    name = name or path.name
    ending = bare_ending(path)
    if ending in (".parquet", ".pq"):
        return _numbered(name, _parquet_rows(path))
    if ending in _ARROW_ENDINGS:
        return _numbered(name, _arrow_rows(path))
    if ending in (".csv", ".tsv"):
        return _csv_rows(path, name, "\t" if ending == ".tsv" else ",")
    return _json_rows(path, name)


def read_dataset_rows(located: Located, source: Source) -> Iterator[tuple[str, Row]]:
    """The rows of a Hugging Face dataset, numbered from 0; UserError where it cannot be had."""
    dataset = open_dataset(located, source)
    return _numbered(located.hub or located.root.name, iter(dataset))


def _numbered(name: str, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(rows):
        yield f"{name}[{number}]", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """`value` without the keys that hold null, at any depth.

    In Arrow's tables every struct has all the keys of its column: a tool's call, for one, has the
    arguments of all tools, null but for its own.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    with reading(path), ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _arrow_rows(path: Path) -> Iterator[Row]:
    import pyarrow

    with reading(path), pyarrow.memory_map(str(path)) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        reader = pyarrow.ipc.open_file(mapped) if is_file else pyarrow.ipc.open_stream(mapped)
        batches: Iterable[Any] = reader
        if is_file:
            batches = map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield from batch.slice(start, _ROWS_AT_ONCE).to_pylist()


def _csv_rows(path: Path, name: str, delimiter: str) -> Iterator[tuple[str, Row]]:
    """One row a record, its fields named by the first line; named by the line that it begins on."""
    with reading(path), open_bytes(path) as stream:
        text = decode_text(stream.read(), path)
    # The module's own limit of 128 KiB a field is less than a long conversation.
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    records = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = records.line_num + 1
        try:
            record = next(records, None)
        except csv.Error as error:
            what = f"is not valid CSV: {error}"
            raise UserError(
                Mistake(what, "mend the record", where=f"{path}:{records.line_num}")
            ) from None
        if record is None:
            return
        if not record:
            continue
        if header is None:
            header = record
        elif len(record) != len(header):
            what = f"has {len(record)} fields, but the first line names {len(header)}"
            fix = "put fields that hold commas or line ends into double quotes"
            raise UserError(Mistake(what, fix, where=f"{path}:{line}"))
        else:
            yield f"{name}:{line}", dict(zip(header, record, strict=True))


def _json_rows(path: Path, name: str) -> Iterator[tuple[str, Row]]:
    """The rows of a JSON array, of JSON lines, or the one row of a file that is one object."""
    with reading(path), open_bytes(path) as stream:
        lines = _numbered_lines(stream)
        first = next((pair for pair in lines if pair[1].strip()), None)
        if first is None:
            raise UserError(Mistake("holds no rows", "give a file that does", where=str(path)))
        lines = itertools.chain([first], lines)
        if _is_whole_row(first[1]):
            yield from _json_lines(lines, path, name)
        else:
            text = decode_text(b"".join(line for _, line in lines), path)
            yield from _json_document(text, path, name, skipped=first[0] - 1)


def _numbered_lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    # Arrow's own streams have no lines; a buffered reader gives every kind of stream the same.
    reader: Any = stream if hasattr(stream, "peek") else io.BufferedReader(cast(Any, stream))
    for number, line in enumerate(reader, start=1):
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _is_whole_row(line: bytes) -> bool:
    """Whether a line is a row by itself: an object, or a list of turns.

    A line that holds a whole array of rows is none; nor is the first line of one over many lines.
    """
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):
        # A broken line among JSON lines begins as a row does and ends as one; `{` alone does not.
        text = line.strip()
        return text.startswith(b"{") and len(text) > 2 and text.endswith(b"}")
    return isinstance(value, dict) or _is_list_of_turns(value)


def _is_list_of_turns(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)
    )


def _json_lines(
    lines: Iterable[tuple[int, bytes]], path: Path, name: str
) -> Iterator[tuple[str, Row]]:
    for number, line in lines:
        if line.isspace():
            continue
        where = f"{path}:{number}"
        try:
            yield f"{name}:{number}", json.loads(line.decode())
        except UnicodeDecodeError as error:
            what = f"is not UTF-8 text: byte 0x{line[error.start]:02x} in column {error.start + 1}"
            raise UserError(Mistake(what, "convert the file to UTF-8", where=where)) from None
        except RecursionError:
            fix = "mend or delete this line"
            raise UserError(Mistake("is nested too deep", fix, where=where)) from None
        except json.JSONDecodeError as error:
            what = f"is not valid JSON: {error.msg} (column {error.colno})"
            raise UserError(Mistake(what, "mend or delete this line", where=where)) from None


def _json_document(text: str, path: Path, name: str, skipped: int) -> Iterator[tuple[str, Row]]:
    """The rows of one JSON value; only one element of an array is held as objects at a time."""
    decode = json.JSONDecoder().raw_decode
    place = _after_space(text, 0)
    if text[place] != "[":
        value, end = _decoded(decode, text, place, path, "the file", skipped)
        _require_end(text, end, path, skipped)
        yield name, value
        return
    place = _after_space(text, place + 1)
    for number in itertools.count():
        if text[place : place + 1] == "]":
            break
        value, place = _decoded(decode, text, place, path, f"element {number}", skipped)
        if number == 0 and _is_turn(value):
            # A list of turns over several lines: the whole file is one conversation.
            whole, end = _decoded(decode, text, _after_space(text, 0), path, "the file", skipped)
            _require_end(text, end, path, skipped)
            yield name, whole
            return
        yield f"{name}[{number}]", value
        place = _after_space(text, place)
        sign = text[place : place + 1]
        if sign == ",":
            place = _after_space(text, place + 1)
        elif sign != "]":
            what = f"is not valid JSON: `,` or `]` is missing after element {number}"
            raise _broken(text, place, path, what, skipped)
    _require_end(text, place + 1, path, skipped)


def _is_turn(value: object) -> bool:
    return isinstance(value, dict) and value.keys() in (
        {"role", "content"},
        {"from", "value"},
    )


def _decoded(
    decode: Callable[[str, int], tuple[Any, int]],
    text: str,
    place: int,
    path: Path,
    what: str,
    skipped: int,
) -> tuple[Any, int]:
    try:
        return decode(text, place)
    except json.JSONDecodeError as error:
        message = f"is not valid JSON: {error.msg}, in {what}"
        raise _broken(text, error.pos, path, message, skipped) from None
    except RecursionError:
        raise _broken(text, place, path, f"{what} is nested too deep", skipped) from None


def _require_end(text: str, end: int, path: Path, skipped: int) -> None:
    end = _after_space(text, end)
    if end < len(text):
        what = "is not valid JSON: there is more text after the end of the array or object"
        raise _broken(text, end, path, what, skipped)


def _broken(text: str, place: int, path: Path, what: str, skipped: int) -> UserError:
    line = text.count("\n", 0, place) + 1 + skipped
    fix = "mend this place, or save the rows as JSON lines, one object a line"
    return UserError(Mistake(what, fix, where=f"{path}:{line}"))


def _after_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in _SPACE:
        place += 1
    return place

"""Sources: every kind read back, and every way of getting one wrong said clearly."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainwright.data.sources import check_source, read_documents, source_names
from trainwright.errors import UserError
from trainwright.recipe.schema import Source

TEXTS = ["first\n", "zweiter, größer\r\n", "第三 🙂"]


def documents(source: Source) -> list[tuple[str, str]]:
    return [(document.id, document.text) for document in read_documents(source)]


def mistake(source: Source) -> str:
    """What reading the source to its end says."""
    with pytest.raises(UserError) as caught:
        list(read_documents(source))
    return str(caught.value)


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def test_text_files_folders_and_globs(tmp_path):
    for name, text in zip(["b/2.txt", "a.md", "b/c/3.txt"], TEXTS, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("not read")
    everything = [("a.md", TEXTS[1]), ("b/2.txt", TEXTS[0]), ("b/c/3.txt", TEXTS[2])]
    assert documents(Source(path=str(tmp_path))) == everything
    assert documents(Source(path=f"{tmp_path}/**/*")) == everything
    assert documents(Source(path=f"{tmp_path}/b/**/*.txt")) == [
        ("2.txt", TEXTS[0]),
        ("c/3.txt", TEXTS[2]),
    ]
    assert documents(Source(path=str(tmp_path / "a.md"))) == [("a.md", TEXTS[1])]
    assert documents(Source(path=str(tmp_path), limit=2)) == everything[:2]
    for path in (tmp_path, f"{tmp_path}/**/*", tmp_path / "a.md"):
        assert check_source(Source(path=str(path)), "data.sources.0") == []


def test_folder_of_another_kind_with_a_read_me(tmp_path):
    write_jsonl(tmp_path / "part.jsonl", [{"text": "x"}])
    (tmp_path / "README.md").write_text("about it")
    assert documents(Source(path=str(tmp_path))) == [("part.jsonl:1", "x")]
    assert documents(Source(path=str(tmp_path), kind="text")) == [("README.md", "about it")]


def test_empty_documents_are_dropped_and_told(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ["a", "", " \n\t", "b", "c"]])
    empty = []
    found = list(read_documents(Source(path=str(path), limit=2), on_empty=empty.append))
    assert [d.id for d in found] == ["a.jsonl:1", "a.jsonl:4"]
    assert [d.id for d in empty] == ["a.jsonl:2", "a.jsonl:3"]


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("ending", "pack"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", zstd),
    ],
)
def test_packed_jsonl(tmp_path, ending, pack):
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    path = tmp_path / f"d.jsonl{ending}"
    path.write_bytes(pack(("\ufeff" + lines + "\n\n").encode()))
    source = Source(path=str(path), field="body")
    assert check_source(source) == []
    assert documents(source) == [(f"{path.name}:{i + 1}", t) for i, t in enumerate(TEXTS)]


def test_parquet_and_arrow(tmp_path):
    texts = [f"text {i}" for i in range(700)]
    table = pa.table({"n": list(range(700)), "text": texts})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    with (
        pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=300)
    with (
        pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=300)
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        source = Source(path=str(tmp_path / name))
        assert check_source(source) == []
        assert documents(source) == [(f"{name}:{i}", text) for i, text in enumerate(texts)]


def test_columns_of_other_types(tmp_path):
    large = pa.array(["a", None, "c"], pa.large_string())
    coded = pa.array(["x", "y", "x"]).dictionary_encode()
    table = pa.table({"large": large, "coded": coded, "number": [1, 2, 3]})
    pq.write_table(table, tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    assert [text for _, text in documents(Source(path=path, field="large"))] == ["a", "c"]
    assert [text for _, text in documents(Source(path=path, field="coded"))] == ["x", "y", "x"]
    assert "column `number` holds int64, not text" in mistake(Source(path=path, field="number"))
    assert "no column `text`; it has `large`, `coded`" in mistake(Source(path=path))
    assert check_source(Source(path=path), "data.sources.2")[0].key == "data.sources.2"


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": TEXTS})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=one.select([2])).save_to_disk(tmp_path / "two")
    assert [text for _, text in documents(Source(path=str(tmp_path / "one")))] == TEXTS
    test = Source(path=str(tmp_path / "two"), split="test")
    assert documents(test) == [("two:0", TEXTS[2])]
    assert "no split `dev`" in mistake(Source(path=str(tmp_path / "two"), split="dev"))
    (tmp_path / "one" / "state.json").write_text("{}")
    assert "cannot be loaded" in mistake(Source(path=str(tmp_path / "one")))


def test_hub_dataset_offline():
    text = mistake(Source(path="nobody/nothing-here"))
    assert "nobody/nothing-here" in text and "network" in text


def test_standard_library():
    source = Source(kind="python-stdlib")
    found = documents(source)
    names = [name for name, _ in found]
    assert check_source(source) == []
    assert 300 < len(found) < 2000 and names == sorted(names)
    assert "json/decoder.py" in names and "argparse.py" in names
    assert not any(set(name.split("/")) & {"test", "tests", "site-packages"} for name in names)
    assert dict(found)["json/__init__.py"] == Path(json.__file__).read_bytes().decode()


LINES = 4711


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "broken', "is not valid JSON: Unterminated string starting at (column 10)"),
        ('{"txt": "x"}', "has no key `text`; it has `txt`"),
        ('{"text": 5}', "`text` is a number, not text"),
        ('{"text": null}', "`text` is null, not text"),
        ('["x"]', "is a list, not an object"),
        ('{"text": "\\ud800"}', "holds half a surrogate pair"),
        ("[" * 100_000, "is nested too deep"),
        (b'{"text": "\xff"}', "is not UTF-8 text: byte 0xff in column 11"),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_bad_line_4711_is_named(tmp_path, line, said, ending):
    good = b'{"text": "fine"}\n'
    bad = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / f"file.jsonl{ending}"
    content = good * (LINES - 1) + bad + b"\n" + good
    path.write_bytes(gzip.compress(content, 1) if ending else content)
    text = mistake(Source(path=str(path)))
    assert f"{path}:4711: {said}" in text and "fix: " in text


def test_first_line_is_checked_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"txt": 1}\n')
    [found] = check_source(Source(path=str(tmp_path / "a.jsonl")), "data.sources.3")
    assert found.where == f"{tmp_path}/a.jsonl:1" and found.key == "data.sources.3"
    (tmp_path / "b.json").write_text('[{"text": "x"}]')
    assert "one JSON array" in str(check_source(Source(path=str(tmp_path / "b.json")))[0])
    (tmp_path / "c.json").write_text('[\n  {"text": "x"}\n]')
    assert "one JSON array" in str(check_source(Source(path=str(tmp_path / "c.json")))[0])


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    assert "did you mean" in mistake(Source(path=str(tmp_path / "corpsu.txt")))
    assert "no folder" in mistake(Source(path=str(tmp_path / "no" / "corpus.txt")))
    assert "no file matches" in mistake(Source(path=f"{tmp_path}/*.jsonl"))
    (tmp_path / "nothing").mkdir()
    assert "holds no files" in mistake(Source(path=str(tmp_path / "nothing")))
    [found] = check_source(Source(path=str(tmp_path / "corpsu.txt")), "data.sources.1")
    assert found.key == "data.sources.1.path" and "corpus.txt" in found.fix


def test_endings_that_say_nothing(tmp_path):
    (tmp_path / "a.jsnol").write_text('{"text": "x"}')
    text = mistake(Source(path=str(tmp_path / "a.jsnol")))
    assert "nearest ending is `.jsonl`" in text and "kind: jsonl" in text
    assert documents(Source(path=str(tmp_path / "a.jsnol"), kind="jsonl")) == [("a.jsnol:1", "x")]
    (tmp_path / "b.txt").write_text("x")
    (tmp_path / "c.parquet").write_bytes(b"x")
    text = mistake(Source(path=str(tmp_path)))
    assert "1 parquet, 1 text" in text and "kind" in text


def test_files_that_are_not_what_they_seem(tmp_path):
    cases = {
        "empty.txt": (b"", "is empty"),
        "binary.txt": (b"abc\0def", "zero byte at offset 3"),
        "latin.txt": ("Zeile\nStraße".encode("latin-1"), "not UTF-8 text: byte 0xdf"),
        "utf16.txt": ("text".encode("utf-16"), "is UTF-16"),
        "broken.jsonl.gz": (b"\x1f\x8b\x08\x00garbage", "cannot be read"),
        "plain.jsonl.gz": (b"{}", "cannot be read: Not a gzipped file"),
        "broken.parquet": (b"PAR1 no", "cannot be read"),
        "broken.arrow": (b"ARROW1 no", "cannot be read"),
        "broken.txt.zst": (b"no zstd", "cannot be read"),
    }
    for name, (content, said) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        found = check_source(Source(path=str(path)), "data.sources.0")
        assert len(found) == 1 and said in str(found[0]), name
        assert str(path) in str(found[0]) and found[0].fix, name
        if name == "latin.txt":
            assert found[0].where == f"{path}:2"
        if content:
            assert said in mistake(Source(path=str(path))), name


def test_cut_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n' * 10_000)[:-20])
    assert f"{path}: cannot be read" in mistake(Source(path=str(path)))


def test_a_character_cut_by_the_quick_check_is_no_mistake(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 100_000)
    assert check_source(Source(path=str(tmp_path / "a.txt"))) == []


def test_names():
    paths = ["/x/books.jsonl.gz", "/y/books.jsonl", "/texts/*.txt", "org/name", "/a/b", "c.parquet"]
    sources = [Source(path=path) for path in paths] + [Source(kind="python-stdlib")]
    assert source_names(sources) == [
        *("books", "books-2", "texts", "name", "b", "c", "python-stdlib"),
    ]


@pytest.mark.shared
def test_real_files(shared):
    text = shared / "text"
    [(name, play)] = documents(Source(path=str(text / "tinyshakespeare.txt")))
    assert name == "tinyshakespeare.txt" and len(play.encode()) == 1_115_394
    assert len(documents(Source(path=str(text / "lf_c4_demo.jsonl")))) == 300
    books = documents(Source(path=str(text / "classic_books_pd.jsonl.gz")))
    assert len(books) == 45 and sum(len(book) for _, book in books) == 29_340_104
    peps = Source(path=str(text / "python_peps_cc0.jsonl.gz"), limit=7)
    assert len(documents(peps)) == 7
    weights = shared / "weights" / "digit_llama" / "model.safetensors"
    assert "zero byte" in mistake(Source(path=str(weights), kind="text"))

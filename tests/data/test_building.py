"""Building caches for real: once, by several processes, killed in the middle, damaged after."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.made import TEXTS, hashes, made_recipe, said, texts_of, unshuffled, write_texts
from trainwright.data import token_cache
from trainwright.data.folders import cache_folder
from trainwright.data.prepare import prepare_data

REPOSITORY = Path(__file__).parents[2]


def test_second_time_nothing_is_tokenised(tmp_path, shared_cache):
    write_texts(tmp_path)
    recipe = made_recipe(tmp_path, data={"cache": str(shared_cache)})
    words: list[str] = []
    first = prepare_data(recipe, progress=words.append)
    again = prepare_data(recipe, progress=words.append)
    assert hashes(first.train) == hashes(again.train)
    for file in (tmp_path / "texts").iterdir():
        os.utime(file)  # a new date, the same contents
    prepare_data(recipe, progress=words.append)
    assert words == []  # `shared_cache` was made from the same texts
    (tmp_path / "texts" / "003.txt").write_text("y")  # as long as before
    changed = prepare_data(recipe, progress=words.append)
    assert words == ["tokenising texts"]
    assert hashes(changed.train) != hashes(first.train)


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "manifest", "no manifest"])
def test_a_damaged_cache_is_built_anew(tmp_path, shared_cache, damage):
    write_texts(tmp_path, [f"{damage} {text}" for text in TEXTS])
    recipe = made_recipe(tmp_path, data={"cache": str(shared_cache)})
    before = prepare_data(recipe)
    expected = hashes(before.train)
    folder = before.train.streams[0].corpus._caches[0].directory
    tokens, manifest = folder / "tokens.bin", folder / "manifest.json"
    if damage == "flip":
        content = bytearray(tokens.read_bytes())
        content[100] ^= 1
        tokens.write_bytes(content)
    elif damage == "cut":
        os.truncate(tokens, tokens.stat().st_size - 2)
    elif damage == "delete":
        (folder / "offsets.bin").unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"<u2"', '"<u4"'))
    else:
        manifest.unlink()
    words: list[str] = []
    assert hashes(prepare_data(recipe, progress=words.append).train) == expected
    assert words == ["tokenising texts"]


def test_a_full_disk(tmp_path, shared_cache, monkeypatch):
    write_texts(tmp_path, ["full", "disk"])
    recipe = made_recipe(tmp_path, data={"cache": str(shared_cache)})

    def no_room(self, values):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(token_cache._Column, "write", no_room)
        text = said(recipe)
    assert "data.cache: the disk is full" in text and "another disk" in text
    assert not list((shared_cache / "tokens").glob(".*.tmp"))
    prepare_data(recipe)


def test_a_cache_that_is_a_file(tmp_path):
    write_texts(tmp_path)
    text = said(made_recipe(tmp_path, data={"cache": str(tmp_path / "texts" / "000.txt")}))
    assert "data.cache: the data cache cannot be in" in text and "000.txt, which is a file" in text


def test_where_the_cache_is(monkeypatch):
    for name in ("TRAINWRIGHT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder(None) == Path.home() / ".cache" / "trainwright"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder(None) == Path("/xdg/trainwright")
    monkeypatch.setenv("TRAINWRIGHT_CACHE", "/own")
    assert cache_folder(None) == Path("/own")
    assert cache_folder(Path("~/mine")) == Path.home() / "mine"


CHILD = """
import os, sys
sys.path.insert(0, {repository!r})
from pathlib import Path
from tests.data.made import made_recipe
from trainwright.data import folders, token_cache
from trainwright.data.prepare import prepare_data

token_cache._BATCH_DOCUMENTS = 10
calls = 0

def pause(*arguments):
    global calls
    calls += 1
    if calls == {at}:
        print("ready", flush=True)
        sys.stdin.read()

{hook}
data = {{"cache": {cache!r}}}
words = []
prepared = prepare_data(made_recipe(Path({folder!r}), data=data), progress=words.append)
print(words, flush=True)
print(prepared.train.batch(3).row_hashes(), flush=True)
"""


def start_child(folder: Path, cache: Path, hook: str = "", at: int = -1) -> subprocess.Popen:
    script = CHILD.format(
        repository=str(REPOSITORY), folder=str(folder), cache=str(cache), hook=hook, at=at
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


WHILE_WRITING = """
write = token_cache._Column.write
token_cache._Column.write = lambda self, values: (write(self, values), pause())[0]
"""
BEFORE_RENAMING = """
rename = Path.rename
Path.rename = lambda self, target: (pause(), rename(self, target))[1]
"""


@pytest.mark.parametrize(
    ("hook", "at"), [(WHILE_WRITING, 60), (BEFORE_RENAMING, 1)], ids=["writing", "renaming"]
)
def test_killed_while_building(tmp_path, shared_cache, hook, at):
    texts = [f"{hook[:5]}{at} text {i}" for i in range(100)]
    write_texts(tmp_path, texts)
    child = start_child(tmp_path, shared_cache, hook, at)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    left = list((shared_cache / "tokens").glob(".*.tmp"))
    assert len(left) == 1 and any(left[0].iterdir())  # it was killed in the middle
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    prepared = prepare_data(made_recipe(tmp_path, data=unshuffled(shared_cache)))
    found = {**texts_of(prepared.train), **texts_of(prepared.validation["validation"])}
    assert sorted(found.values()) == sorted(texts)
    assert not list((shared_cache / "tokens").glob(".*.tmp"))


def test_two_processes_build_one_cache(tmp_path, shared_cache):
    write_texts(tmp_path, [f"for two processes, text {i}" for i in range(100)])
    # The first stops in the middle of writing until the second is known to wait for it.
    first = start_child(tmp_path, shared_cache, WHILE_WRITING, 60)
    assert first.stdout is not None and first.stdout.readline() == "ready\n"
    waits = """
from trainwright.data import build
say = lambda words: print(words, flush=True)
build_tokens = build.build_tokens
import trainwright.data.prepare as prepare
prepare.build_tokens = lambda source, tokenizer, root, _: build_tokens(source, tokenizer, root, say)
"""
    second = start_child(tmp_path, shared_cache, waits)
    assert second.stdout is not None
    assert second.stdout.readline() == "waiting for another process that tokenises texts\n"
    outputs = [child.communicate(timeout=60)[0].splitlines() for child in (first, second)]
    # A slow machine hears of the progress too.
    assert outputs[0][0].startswith("['tokenising texts'") and outputs[1][0] == "[]"
    assert outputs[0][1] == outputs[1][1]
    third = prepare_data(made_recipe(tmp_path, data={"cache": str(shared_cache)}))
    assert str(third.train.batch(3).row_hashes()) == outputs[0][1]

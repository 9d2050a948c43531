"""From recipes to batches: what is trained on, what is held out, and what workers open."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.data.made import TEXTS, hashes, made_recipe, said, texts_of, unshuffled, write_texts
from trainwright.data.batches import IGNORED
from trainwright.data.digests import text_hash
from trainwright.data.prepare import open_data, prepare_data, prepare_held_out
from trainwright.data.tokenizers import load_tokenizer
from trainwright.errors import UserError
from trainwright.recipe.schema import Source


@pytest.mark.parametrize("packing", ["concat", "none"])
def test_documents_come_through_whole(tmp_path, shared_cache, packing):
    write_texts(tmp_path, [*TEXTS, "", " \n"])
    data = {**unshuffled(shared_cache), "packing": packing}
    prepared = prepare_data(made_recipe(tmp_path, data=data))
    found = {**texts_of(prepared.train), **texts_of(prepared.validation["validation"])}
    assert found == {f"{i:03}.txt": text for i, text in enumerate(TEXTS)}
    train, validation = prepared.summary
    assert (train.split, validation.split, train.dropped) == ("train", "validation", 2)
    assert train.documents + validation.documents == len(TEXTS)
    assert train.text_bytes + validation.text_bytes == sum(len(t.encode()) for t in TEXTS)
    # One token a byte, BOS and EOS.
    assert train.tokens == train.text_bytes + 2 * train.documents
    held_out = prepared.validation["validation"]
    assert held_out.text_bytes == held_out.target_bytes == validation.text_bytes
    assert held_out.targets == sum(
        held_out.batch(step).weight for step in range(held_out.epoch_steps())
    )


def test_split_follows_each_document_alone(tmp_path, shared_cache):
    texts = [f"document number {i} of many" for i in range(300)]
    write_texts(tmp_path, texts)
    recipe = made_recipe(tmp_path, data={**unshuffled(shared_cache), "validation": 0.2})
    before = set(texts_of(prepare_data(recipe).validation["validation"]).values())
    assert 35 < len(before) < 90
    # Others come, go and are renamed; every text stays on its side.
    folder = tmp_path / "texts"
    for number in range(0, 300, 3):
        (folder / f"{number:03}.txt").unlink()
    (folder / "zzz.txt").write_text("something new")
    (folder / "007.txt").rename(folder / "moved.txt")
    prepared = prepare_data(recipe)
    after = set(texts_of(prepared.validation["validation"]).values())
    remaining = {text for i, text in enumerate(texts) if i % 3}
    assert after & remaining == before & remaining
    assert not after & set(texts_of(prepared.train).values())


def test_equal_texts_fall_on_the_same_side(tmp_path, shared_cache):
    write_texts(tmp_path, [f"text {i % 10}" for i in range(200)])
    recipe = made_recipe(tmp_path, data={**unshuffled(shared_cache), "validation": 0.5})
    prepared = prepare_data(recipe)
    sides = [
        set(texts_of(batches).values())
        for batches in (prepared.train, prepared.validation["validation"])
    ]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 10


@pytest.mark.parametrize("share", [1e-9, 0.999999])
def test_each_side_gets_a_document(tmp_path, shared_cache, share):
    write_texts(tmp_path)
    recipe = made_recipe(tmp_path, data={"cache": str(shared_cache), "validation": share})
    prepared = prepare_data(recipe)
    counts = prepared.train.documents, prepared.validation["validation"].documents
    assert min(counts) == 1 and sum(counts) == len(TEXTS)


def test_one_document_cannot_be_held_out(tmp_path, shared_cache):
    write_texts(tmp_path, ["alone"])
    recipe = made_recipe(tmp_path, data={"cache": str(shared_cache)})
    assert "data.validation: there is only one document" in said(recipe)
    without = made_recipe(tmp_path, data={"cache": str(shared_cache), "validation": 0})
    assert prepare_data(without).validation == {}


def test_validation_sources_of_their_own(tmp_path, shared_cache):
    write_texts(tmp_path)
    (tmp_path / "a.txt").write_text("held out")
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": TEXTS[0]}) + "\n" + json.dumps({"text": "new"})
    )
    own = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    prepared = prepare_data(
        made_recipe(tmp_path, data={"cache": str(shared_cache), "validation": own})
    )
    assert list(prepared.validation) == ["a", "b"]
    assert texts_of(prepared.validation["b"]) == {"b.jsonl:1": TEXTS[0], "b.jsonl:2": "new"}
    assert prepared.train.documents == len(TEXTS)
    assert [each.also_trained for each in prepared.summary] == [0, 0, 1]


def test_several_sources_and_weights(tmp_path, shared_cache):
    write_texts(tmp_path)
    (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "line {i}"}}\n' for i in range(50)))
    paths = [{"path": str(tmp_path / "texts")}, {"path": str(tmp_path / "b.jsonl")}]
    data = {"cache": str(shared_cache), "sources": paths}
    together = prepare_data(made_recipe(tmp_path, data=data))
    names = {name for row in together.train.read(range(60)).documents for name in row}
    assert any(name.startswith("texts/") for name in names)
    assert any(name.startswith("b/b.jsonl:") for name in names)

    weighted = [{**path, "weight": weight} for path, weight in zip(paths, (1, 3), strict=True)]
    prepared = prepare_data(made_recipe(tmp_path, data={**data, "sources": weighted}))
    batch = prepared.train.read(range(2000))
    tokens = {True: 0, False: 0}
    for row, names_of_row in enumerate(batch.documents):
        of_lines = names_of_row[0].startswith("b.jsonl")
        tokens[of_lines] += int((batch.input_ids[row] != prepared.pad_id).sum())
    assert tokens[True] / sum(tokens.values()) == pytest.approx(0.75, abs=0.01)


def test_a_weighted_source_must_keep_a_document(tmp_path, shared_cache):
    texts = sorted(TEXTS, key=text_hash)
    (tmp_path / "first.txt").write_bytes(texts[0].encode())  # the one that is held out
    (tmp_path / "last.txt").write_bytes(texts[-1].encode())
    sources = [{"path": str(tmp_path / f"{n}.txt"), "weight": 1} for n in ("first", "last")]
    data = {"cache": str(shared_cache), "sources": sources, "validation": 0.01}
    text = said(made_recipe(tmp_path, data=data))
    assert "data.sources.0: all documents of first are held out" in text


def test_everything_wrong_is_said_at_once(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.jsonl").write_text("{]\n")
    sources = [str(tmp_path / name) for name in ("empty.txt", "bad.jsonl", "gone.txt")]
    recipe = made_recipe(
        tmp_path, data={"sources": sources, "validation": [str(tmp_path / "nothing.jsonl")]}
    )
    with pytest.raises(UserError) as caught:
        prepare_data(recipe)
    keys = [mistake.key for mistake in caught.value.mistakes]
    assert keys == [
        *("data.sources.0", "data.sources.1", "data.sources.2.path", "data.validation.0.path"),
    ]


def test_a_source_of_blank_documents(tmp_path, shared_cache):
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n{"text": ""}\n')
    data = {"cache": str(shared_cache), "sources": [str(tmp_path / "a.jsonl")]}
    assert "data.sources.0: a holds no text" in said(made_recipe(tmp_path, data=data))
    trained = {"tokenizer": {"train": {"vocab_size": 300}}, "data": data}
    assert "data.sources.0: a holds no text" in said(made_recipe(tmp_path, **trained))


def test_a_vocabulary_too_small_for_the_tokenizer(tmp_path, shared_cache):
    write_texts(tmp_path)
    model = {"family": "llama", "preset": "4m", "config": {"vocab_size": 258}}
    text = said(made_recipe(tmp_path, model=model, data={"cache": str(shared_cache)}))
    assert "model.config.vocab_size: the tokenizer has 259 tokens" in text and "258" in text
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 200}')
    pretrained = {"path": str(tmp_path / "model")}
    text = said(made_recipe(tmp_path, model=pretrained, data={"cache": str(shared_cache)}))
    assert "tokenizer: the tokenizer has 259 tokens" in text and "model's own" in text


def test_tokenizer_is_trained_on_training_documents_only(tmp_path):
    texts = [f"{TEXTS[4]} plain text number {i}" for i in range(40)]
    threshold = int(0.3 * 2.0**64)
    texts = [
        text + " qqzzxx" * 50 if text_hash(text + " qqzzxx" * 50) < threshold else text
        for text in texts
    ]
    assert sum("qqzzxx" in text for text in texts) > 5
    # Those left plain may be held out as well; what matters is where the odd word went.
    write_texts(tmp_path, texts)
    recipe = made_recipe(
        tmp_path, tokenizer={"train": {"vocab_size": 400}}, data={"validation": 0.3}
    )
    prepared = prepare_data(recipe)
    vocabulary = prepared.tokenizer.get_vocab()
    assert "Ġquick" in vocabulary
    assert not any("qq" in token or "zz" in token for token in vocabulary)
    assert prepared.vocabulary == len(prepared.tokenizer) <= 400
    # Again, the tokenizer comes from the cache.
    words: list[str] = []
    assert prepare_data(recipe, progress=words.append).tokenizer_directory == (
        prepared.tokenizer_directory
    )
    assert words == []


def test_workers_open_what_was_prepared(tmp_path, shared_cache):
    write_texts(tmp_path)
    recipe = made_recipe(tmp_path, data={"cache": str(shared_cache)})
    run = tmp_path / "run"
    prepared = prepare_data(recipe, directory=run)
    opened = open_data(run)
    assert hashes(opened.train) == hashes(prepared.train)
    assert (
        hashes(opened.validation["validation"])[:3] == hashes(prepared.validation["validation"])[:3]
    )
    assert opened.summary == prepared.summary and opened.vocabulary == 259
    assert opened.tokenizer("ab").input_ids == [256, 97, 98]
    assert sorted(file.name for file in (run / "tokenizer").iterdir()) == [
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    assert load_tokenizer(run / "tokenizer").pad_token_id == prepared.pad_id
    script = f"""
import sys
from pathlib import Path
from trainwright.data.prepare import open_data
batch = open_data(Path({str(run)!r})).train.batch(5)
assert not {{"torch", "transformers", "datasets", "pyarrow"}} & set(sys.modules)
print(batch.row_hashes())
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(prepared.train.batch(5).row_hashes())


def test_a_run_keeps_the_data_that_it_began_with(tmp_path, shared_cache):
    write_texts(tmp_path)
    recipe = made_recipe(tmp_path, data={"cache": str(shared_cache)})
    prepare_data(recipe, directory=tmp_path / "run")
    prepare_data(recipe, directory=tmp_path / "run")
    (tmp_path / "texts" / "000.txt").write_text("other words")
    assert "differs from what the run" in said(recipe, directory=tmp_path / "run")


def test_opening_what_is_gone(tmp_path, shared_cache):
    with pytest.raises(UserError, match="cannot be read"):
        open_data(tmp_path)
    write_texts(tmp_path, ["soon", "gone"])
    prepared = prepare_data(
        made_recipe(tmp_path, data={"cache": str(shared_cache)}), directory=tmp_path / "run"
    )
    (prepared.train.streams[0].corpus._caches[0].directory / "tokens.bin").unlink()
    with pytest.raises(UserError, match="gone or damaged"):
        open_data(tmp_path / "run")


def test_without_bos_the_first_token_counts_for_nothing(tmp_path):
    from tests.data.test_tokenizers import made_tokenizer

    tokenizer = made_tokenizer(["<e>", "<p>"], eos_token="<e>", pad_token="<p>")
    tokenizer.save_pretrained(tmp_path / "ab")
    write_texts(tmp_path, ["abba", "ba", "aaaaa"])
    recipe = made_recipe(tmp_path, tokenizer=str(tmp_path / "ab"), data={"validation": 0})
    train = prepare_data(recipe).train
    assert (train.text_bytes, train.target_bytes, train.targets) == (11, 8, 11)


def test_scoring_a_finished_model(tmp_path, shared_cache):
    write_texts(tmp_path)
    prepared = prepare_data(
        made_recipe(tmp_path, data={"cache": str(shared_cache)}), directory=tmp_path / "run"
    )
    sources = [Source(path=str(tmp_path / "texts")), Source(path=str(tmp_path / "texts/001.txt"))]
    scored = prepare_held_out(
        sources, tmp_path / "run" / "tokenizer", sequence_length=16, cache=shared_cache
    )
    assert list(scored) == ["texts", "001"]
    assert list(texts_of(scored["texts"]).values()) == TEXTS
    assert texts_of(scored["001"]) == {"001.txt": TEXTS[1]}
    assert scored["texts"].sequence_length == 16 and prepared.train.sequence_length == 32
    labels = scored["texts"].read(range(scored["texts"].rows)).labels
    assert int(np.count_nonzero(labels != IGNORED)) == scored["texts"].targets


@pytest.mark.shared
def test_real_files(tmp_path, shared):
    text = shared / "text"
    recipe = made_recipe(
        tmp_path,
        tokenizer={"train": {"vocab_size": 1000, "bytes": 300_000}},
        data={
            "sources": [str(text / "lf_c4_demo.jsonl"), str(text / "tinyshakespeare.txt")],
            "validation": [{"path": str(text / "classic_books_pd.jsonl.gz"), "limit": 1}],
            "packing": "best-fit",
            "sequence_length": 512,
        },
    )
    prepared = prepare_data(recipe)
    c4, play, books = prepared.summary
    assert (c4.documents, c4.dropped, play.documents, books.documents) == (300, 0, 1, 1)
    assert play.text_bytes == 1_115_394
    assert 2 < play.bytes_per_token < 4
    assert prepared.train.packing_figures().filled > 0.99
    decode = prepared.tokenizer.decode
    row = prepared.validation["classic_books_pd"].batch(0)
    assert decode(row.input_ids[0]).startswith("<s>")
    batch = prepared.train.read(range(prepared.train.rows_per_epoch))
    assert batch.weight == prepared.train.targets

"""Tokenizers: exact round trips, the same ids after reloading, determinism, padding, pieces."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.data.made import TEXTS
from trainwright.data import encode
from trainwright.data.encode import Encoder
from trainwright.data.tokenizers import (
    build_tokenizer,
    byte_tokenizer,
    embedding_rows,
    load_tokenizer,
    reserve_padding,
    save_tokenizer,
    spread_evenly,
    train_tokenizer,
)
from trainwright.errors import UserError
from trainwright.recipe.schema import TokenizerSection, TrainTokenizer

NASTY = [
    "",
    " ",
    "\n\n \t\r\n",
    "<s></s><pad> <|endoftext|>",
    "a\u0301 e\u0308 ﬁ",  # not normalised: combining accents and a ligature
    "\x00\x01\x7f\u0080\u200b\ufeff\ufffd",
    "🏳️‍🌈👩‍👩‍👧 नमस्ते العربية",
    " , . ' don 't  we'll !?",
    "x" * 3000,
]


def random_texts(count: int) -> list[str]:
    choose = random.Random(5)
    planes = [(0x20, 0x7F), (0, 0xFF), (0x100, 0xD7FF), (0xE000, 0x10FFFF)]
    return [
        "".join(chr(choose.randint(*choose.choice(planes))) for _ in range(choose.randint(1, 60)))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS * 3, TrainTokenizer(vocab_size=370))


@pytest.fixture(params=["bytes", "trained"])
def ours(request, trained) -> PreTrainedTokenizerFast:
    return byte_tokenizer() if request.param == "bytes" else trained


def test_round_trip_is_exact(ours):
    for text in NASTY + TEXTS + random_texts(200):
        ids = ours(text).input_ids
        assert ids[0] == ours.bos_token_id
        assert ours.decode(ids, skip_special_tokens=True) == text
        # No text becomes a control token.
        assert not set(ids[1:]) & set(ours.all_special_ids)


def test_special_tokens_differ(ours):
    special = {ours.bos_token_id, ours.eos_token_id, ours.pad_token_id}
    assert len(special) == 3 and None not in special
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "</s>", "<pad>")


@pytest.mark.parametrize("family", [None, "llama", "qwen2", "qwen3", "gemma2", "phi3", "mistral"])
def test_reloaded_beside_any_model_it_gives_the_same_ids(ours, family, tmp_path):
    save_tokenizer(ours, tmp_path)
    if family is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    again = AutoTokenizer.from_pretrained(tmp_path)
    # transformers' own Qwen 2 class normalises text: there, only what is normal already agrees.
    texts = TEXTS if family == "qwen2" else NASTY + TEXTS + random_texts(50)
    assert len(again) == len(ours) and again.pad_token_id == ours.pad_token_id
    assert [again(text).input_ids for text in texts] == [ours(text).input_ids for text in texts]


def test_bytes_are_bytes():
    tokenizer = byte_tokenizer()
    text = "aé世🙂\0"
    assert tokenizer(text).input_ids == [256, *text.encode()]
    assert len(tokenizer) == 259


def test_training_learns_and_keeps_to_its_size(trained):
    assert len(trained) == 370
    assert len(trained("The quick brown fox").input_ids) < 8
    small = train_tokenizer(["ab"], TrainTokenizer(vocab_size=4096))
    assert len(small) == 3 + 256 + 1  # there is nothing more to merge


def test_training_is_the_same_in_another_process(tmp_path, trained):
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.data.made import TEXTS
from trainwright.data.tokenizers import train_tokenizer
from trainwright.recipe.schema import TrainTokenizer
train_tokenizer(TEXTS * 3, TrainTokenizer(vocab_size=370)).save_pretrained({str(tmp_path)!r})
"""
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "77", "RAYON_NUM_THREADS": "3"},
    )
    other = json.loads((tmp_path / "tokenizer.json").read_text())
    assert other == json.loads(trained._tokenizer.to_str())


@pytest.mark.parametrize("share", [0.03, 0.2, 0.77])
def test_excerpts_are_spread_evenly(share):
    texts = ["".join(chr(0x100 + i) for _ in range(100_000)) for i in range(5)] + ["z" * 10] * 50
    taken = "".join(spread_evenly(texts, share))
    total = sum(map(len, texts))
    assert share * total - 8192 < len(taken) <= share * total
    for i in range(5):
        assert taken.count(chr(0x100 + i)) == pytest.approx(share * 100_000, abs=4200)
    assert list(spread_evenly(texts, 1.0)) == texts


def made_tokenizer(special: list[str], **named: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<unk>": 2}, merges=[]))
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


@pytest.mark.parametrize(
    ("special", "named", "vocabulary", "expected"),
    [
        (["<e>", "<p>"], {"eos_token": "<e>", "pad_token": "<p>"}, None, "<p>"),
        (["<e>", "<|fim_pad|>"], {"eos_token": "<e>", "pad_token": "<e>"}, None, "<|fim_pad|>"),
        (["<e>", "<x>", "<|reserved_7|>"], {"eos_token": "<e>"}, None, "<|reserved_7|>"),
        (["<e>", "<x>", "<unk>"], {"eos_token": "<e>", "unk_token": "<unk>"}, None, "<unk>"),
        (["<e>", "<x>"], {"eos_token": "<e>"}, None, "<pad>"),
        (["<e>", "<x>"], {"eos_token": "<e>"}, 6, "<pad>"),
        (["<e>", "<x>"], {"eos_token": "<e>"}, 5, "<x>"),
        (["<e>", "<x>", "<b>"], {"eos_token": "<e>", "bos_token": "<b>"}, 6, "<x>"),
    ],
)
def test_padding_is_never_eos(special, named, vocabulary, expected):
    tokenizer = made_tokenizer(special, **named)
    before = tokenizer("ab").input_ids
    reserve_padding(tokenizer, vocabulary)
    assert tokenizer.pad_token == expected
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert vocabulary is None or max(tokenizer.get_vocab().values()) < vocabulary
    assert tokenizer("ab").input_ids == before


def test_no_token_to_pad_with():
    tokenizer = made_tokenizer(["<e>"], eos_token="<e>", unk_token="<e>")
    with pytest.raises(UserError, match="no token to pad with"):
        reserve_padding(tokenizer, 4)


def test_where_there_is_no_tokenizer(tmp_path):
    def said(section, model_path=None) -> str:
        with pytest.raises(UserError) as caught:
            build_tokenizer(section, model_path, [], directory=tmp_path / "out")
        return str(caught.value)

    assert "a new model needs a tokenizer" in said(None)
    assert "from the hub" in said(TokenizerSection(path="nobody/nothing"))
    assert "no directory with a tokenizer" in said(None, "/no/such/folder")
    (tmp_path / "config.json").write_text("{}")
    assert "it holds config.json" in said(TokenizerSection(path=str(tmp_path)))
    no_eos = made_tokenizer(["<x>"])
    no_eos.save_pretrained(tmp_path / "no-eos")
    assert "no EOS token" in said(TokenizerSection(path=str(tmp_path / "no-eos")))


def test_code_beside_a_tokenizer_is_not_run(tmp_path, trained):
    trained.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    marker = tmp_path / "was-run"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(UserError):
        load_tokenizer(tmp_path)
    assert not marker.exists()


def test_encoder_wraps_documents(ours, tmp_path):
    save_tokenizer(ours, tmp_path)
    encoder = Encoder(tmp_path)
    assert encoder.vocabulary == len(ours) and encoder.dtype is np.uint16
    for text, ids in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        assert ids.dtype == np.uint16
        assert ids.tolist() == [*ours(text).input_ids, ours.eos_token_id]
        assert b"".join(map(encoder.token_bytes, ids.tolist())) == text.encode()


def test_encoder_ignores_a_saved_truncation(trained, tmp_path):
    save_tokenizer(trained, tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    [ids] = Encoder(tmp_path).encode([TEXTS[4]])
    assert ids.tolist() == [*trained(TEXTS[4]).input_ids, trained.eos_token_id]


def long_text() -> str:
    choose = random.Random(3)
    words = [
        "\n\n  ",
        "    ",
        "naïve",
        "世界🙂",
        "don't",
        "12345",
        "word ",
        "\r\n",
        "é",
        "(x)[0]=y;",
    ]
    return "".join(choose.choice(words) + choose.choice("abcdefgh \n") for _ in range(30_000))


def test_long_documents_are_encoded_in_pieces_exactly(ours, tmp_path, monkeypatch):
    save_tokenizer(ours, tmp_path)
    text = long_text()
    [whole] = Encoder(tmp_path).encode([text])
    monkeypatch.setattr(encode, "_PIECE", 5000)
    monkeypatch.setattr(encode, "_OVERLAP", 1000)
    pieces = []
    agree = encode._agreement
    monkeypatch.setattr(
        encode, "_agreement", lambda *pair: pieces.append(agree(*pair)) or pieces[-1]
    )
    for end in (len(text), 10_001, 10_999, 11_000, 11_001, 15_000, 16_000):
        [ids] = Encoder(tmp_path).encode([text[:end]])
        expected = [*ours(text[:end]).input_ids, ours.eos_token_id]
        assert ids.tolist() == expected
    assert whole.tolist()[:100] == ours(text).input_ids[:100]
    assert len(pieces) > 20 and None not in pieces


def test_runs_that_pieces_cut_differently(tmp_path, monkeypatch):
    """In a run of equal letters two pieces agree on tokens, but not on where they begin."""
    tokenizer = train_tokenizer(["a" * 64] * 9, TrainTokenizer(vocab_size=262))
    assert "aaaaaaaa" in tokenizer.get_vocab()
    save_tokenizer(tokenizer, tmp_path)
    monkeypatch.setattr(encode, "_PIECE", 5000)
    monkeypatch.setattr(encode, "_OVERLAP", 1000)
    text = "bcd" + "a" * 20_000
    [ids] = Encoder(tmp_path).encode([text])
    assert ids.tolist() == [*tokenizer(text).input_ids, tokenizer.eos_token_id]


def test_a_text_that_no_piece_agrees_on_is_encoded_whole(tmp_path, monkeypatch):
    backend = Tokenizer(models.WordLevel({"long": 0, "<e>": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<e>", pad_token="[UNK]"
    )
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(encode, "_PIECE", 5000)
    monkeypatch.setattr(encode, "_OVERLAP", 1000)
    [ids] = Encoder(tmp_path).encode(["x" * 40_000 + " long"])
    assert ids.tolist() == [2, 0, 1]


def test_embedding_rows(tmp_path):
    assert embedding_rows(tmp_path) is None
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 77}}')
    assert embedding_rows(tmp_path) == 77


@pytest.mark.shared
@pytest.mark.parametrize("place", ["tokenizers/smollm2", "weights/stories260K_hf"])
def test_real_tokenizers(shared, place, tmp_path, monkeypatch):
    tokenizer = build_tokenizer(
        TokenizerSection(path=str(shared / place)), None, [], directory=tmp_path
    )
    theirs = AutoTokenizer.from_pretrained(shared / place)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    monkeypatch.setattr(encode, "_PIECE", 1 << 15)
    play = (shared / "text" / "tinyshakespeare.txt").read_text()[:200_000]
    texts = [*TEXTS, play]
    for text, ids in zip(texts, Encoder(tmp_path).encode(texts), strict=True):
        expected = theirs(text).input_ids
        assert again(text).input_ids == expected
        assert ids.tolist() == [*expected, tokenizer.eos_token_id]

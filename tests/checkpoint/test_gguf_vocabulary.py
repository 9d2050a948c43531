"""Tokenizers in GGUF files: transformers makes the same ids from them, llama.cpp wrote the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from trainwright.checkpoint.gguf_export import write_gguf_files
from trainwright.checkpoint.gguf_vocabulary import vocabulary
from trainwright.checkpoint.storage import Entry
from trainwright.data.tokenizers import byte_tokenizer, load_tokenizer, train_tokenizer
from trainwright.errors import UserError
from trainwright.models.families import new_hf_config
from trainwright.recipe.schema import TrainTokenizer

TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "naïve 世界 🙂\tdon't  DON'T I'll",
    "def f(x):\n\n    return x\r\n",
    "  two  spaces   three\n\n\n",
    "\u00a0nbsp … — 𝔘𝔫𝔦",
    "a\tb\t\tc",
    " lead and trail ",
]
DIGITS = ["3.14159 1,000,000", "in 2024"]


def saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def file_of(tokenizer: Any, folder: Path, rows: int) -> Path:
    """A GGUF file of a model that is nothing but embeddings, with this tokenizer or directory."""
    import torch

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    hf = new_hf_config("llama", {**shape, "num_attention_heads": 1}, rows)
    name = "model.embed_tokens.weight"
    entry = Entry(name, torch.float32, (rows, 32), lambda: torch.zeros(rows, 32))
    words = tokenizer if isinstance(tokenizer, Path) else saved(tokenizer, folder / "words")
    write_gguf_files(folder, "v", ["f16"], [entry], hf_config=hf, tokenizer=words)
    return folder / "v-F16.gguf"


def contents(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields.values()
    return {
        field.name.removeprefix("tokenizer.").removeprefix("ggml."): field.contents()
        for field in fields
        if field.name.startswith("tokenizer.")
    }


def same_ids(tokenizer: Any, path: Path, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in texts:
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert theirs(text, add_special_tokens=False).input_ids == expected, text


def byte_level(pattern: str | None, **model: Any) -> Any:
    """A byte-level BPE with a few merges that cuts text at `pattern`, or at ByteLevel's own."""
    from transformers import PreTrainedTokenizerFast

    letters = pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: number for number, letter in enumerate(sorted(letters))}
    vocab |= {"th": 256, "the": 257, "<|end|>": 258, "Ġthe": 259}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, **model))
    cut = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cut, level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def test_one_token_a_byte(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    path = file_of(tokenizer, tmp_path, 300)
    same_ids(tokenizer, path, TEXTS + DIGITS)
    told = contents(path)
    assert told["merges"] == []
    assert told["tokens"][256:261] == ["<s>", "</s>", "<pad>", "[PAD259]", "[PAD260]"]
    assert told["token_type"] == [1] * 256 + [3] * 3 + [5] * 41
    ids = [told[f"{role}_token_id"] for role in ("bos", "eos", "padding")]
    assert ids == [256, 257, 258]
    assert (told["add_bos_token"], told["add_eos_token"]) == (True, False)


def test_one_trained_here(tmp_path: Path) -> None:
    corpus = [text * 3 for text in TEXTS + DIGITS]
    tokenizer = train_tokenizer(corpus, TrainTokenizer(vocab_size=400))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    path = file_of(tokenizer, tmp_path, len(tokenizer))
    same_ids(tokenizer, path, TEXTS + DIGITS)
    told = contents(path)
    assert told["pre"] == "qwen2" and len(told["merges"]) > 50
    assert told["chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize(
    "name, options",
    [
        ("gpt-2", {}),
        ("qwen2", {}),
        ("dbrx", {}),
        ("llama-bpe", {"ignore_merges": True}),
        ("tekken", {"ignore_merges": True}),
        ("gpt-4o", {}),
    ],
)
def test_cuts_by_name(name: str, options: Any, tmp_path: Path) -> None:
    """Patterns are known by the names that transformers' reader has for them."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    tokenizer = byte_level(GGUF_PRE_TOKENIZER_SPLITS.get(name), **options)
    path = file_of(tokenizer, tmp_path, 260)
    assert contents(path)["pre"] == name
    same_ids(tokenizer, path, [*TEXTS, *DIGITS, "the other <|end|> then"])


def test_single_digits_are_a_name_of_their_own(tmp_path: Path) -> None:
    tokenizer = byte_level(None)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    told, _ = vocabulary(saved(tokenizer, tmp_path), 260)
    assert told["tokenizer.ggml.pre"] == "smollm"


def spaced(vocab: list[str], merges: list[tuple[str, str]], **normal: Any) -> Any:
    """A SentencePiece BPE with bytes to fall back on; `vocab` and what merges make come after."""
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *vocab]
    backend = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


PIECES = ["▁", "t", "h", "e", "▁t", "he", "▁the", "th"]
MERGES = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("t", "h")]


def test_sentencepiece_has_scores_by_the_order_of_merges(tmp_path: Path) -> None:
    tokenizer = spaced(PIECES, MERGES)
    path = file_of(tokenizer, tmp_path, 3 + 256 + 8)
    told = contents(path)
    assert told["model"] == "llama" and told["add_space_prefix"] is True
    assert told["token_type"] == [2, 3, 3] + [6] * 256 + [1] * 8
    scores = dict(zip(told["tokens"], told["scores"], strict=True))
    assert [scores[t] for t in ("▁t", "he", "▁the", "th")] == [0, -1, -2, -3]
    assert scores["e"] < -3 and scores["<0x41>"] < -3
    same_ids(tokenizer, path, ["the", "the thet\n", "th  e"])


@pytest.mark.parametrize(
    "merges, reason",
    [
        (MERGES[:3], "'t' and 'h' are not merged into 'th'"),
        ([*MERGES, ("▁", "the"), ("▁th", "e")], "at two ranks"),
    ],
)
def test_merges_that_scores_cannot_say_are_refused(
    merges: Any, reason: str, tmp_path: Path
) -> None:
    vocab = [*PIECES, "the", "▁th"] if len(merges) > 4 else PIECES
    if len(merges) > 4:
        merges = [*merges[:3], ("▁t", "h"), *merges[3:5], ("th", "e"), ("t", "he"), merges[5]]
    with pytest.raises(UserError, match=reason):
        vocabulary(saved(spaced(vocab, merges), tmp_path), 400)


def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, "<unk>"))
    lower = byte_level(None)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    around = byte_tokenizer()
    from tokenizers.processors import TemplateProcessing

    around.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 258)]
    )
    apart = spaced(PIECES, MERGES)
    apart.backend_tokenizer.normalizer = None
    apart.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    cases = [
        (apart, 300, "words merged apart"),
        (PreTrainedTokenizerFast(tokenizer_object=words), 9, "type WordLevel"),
        (byte_level(r"\p{L}+|\d"), 300, r"how this tokenizer cuts text: \\p"),
        (lower, 300, "normalizer Lowercase"),
        (byte_level(None), 200, "tokens up to 259, the model 200 rows"),
        (around, 300, "'<pad>'"),
    ]
    for number, (tokenizer, rows, reason) in enumerate(cases):
        with pytest.raises(UserError, match=reason):
            vocabulary(saved(tokenizer, tmp_path / str(number)), rows)


@pytest.mark.shared
def test_real_tokenizers_keep_their_ids(shared: Path, tmp_path: Path) -> None:
    from transformers.integrations.gguf.reader import read_gguf_metadata

    stories = load_tokenizer(shared / "weights" / "stories260K_hf")
    (tmp_path / "stories").mkdir()
    path = file_of(stories, tmp_path / "stories", 512)
    # transformers' reader puts no ▁ before a text that begins with a space; llama.cpp does.
    same_ids(stories, path, [text for text in TEXTS + DIGITS if text[0] != " "])

    small = shared / "tokenizers" / "smollm2"
    (tmp_path / "small").mkdir()
    path = file_of(small, tmp_path / "small", 49_153)
    assert read_gguf_metadata(str(path))[0]["tokenizer.ggml.pre"] == "smollm"
    # transformers' class for it cuts no digits, in the file or out of it.
    same_ids(load_tokenizer(small), path, TEXTS)


@pytest.mark.shared
def test_gpt2s_is_what_llama_cpp_itself_wrote(shared: Path, tmp_path: Path) -> None:
    from transformers import GPT2TokenizerFast
    from transformers.integrations.gguf.reader import read_gguf_metadata

    folder = shared / "tokenizers"
    vocab = json.loads((folder / "gpt2" / "encoder.json").read_text())
    merges = (folder / "gpt2" / "vocab.bpe").read_text().splitlines()[1:]
    tokenizer = GPT2TokenizerFast(vocab=vocab, merges=[tuple(m.split(" ")) for m in merges])
    lists = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
    ours, _ = read_gguf_metadata(str(file_of(tokenizer, tmp_path, len(vocab))), lists)
    theirs, _ = read_gguf_metadata(str(folder / "gguf" / "ggml-vocab-gpt-2.gguf"), lists)
    for key in ("model", "pre", "tokens", "merges", "bos_token_id", "eos_token_id"):
        assert ours[f"tokenizer.ggml.{key}"] == theirs[f"tokenizer.ggml.{key}"], key

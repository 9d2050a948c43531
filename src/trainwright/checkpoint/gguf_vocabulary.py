"""A tokenizer as llama.cpp has it: tokens, their types, merges or scores, and how text is cut.

llama.cpp has two ways for language models: byte-level BPE ("gpt2"), whose patterns for cutting text
are code that the file names, and SentencePiece's BPE ("llama"), which merges by scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from trainwright.checkpoint.gguf_file import Strings
from trainwright.data.tokenizers import load_tokenizer
from trainwright.errors import Mistake, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"
_NEVER = -1e6  # the score of tokens that no merge makes

_WORDS_UP_TO = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"{_UPPER}*{_LOWER}+%s|{_UPPER}+{_LOWER}*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# (the patterns at which a byte-level tokenizer cuts, whether whole words skip the merges) → the
# name under which llama.cpp (src/llama-vocab.cpp) does the same. "gpt2" is ByteLevel's own pattern,
# "digits" cuts digits apart.
CUTS: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((_WORDS_UP_TO % "",), False): "qwen2",
    ((_WORDS_UP_TO % "{1,3}",), False): "dbrx",
    ((_WORDS_UP_TO % "{1,3}",), True): "llama-bpe",
    ((_CASED % ("", "", ""),), True): "tekken",
    ((_CASED % (_ENDINGS, _ENDINGS, "{1,3}"),), False): "gpt-4o",
    (_DEEPSEEK, False): "deepseek-v3",
}
_CUTS_KNOWN = f"the patterns of {', '.join(CUTS.values())}"


def vocabulary(
    directory: Path, rows: int, turn_end: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The `tokenizer.*` key-values for a model with `rows` embeddings, and notes.

    The tokenizer in `directory` is taken as its tokenizer.json says it: transformers' classes give
    some tokenizers other ways of cutting text than their files do, and than they learnt with.
    `turn_end` is the token that ends an answer, where it is not the EOS. Raises UserError for a
    tokenizer that llama.cpp would imitate with other ids.
    """
    tokenizer = load_tokenizer(directory)
    file = directory / "tokenizer.json"
    backend = tokenizer.backend_tokenizer
    parts = json.loads((Tokenizer.from_file(str(file)) if file.is_file() else backend).to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise _unknown(f"a tokenizer of type {model['type']}", "byte-level and SentencePiece BPE")
    merges = [tuple(pair) for pair in model["merges"]]
    notes: list[str] = []
    values = _tokens(tokenizer, model, rows)
    if model.get("byte_fallback"):
        values |= _sentencepiece(parts, merges, values["tokens"].items)
    else:
        values |= _byte_level(parts, merges)
        if parts["normalizer"] is not None:
            notes.append("llama.cpp does not bring text into Unicode's NFC, as the tokenizer does")
    values |= _special(tokenizer, turn_end)
    return {
        key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}": value
        for key, value in values.items()
    }, notes


def _byte_level(parts: Mapping[str, Any], merges: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    if (parts["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise _unknown(f"the normalizer {parts['normalizer']['type']}", "none, or NFC")
    cuts = _cuts(parts["pre_tokenizer"])
    if not merges:
        cuts = ("gpt2",)  # one token a byte, wherever text is cut
    name = CUTS.get((cuts, bool(merges) and bool(parts["model"].get("ignore_merges"))))
    if name is None:
        raise _unknown(f"how this tokenizer cuts text: {' then '.join(cuts)}", _CUTS_KNOWN)
    return {"model": "gpt2", "pre": name, "merges": Strings([" ".join(pair) for pair in merges])}


def _cuts(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The patterns that cut text before it is merged, in order, by the names in `CUTS`."""
    steps = [pre_tokenizer] if pre_tokenizer is not None else []
    if steps and steps[0]["type"] == "Sequence":
        steps = steps[0]["pretokenizers"]
    cuts: list[str] = []
    for step in steps:
        kind = step["type"]
        if kind == "Digits" and step["individual_digits"]:
            cuts.append("digits")
        elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            cuts += step["pattern"].values()
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            cuts += ["gpt2"] if step["use_regex"] else []
        else:
            raise _unknown(f"the pre-tokenizer {json.dumps(step)}", _CUTS_KNOWN)
    if not steps or steps[-1]["type"] != "ByteLevel":
        raise _unknown("a BPE over characters", "byte-level and SentencePiece BPE")
    return tuple(cuts)


def _sentencepiece(
    parts: Mapping[str, Any], merges: Sequence[tuple[str, ...]], tokens: Sequence[str]
) -> dict[str, Any]:
    """SentencePiece's BPE. The pair that makes the token of the highest score is merged first, so
    a token's score is minus the rank of the first of its merges."""
    model = parts["model"]
    steps = [parts["normalizer"] or {}, parts["pre_tokenizer"] or {}]
    inner = [*steps[0].get("normalizers", [steps[0]]), steps[1]]
    kinds = [step["type"] for step in inner if step]
    prefix = any(
        step.get("type") == "Prepend" or step.get("prepend_scheme", "never") != "never"
        for step in inner
    )
    # Gemma's cuts at spaces, which it has replaced before.
    known = [["Prepend", "Replace"], ["Replace"], ["Metaspace"], ["Replace", "Split"]]
    if kinds not in known or model.get("ignore_merges") or steps[1].get("split"):
        what = f"SentencePiece's BPE with {' then '.join(kinds)}, or words merged apart"
        raise _unknown(what, "spaces that become ▁, and merges of whole texts")
    added = {token["content"] for token in parts["added_tokens"]}
    scores = _scores(model["vocab"], merges, added)
    return {
        "model": "llama",
        "pre": "default",
        "add_space_prefix": prefix,
        "scores": [scores.get(token, _NEVER) for token in tokens],
    }


def _scores(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, ...]], added: set[str]
) -> dict[str, float]:
    """A score for every token that merges make; UserError where scores would merge otherwise.

    They merge as ranks do if all merges of a token follow each other, and every two tokens that
    make up a third are among the merges. Added tokens are found before anything is merged.
    """
    scores: dict[str, float] = {}
    last = ""
    for rank, (left, right) in enumerate(merges):
        token = left + right
        if token != last and token in scores and token not in added:
            raise _unknown(f"merges that make {token!r} at two ranks", "SentencePiece's own")
        scores.setdefault(token, -float(rank))
        last = token
    pairs = set(merges)
    for token in vocab:
        for cut in range(1, len(token) if token not in added else 0):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab and (left, right) not in pairs:
                what = f"a vocabulary whose {left!r} and {right!r} are not merged into {token!r}"
                raise _unknown(what, "SentencePiece's own")
    return scores


def _tokens(
    tokenizer: PreTrainedTokenizerFast, model: Mapping[str, Any], rows: int
) -> dict[str, Any]:
    """Every row's token and its type; rows that no token has are named and never used."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        what = f"the tokenizer has tokens up to {max(by_id)}, the model {rows} rows for them"
        raise UserError(what, "export with the tokenizer that the model was trained with")
    added, unknown = tokenizer.added_tokens_decoder, model.get("unk_token")
    tokens, types = [], []
    for number in range(rows):
        token = by_id.get(number)
        if token is None:
            token, type_ = f"[PAD{number}]", UNUSED
        elif model.get("byte_fallback") and token == unknown:
            type_ = UNKNOWN
        elif number in added:
            type_ = CONTROL if added[number].special else USER_DEFINED
        elif model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            type_ = BYTE
        else:
            type_ = NORMAL
        if type_ == USER_DEFINED and model.get("byte_fallback"):
            token = token.replace(SPACE, " ")  # it is found in text before spaces are replaced
        tokens.append(token)
        types.append(type_)
    if len(set(tokens)) < rows:
        raise _unknown("two tokens of the same text", "one row for a text")
    return {"tokens": Strings(tokens), "token_type": types}


def _special(tokenizer: PreTrainedTokenizerFast, turn_end: int | None) -> dict[str, Any]:
    """Special tokens by their roles, what is put around a text, and the chat template."""
    around = tokenizer("a").input_ids
    plain = tokenizer("a", add_special_tokens=False).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    first, last = around[:1] == [bos] != plain[:1], around[-1:] == [eos] != plain[-1:]
    if around != [*([bos] if first else []), *plain, *([eos] if last else [])]:
        shown = tokenizer.convert_ids_to_tokens(around)
        raise _unknown(f"a tokenizer that makes {shown} of 'a'", "BOS before a text, EOS after it")
    roles = {
        "bos_token_id": bos,
        "eos_token_id": eos,
        "eot_token_id": turn_end if turn_end != eos else None,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    values: dict[str, Any] = {key: value for key, value in roles.items() if value is not None}
    values |= {"add_bos_token": first, "add_eos_token": last}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return values | ({"tokenizer.chat_template": template} if template else {})


def _unknown(what: str, known: str) -> UserError:
    return UserError(Mistake(f"llama.cpp does not know {what}", f"it knows {known}"))

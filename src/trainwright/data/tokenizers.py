"""Tokenizers: pretrained, one token a byte, or trained on the spot; all Hugging Face fast ones.

Whatever the origin, a tokenizer is saved once in a form that transformers' AutoTokenizer loads to
the same ids, with an EOS and with a padding token that is not EOS.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from trainwright.data.encode import Encoder, byte_characters
from trainwright.errors import Mistake, UserError
from trainwright.recipe.schema import TokenizerSection, TrainTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"

# How a trained tokenizer cuts text before merging: words with one leading character, single
# digits, runs of signs, line ends. It is the pattern of Qwen 2 (OpenAI's cl100k with single
# digits), because transformers gives that pattern to every tokenizer beside a qwen2 config,
# whatever its own file says. Qwen's Unicode normalisation is left out: it would alter text.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Files of a directory or hub repository that a tokenizer is made from.
TOKENIZER_FILES = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "*.model", "chat_template*", "config.json"),
)
_PADDING = re.compile(r"(^|[^a-z])pad(ding)?([^a-z]|$)", re.IGNORECASE)
_RESERVED = re.compile(r"reserved|unused", re.IGNORECASE)
_PROBES = ("Hello, world!\n", "  naïve 世界 🙂\t12345 don't", "def f(x):\n\n    return x\r\n")


def build_tokenizer(
    section: TokenizerSection | None,
    model_path: str | None,
    documents: Iterable[str],
    *,
    directory: Path,
    vocabulary: int | None = None,
) -> PreTrainedTokenizerFast:
    """Make the recipe's tokenizer and save it in `directory`.

    `section` None means the tokenizer of the pretrained model at `model_path`. `documents` are the
    texts that a trained tokenizer sees; the others do not touch them. `vocabulary` is the number
    of rows in the model's embedding, None if they follow from the tokenizer.

    Raises UserError where there is no tokenizer, or one that does not fit.
    """
    if section is not None and section.train is not None:
        tokenizer = train_tokenizer(documents, section.train)
    elif section is not None and section.path == "bytes":
        tokenizer = byte_tokenizer()
    else:
        reference = section.path if section is not None else model_path
        if reference is None:
            raise UserError(
                Mistake(
                    "a new model needs a tokenizer",
                    "write `tokenizer: {train: {vocab_size: 4096}}` to train one on the data, "
                    "`tokenizer: bytes`, or the directory or hub id of one",
                    key="tokenizer",
                )
            )
        tokenizer = load_tokenizer(reference, key="tokenizer")
        _require_eos(tokenizer, reference)
        reserve_padding(tokenizer, vocabulary)
    save_tokenizer(tokenizer, directory)
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: ids 0–255 are the bytes, then BOS 256, EOS 257, PAD 258."""
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens([AddedToken(token, special=True) for token in (BOS, EOS, PAD)])
    return _finished(backend)


def train_tokenizer(texts: Iterable[str], section: TrainTokenizer) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `section.vocab_size` entries: specials, 256 bytes, merges.

    The same texts in the same order give the same tokenizer. A text too small for that many merges
    gives a smaller vocabulary. Every text can be encoded and decoded back exactly.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=section.vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _finished(backend)


def spread_evenly(texts: Iterable[str], share: float) -> Iterator[str]:
    """About `share` of the texts' characters, in excerpts taken evenly from all of them."""
    if share >= 1:
        yield from texts
        return
    excerpt = 4096
    seen = taken = 0
    for text in texts:
        for start in range(0, len(text), excerpt):
            part = text[start : start + excerpt]
            seen += len(part)
            if taken + len(part) <= seen * share:
                taken += len(part)
                yield part


def load_tokenizer(reference: str | Path, key: str = "") -> PreTrainedTokenizerFast:
    """The fast tokenizer in a directory or hub repository, as AutoTokenizer gives it.

    Code shipped beside a tokenizer is never run. Raises UserError where there is none.
    """
    from transformers import AutoTokenizer

    local = Path(reference).expanduser()
    tokenizer: Any
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(local) if local.is_dir() else str(reference), use_fast=True, trust_remote_code=False
        )
    except Exception as error:  # from missing files to a broken network: one answer for all
        raise _not_loaded(str(reference), local, error, key) from error
    if not getattr(tokenizer, "is_fast", False):
        what = f"the tokenizer {reference} has no fast version (tokenizer.json)"
        raise UserError(Mistake(what, "convert it, or use another tokenizer", key=key))
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Save in Hugging Face's layout, and prove that the saved files give the same ids.

    The proof covers `Encoder`, which reads the files without transformers.
    """
    tokenizer.save_pretrained(str(directory))
    encoder = Encoder(directory)
    for text, ids in zip(_PROBES, encoder.encode(_PROBES), strict=True):
        theirs = tokenizer(text).input_ids
        if theirs != ids[: len(theirs)].tolist():
            what = "its saved form gives other ids than the tokenizer itself"
            fix = "save it anew with a current version of transformers"
            raise UserError(Mistake(what, fix, key="tokenizer", where=tokenizer.name_or_path))


def reserve_padding(tokenizer: PreTrainedTokenizerFast, vocabulary: int | None) -> None:
    """Give `tokenizer` a padding token that is not EOS, without touching what it knows.

    Padding never enters the loss or the attention (both go by segments, not by ids), so any token
    serves that does not mean the end of a text. In this order: the one there is; a special token
    made for padding; one reserved or unused; the unknown token; a new `<pad>` where the embedding
    has `vocabulary` rows and so room for it; any other special token but BOS.
    Raises UserError where none of these exists.
    """
    taken = {tokenizer.eos_token, tokenizer.bos_token, None}
    if tokenizer.pad_token not in taken:
        return
    special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    spare = [token for token in special if token not in taken]
    chosen = next((token for token in spare if _PADDING.search(token)), None)
    chosen = chosen or next((token for token in spare if _RESERVED.search(token)), None)
    if chosen is None and tokenizer.unk_token not in taken:
        chosen = tokenizer.unk_token
    if chosen is None and (vocabulary is None or _size(tokenizer) < vocabulary):
        chosen = PAD
    chosen = chosen or next(reversed(spare), None)
    if chosen is None:
        raise UserError(
            Mistake(
                "the tokenizer has no token to pad with but EOS, and the model has no room for one",
                "set `pad_token` in a copy of its tokenizer_config.json to a token that your text "
                "never uses, and give that copy as `tokenizer`",
                key="tokenizer",
            )
        )
    tokenizer.add_special_tokens({"pad_token": chosen})


def embedding_rows(model_directory: Path) -> int | None:
    """`vocab_size` of the model config in a directory, None where it does not say."""
    try:
        config = json.loads((model_directory / "config.json").read_text())
    except (OSError, ValueError):
        return None
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def download_tokenizer(reference: str, key: str = "tokenizer") -> Path:
    """The directory of a tokenizer: `reference` itself, or the local copy of a hub repository."""
    local = Path(reference).expanduser()
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(reference, allow_patterns=list(TOKENIZER_FILES)))
    except Exception as error:  # hub, network or a malformed id
        raise _not_loaded(reference, local, error, key) from error


def _finished(backend: Tokenizer) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    backend.decoder = decoders.ByteLevel()
    backend.post_processor = TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, backend.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        # Bytes leave nothing unknown; but where this is unset, some of transformers' classes add
        # a token of their own when they load, one more than the model has rows.
        unk_token=PAD,
        # "</s>" in a text is text: nobody's document can end itself.
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _size(tokenizer: PreTrainedTokenizerFast) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def _require_eos(tokenizer: Any, reference: str) -> None:
    if tokenizer.eos_token_id is None:
        raise UserError(
            Mistake(
                f"the tokenizer {reference} has no EOS token, which ends every document",
                "set `eos_token` in a copy of its tokenizer_config.json",
                key="tokenizer",
            )
        )


def _not_loaded(reference: str, local: Path, error: Exception, key: str) -> UserError:
    if local.is_dir():
        files = ", ".join(sorted(each.name for each in local.iterdir())[:6]) or "nothing"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = f"no tokenizer can be loaded from {local} (it holds {files}): {reason}"
        return UserError(Mistake(what, "give a directory with a tokenizer.json", key=key))
    if local.exists() or reference.startswith(("/", ".", "~")):
        what = f"{reference} is no directory with a tokenizer"
        return UserError(Mistake(what, "check the path", key=key))
    what = f"there is no directory {reference}, and no such tokenizer could be had from the hub"
    fix = "check the name and the network (HF_HUB_OFFLINE must not be set), or give a directory"
    return UserError(Mistake(what, fix, key=key))

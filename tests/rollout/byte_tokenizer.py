"""A fast tokenizer with one token a byte: every character beyond ASCII spans several tokens."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>"]
SIZE = len(SPECIAL) + 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 and 1 are `<s>` and `</s>`; the others are bytes, in no particular order."""
    entries = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")

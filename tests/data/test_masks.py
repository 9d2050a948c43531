"""Masks token by token: what is trained, as text in «marks», against what was written by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby, islice

import numpy as np
import pytest

from tests.data.expected_chats import (
    CHATS,
    EXPECTED,
    ODD,
    REFUSED,
    SYSTEM,
    TOOLS,
    TURNS,
    assistant,
    user,
)
from trainwright.data.encode import Encoder
from trainwright.data.examples import Conversation, RowRefusedError, Text
from trainwright.data.formats import example_of
from trainwright.data.formats_rows import read_rows
from trainwright.data.masks import Encoded, Renderer, cut, encode_many, encode_sequence
from trainwright.data.templates import ChatTemplate, find_template, special_tokens
from trainwright.data.tokenizers import byte_tokenizer, save_tokenizer, train_tokenizer
from trainwright.errors import UserError
from trainwright.recipe.schema import TrainTokenizer

# Special tokens of the models' tokenizers: each is one token, all other text is bytes.
_TOKENS = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    "mistral's tools": ("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    "chatml": ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>"),
    "odd": ("<|user|>", "<|assistant|>", "<|end|>", "<|return|>"),
}
_BOS = {"llama3": "<|begin_of_text|>", "gemma": "<bos>"}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Byte tokenizers with the special tokens of all models, by the name of their BOS."""
    made = {}
    for name in ("", *_BOS):
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens([t for some in _TOKENS.values() for t in some], special_tokens=True)
        tokenizer.bos_token = _BOS.get(name, "<s>")
        made[name] = tmp_path_factory.mktemp(f"bytes-{name}")
        save_tokenizer(tokenizer, made[name])
    return made


@pytest.fixture(scope="module")
def bytes_directory(directories):
    return directories[""]


def text_of(tokens, directory) -> str:
    """Tokens as text, special ones too."""
    encoder = Encoder(directory)
    specials = encoder.specials
    pieces = [
        specials[token].encode() if token in specials else encoder.token_bytes(token)
        for token in tokens
    ]
    return b"".join(pieces).decode()


def marked(encoded: Encoded, directory) -> str:
    """The tokens as text, with what is trained between « and »."""
    out = ""
    for trained, tokens in groupby(zip(encoded.trained, encoded.ids, strict=True), lambda t: t[0]):
        text = text_of([token for _, token in tokens], directory)
        out += f"«{text}»" if trained else text
    return out


def from_source(source: str, directory) -> Renderer:
    return Renderer(directory, ChatTemplate(source, "made", special_tokens(directory)))


@pytest.mark.parametrize(("template", "chat"), EXPECTED)
def test_named_templates(template, chat, directories):
    directory = directories[template if template in _BOS else ""]
    renderer = Renderer(directory, find_template(template, directory))
    encoded = encode_sequence(CHATS[chat], renderer)
    assert marked(encoded, directory) == EXPECTED[template, chat]
    # Special tokens are single tokens, though this tokenizer reads them as text in plain text.
    end = renderer.end_of_turn
    special = next((t for some in _TOKENS.values() for t in some if end.startswith(t)), "</s>")
    assert Encoder(directory).specials[renderer.stop_id] == special
    # One answer at a time is the same as all at once.
    last = replace(CHATS[chat], first=len(CHATS[chat].messages) - 1)
    only = EXPECTED[template, chat].rpartition("«")
    assert marked(encode_sequence(last, renderer), directory) == (
        only[0].replace("«", "").replace("»", "") + only[1] + only[2]
    )


@pytest.mark.parametrize("case", ODD)
def test_odd_templates(case, bytes_directory):
    source, expected = ODD[case]
    chat = SYSTEM if "system" in case else TURNS
    encoded = encode_sequence(chat, from_source(source, bytes_directory))
    assert marked(encoded, bytes_directory) == expected


def test_train_on(bytes_directory):
    renderer = Renderer(bytes_directory, find_template("plain", bytes_directory))
    late = replace(TURNS, first=3)
    text = "<s>User:\nHi\nAssistant:\n{}User:\nHow are you?\nAssistant:\n«Fine.</s>\n»"

    def trained(chat, train_on):
        return marked(encode_sequence(chat, renderer, train_on=train_on), bytes_directory)

    assert trained(late, "completion") == text.format("Hello!</s>\n")
    assert trained(late, "assistant") == text.format("«Hello!</s>\n»")
    # All but the first token, before which there is nothing.
    everything = text.format("Hello!</s>\n").replace("«", "").replace("»", "")
    assert trained(late, "all") == f"<s>«{everything[3:]}»"
    hidden = Conversation(
        (TURNS.messages[0], {**TURNS.messages[1], "train": False}, *TURNS.messages[2:]), 1
    )
    assert trained(hidden, "assistant") == text.format("Hello!</s>\n")
    assert (
        trained(hidden, "all")
        == everything.replace("<s>", "<s>«").replace("Hello!</s>\n", "»Hello!</s>\n«") + "»"
    )
    nothing = replace(late, messages=(*late.messages[:3], {**late.messages[3], "train": False}))
    with pytest.raises(RowRefusedError, match="no turn of the assistant is trained on"):
        trained(nothing, "completion")
    marks = from_source(ODD["marks"][0], bytes_directory)
    assert marked(encode_sequence(late, marks), bytes_directory) == (
        "<|user|>Hi\n<|assistant|>Hello!</s>\n<|user|>How are you?\n<|assistant|>«Fine.</s>»\n"
    )


def test_several_marks_in_a_turn(bytes_directory):
    source = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %} ~ {% generation %}</s>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt }}"
    )
    renderer = from_source(source, bytes_directory)
    text = "<|user|>Hi<|assistant|>{}<|user|>How are you?<|assistant|>«Fine.» ~ «</s>»"
    for first, turn in ((1, "«Hello!» ~ «</s>»"), (3, "Hello! ~ </s>")):
        encoded = encode_sequence(replace(TURNS, first=first), renderer)
        assert marked(encoded, bytes_directory) == text.format(turn)


def test_marks_tell_what_turns_cannot(bytes_directory):
    """Answers that end in two ways: all marks are taken, but no turn can be left out."""
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %} ~ {% generation %}{{ '<|return|>' if loop.last else '<|end|>' }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    renderer = from_source(source, bytes_directory)
    assert marked(encode_sequence(TURNS, renderer), bytes_directory) == (
        "Hi«Hello!» ~ «<|end|>»How are you?«Fine.» ~ «<|return|>»"
    )
    some = replace(TURNS, messages=(*TURNS.messages[:3], {**assistant("x"), "train": False}))
    with pytest.raises(RowRefusedError, match="turn 2 cannot be told"):
        encode_sequence(some, renderer)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, bytes_directory):
    source, chat, words = REFUSED[case]
    with pytest.raises(RowRefusedError) as refused:
        encode_sequence(chat, from_source(source, bytes_directory))
    assert words in refused.value.what
    assert refused.value.fix


def test_a_template_without_an_end_is_refused(bytes_directory):
    with pytest.raises(UserError, match="writes nothing after an answer"):
        from_source("{% for m in messages %}{{ m.content }}{% endfor %}", bytes_directory)
    with pytest.raises(UserError, match="writes no plain text as an answer"):
        from_source("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", bytes_directory)
    with pytest.raises(RowRefusedError, match="the tokenizer has no chat template"):
        encode_sequence(TURNS, Renderer(bytes_directory))


def test_text(bytes_directory):
    renderer = Renderer(bytes_directory)

    def trained(prompt, completion, **more):
        encoded = encode_sequence(Text(prompt, completion), renderer, **more)
        return marked(encoded, bytes_directory)

    assert trained("2+2= ", "4\n") == "<s>2+2= «4\n</s>»"
    assert trained("", "Once é") == "<s>«Once é</s>»"
    assert trained("2+2= ", "4", train_on="all") == "<s>«2+2= 4</s>»"
    # Nobody's text can end itself here: what looks like EOS is text, and the real one follows.
    encoded = encode_sequence(Text("a", "b</s>"), renderer)
    assert encoded.ids.tolist() == [256, *b"ab</s>", 257]
    assert encoded.trained.tolist() == [False, False, *[True] * 6]


def test_nothing_is_written_twice(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = False
    save_tokenizer(tokenizer, tmp_path)
    plain = Renderer(tmp_path)
    for text in (Text("a", "b"), Text("<s>a", "b"), Text("a", "b</s>"), Text("<s>a", "b</s>")):
        assert encode_sequence(text, plain).ids.tolist() == [256, 97, 98, 257]
    chat = Renderer(tmp_path, find_template("plain", tmp_path))
    ids = encode_sequence(TURNS, chat).ids.tolist()
    assert ids.count(256) == 1 and ids.count(257) == 2


def test_tokens_across_a_border(tmp_path):
    """A tokenizer that knows " yes" as one word joins the prompt's space to the answer."""
    tokenizer = train_tokenizer(["Answer: yes\n"] * 99, TrainTokenizer(vocab_size=300))
    save_tokenizer(tokenizer, tmp_path)
    encoder = Encoder(tmp_path)
    for prompt, completion in (("Answer: ", "yes"), ("Answer:", " yes")):
        encoded = encode_sequence(Text(prompt, completion), Renderer(tmp_path))
        # The ids are those of the whole text, as the model will see it.
        assert encoded.ids.tolist() == encoder.encode([prompt + completion])[0].tolist()
        assert marked(encoded, tmp_path) == "<s>Answer:« yes</s>»"
    assert len(encoded.ids) == 5  # <s>, "Answer", ":", " yes", </s>


def test_spaces_are_characters_like_others(tmp_path):
    """GPT-2's post-processor takes leading and trailing spaces out of a token's place."""
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    save_tokenizer(tokenizer, tmp_path)
    encoded = encode_sequence(Text("x ", "  y  "), Renderer(tmp_path))
    assert marked(encoded, tmp_path) == "x «  y  </s>»"


def test_sentencepiece_like(tmp_path):
    """Words with a mark for their space, and one put before the text."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁Answer", ":", "▁yes", "▁", "y", "e", "s"]
    vocab = [(token, 0.0) for token in ("<unk>", "<s>", "</s>", "<pad>")]
    backend = Tokenizer(models.Unigram([*vocab, *((w, -len(w) / 9) for w in words)], unk_id=0))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Replace("▁", " ")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    tokenizer.save_pretrained(tmp_path)
    for prompt, completion in (("Answer:", " yes"), ("Answer: ", "yes")):
        encoded = encode_sequence(Text(prompt, completion), Renderer(tmp_path))
        assert marked(encoded, tmp_path) == " Answer:« yes</s>»"
    encoded = encode_sequence(Text("", "yes"), Renderer(tmp_path))
    assert [Encoder(tmp_path).token_bytes(token) for token in encoded.ids[:1]] == [b" yes"]


def test_many_are_each(bytes_directory):
    renderer = Renderer(bytes_directory, find_template("qwen", bytes_directory))
    bad = Conversation((user("a"), assistant("\ud83d")), 1)
    some = [Text("a", "b"), TURNS, bad, SYSTEM, Text("", "c é 世界 🙂"), TOOLS]
    sequences = [some[i % len(some)] for i in range(1100)]
    results = list(encode_many(iter(sequences), renderer))
    assert len(results) == len(sequences)
    for sequence, result in zip(sequences, results, strict=True):
        if sequence is bad:
            assert isinstance(result, RowRefusedError) and "surrogate" in result.what
            continue
        alone = encode_sequence(sequence, renderer)
        assert np.array_equal(alone.ids, result.ids)
        assert np.array_equal(alone.trained, result.trained)


def test_pairs(bytes_directory):
    renderer = Renderer(bytes_directory)
    pair = [Text("a", "b"), Text("a", "cc"), TURNS]
    chosen, rejected, refused = encode_many(pair, renderer, train_on="completion")
    assert isinstance(chosen, Encoded) and isinstance(rejected, Encoded)
    assert marked(chosen, bytes_directory) == "<s>a«b</s>»"
    assert marked(rejected, bytes_directory) == "<s>a«cc</s>»"
    assert isinstance(refused, RowRefusedError)
    assert "the row is a conversation" in refused.what


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral", "plain"])
def test_asked_as_it_was_trained(template, bytes_directory):
    """What stands before an answer in training is what the model is asked with."""
    renderer = Renderer(bytes_directory, find_template(template, bytes_directory))
    encoded = encode_sequence(replace(SYSTEM, first=4), renderer)
    asked = renderer.prompt_ids(SYSTEM.messages[:4])
    assert asked == encoded.ids[~encoded.trained].tolist()


def test_cut():
    encoded = Encoded(np.arange(6), np.array([0, 0, 1, 0, 1, 1], bool))
    assert cut(encoded, 6) is encoded
    start = cut(encoded, 3)
    assert start.ids.tolist() == [0, 1, 2] and start.trained.tolist() == [False, False, True]
    assert cut(encoded, 2) is None
    end = cut(encoded, 2, keep="end")
    # Token 4 was a target, but nothing is left before it.
    assert end.ids.tolist() == [4, 5] and end.trained.tolist() == [False, True]
    assert cut(encoded, 1, keep="end") is None
    assert encoded.trained.tolist() == [False, False, True, False, True, True]


@pytest.mark.shared
def test_smollm2_token_by_token(shared, tmp_path):
    """SmolLM2's own ChatML with its own tokenizer; ids as transformers gives them."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(shared / "tokenizers" / "smollm2")
    save_tokenizer(theirs, tmp_path)
    renderer = Renderer(tmp_path, find_template(None, tmp_path))
    header = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n"
    )
    expected = {
        "turns": header + EXPECTED["chatml", "turns"],
        "system": EXPECTED["chatml", "system"],
    }
    for chat, text in expected.items():
        encoded = encode_sequence(CHATS[chat], renderer)
        assert marked(encoded, tmp_path) == text
        ids = theirs.apply_chat_template(list(CHATS[chat].messages), return_dict=False)
        # The file was saved with padding to the length somebody once used.
        assert encoded.ids.tolist() == [token for token in ids if token != theirs.pad_token_id]
    with pytest.raises(RowRefusedError, match="leaves out the call of `weather`"):
        encode_sequence(TOOLS, renderer)
    assert Encoder(tmp_path).specials[renderer.stop_id] == "<|im_end|>"


_REAL = (
    "instruct/fastchat_dummy_conversation.json",
    "instruct/lf_alpaca_en_demo.json",
    "instruct/lf_glaive_toolcall_en_demo.json",
    "instruct/lf_reason_tool_use_demo_50.jsonl",
    "instruct/lf_v1_sft_demo.jsonl",
    "instruct/oasst_en_100_tree.jsonl",
    "preference/hh_rlhf_harmless_base_test.jsonl.gz",
    "preference/lf_dpo_en_demo.json",
    "preference/lf_kto_en_demo.json",
)


@pytest.mark.shared
@pytest.mark.parametrize("file", _REAL)
def test_real_answers_are_what_is_trained(shared, file, bytes_directory):
    plain, qwen = (
        Renderer(bytes_directory, find_template(name, bytes_directory))
        for name in ("plain", "qwen")
    )
    for name, row in islice(read_rows(shared / file), 25):
        for conversation in example_of(row, name=name).sequences:
            answers = [
                message
                for message in conversation.messages[conversation.first :]
                if message["role"] == "assistant"
            ]
            has_tools = conversation.tools or any("tool_calls" in answer for answer in answers)
            encoded = encode_sequence(conversation, qwen if has_tools else plain)
            trained = text_of(encoded.ids[encoded.trained], bytes_directory)
            if has_tools:
                assert trained.count("<|im_end|>\n") == len(answers)
                calls = [call for answer in answers for call in answer.get("tool_calls", ())]
                written = [f'"name": "{call["function"]["name"]}"' for call in calls]
                assert all(each in trained for each in written)
            else:
                assert trained == "".join(f"{answer['content']}</s>\n" for answer in answers)


def test_masks_of_transformers(bytes_directory):
    """Where a template has marks, transformers makes masks too: they are the same."""
    from transformers import AutoTokenizer

    source = ODD["marks"][0]
    tokenizer = AutoTokenizer.from_pretrained(bytes_directory)
    tokenizer.split_special_tokens = False
    theirs = tokenizer.apply_chat_template(
        list(SYSTEM.messages),
        chat_template=source,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    encoded = encode_sequence(SYSTEM, from_source(source, bytes_directory))
    assert encoded.ids.tolist() == theirs["input_ids"]
    assert encoded.trained.astype(int).tolist() == theirs["assistant_masks"]

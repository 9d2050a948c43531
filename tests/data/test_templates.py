"""Where chat templates come from, and what they give beside the models' own templates."""

from __future__ import annotations

import importlib.util
import json
import re
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest

from tests.data.expected_chats import CHATS, SYSTEM, TOOLS, TURNS, user
from trainwright.data.examples import RowRefusedError
from trainwright.data.templates import (
    NAMED_TEMPLATES,
    ChatTemplate,
    find_template,
    special_tokens,
)
from trainwright.data.templates_spans import render_with_spans
from trainwright.errors import UserError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
_MARKS = re.compile(r"<\|[^|>]*\|>|</?s>|<(?:start|end)_of_turn>")


def saved(folder: Path, **config) -> Path:
    """A tokenizer's directory as far as templates look at it."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({**TOKENS, **config}))
    return folder


def test_the_tokenizers_own(tmp_path):
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    folder = saved(tmp_path / "a", chat_template=source)
    assert find_template(None, folder).render(TURNS.messages) == (
        "<s>Hi</s>Hello!</s>How are you?</s>Fine.</s>"
    )
    # A file beside the configuration is what current versions of transformers write.
    (folder / "chat_template.jinja").write_text("{{ messages | length }}")
    assert find_template(None, folder).render(TURNS.messages) == "4"
    assert find_template(None, saved(tmp_path / "b")) is None


@pytest.mark.parametrize("kind", ["in the configuration", "in files"])
def test_one_for_tools(tmp_path, kind):
    both = {"default": "plain", "tool_use": "tools: {{ tools[0].function.name }}"}
    listed = [{"name": name, "template": source} for name, source in both.items()]
    folder = saved(tmp_path, **({"chat_template": listed} if "config" in kind else {}))
    if kind == "in files":
        (folder / "chat_template.jinja").write_text(both["default"])
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(both["tool_use"])
    template = find_template(None, folder)
    assert template.render(TURNS.messages) == "plain"
    assert template.render(TOOLS.messages, TOOLS.tools) == "tools: weather"


def test_special_tokens(tmp_path):
    config = {
        "bos_token": {"content": "<b>", "lstrip": False},
        "unk_token": None,
        "add_bos_token": True,
        "image_token": "<image>",
    }
    assert special_tokens(saved(tmp_path, **config)) == {
        "bos_token": "<b>",
        "eos_token": "</s>",
        "image_token": "<image>",
    }


def test_from_a_file(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    template = find_template(str(file), saved(tmp_path))
    assert template.name == str(file)
    assert template.render([user("Hi")]) == "[user] Hi</s>"


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("chatlm", "there is no chat template chatlm: no file, and not one of `chatml`, `llama3`"),
        ("broken.jinja", "is no valid Jinja: "),
    ],
)
def test_what_is_no_template(tmp_path, monkeypatch, reference, words):
    monkeypatch.chdir(tmp_path)
    Path("broken.jinja").write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(UserError) as refused:
        find_template(reference, saved(tmp_path))
    assert words in str(refused.value)
    assert refused.value.mistakes[0].fix


def test_variables_reach_the_template():
    template = ChatTemplate(NAMED_TEMPLATES["qwen"], "qwen", TOKENS)
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    messages = TURNS.messages[:1]
    assert template.render(messages, add_generation_prompt=True) == asked
    assert template.render(messages, add_generation_prompt=True, enable_thinking=False) == (
        asked + "<think>\n\n</think>\n\n"
    )


def test_what_is_ours_is_not_the_templates():
    template = ChatTemplate("{% for m in messages %}{{ m | tojson }}{% endfor %}", "made")
    assert template.render([{"role": "user", "content": "a", "train": False}]) == (
        '{"role": "user", "content": "a"}'
    )


def test_every_day_gives_the_same_text():
    source = (
        "\n{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y-%m-%d\") }}{{ messages[0].role }}"
    )
    text = ChatTemplate(source, "dated").render([user("Hi")])
    day = datetime(2024, 7, 26)
    assert text == f"\n{day:%d %b %Y} {day:%Y-%m-%d}user"
    # Marked characters are counted in the text that is returned.
    marked = ChatTemplate(source + "{% generation %}AB{% endgeneration %}", "dated")
    text, [(begin, end)] = marked.render_marked([user("Hi")])
    assert text[begin:end] == "AB"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages[0].nothing.more }}",
    ],
)
def test_templates_are_kept_in_the_sandbox(source):
    with pytest.raises(RowRefusedError, match="refuses the conversation"):
        ChatTemplate(source, "strange").render([user("Hi")])


def _trl(name: str) -> ChatTemplate:
    """A model's own template, of those that TRL keeps."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("TRL is not installed, whose copies of the models' templates are read here")
    file = Path(found.origin).parent / "chat_templates" / f"{name}.jinja"
    if not file.is_file():
        pytest.skip(f"this version of TRL has no {file.name}")
    return ChatTemplate(file.read_text(), name, TOKENS)


@pytest.mark.parametrize(
    ("ours", "theirs", "chats"),
    [
        ("qwen", "qwen3", ("turns", "system", "tools", "reasoned", "thoughtful")),
        ("llama3", "llama3", ("turns", "system")),
        ("gemma", "gemma", ("turns",)),
        ("gemma", "gemma3", ("turns", "system")),
    ],
)
def test_the_models_own_templates_give_the_same_text(ours, theirs, chats):
    real = _trl(theirs)
    named = ChatTemplate(NAMED_TEMPLATES[ours], ours, TOKENS)
    for chat in chats:
        messages, tools = CHATS[chat].messages, CHATS[chat].tools
        for prompt in (False, True):
            more = {"tools": tools, "add_generation_prompt": prompt}
            assert named.render(messages, **more) == real.render(messages, **more)


def test_tools_of_llama_3_1():
    """The dates and the environment that 3.1 writes first are left out; the rest is the same."""
    named = ChatTemplate(NAMED_TEMPLATES["llama3"], "llama3", TOKENS)
    ours = named.render(TOOLS.messages, TOOLS.tools)
    theirs = _trl("llama3_1").render(TOOLS.messages, TOOLS.tools)
    assert ours == "<s>" + theirs[theirs.index("<|start_header_id|>user") :]


@pytest.mark.parametrize(
    ("theirs", "chats"),
    [
        ("llama3", ("turns", "system")),
        ("gemma", ("turns",)),
        ("gemma3", ("turns", "system")),
        ("cohere", ("turns", "system")),
        ("lfm2_v2", ("turns", "system", "tools")),
        ("phi3", ("turns", "system")),
        ("qwen2_5_vl", ("turns", "system")),
        ("qwen3_instruct_2507", ("turns", "system", "tools")),
        ("qwen3_vl", ("turns", "system", "tools")),
    ],
)
def test_turn_by_turn_finds_what_trl_marks(theirs, chats):
    """TRL's copy for training has the same text with `{% generation %}` marks, written by hand."""
    bare, training = _trl(theirs), _trl(f"{theirs}_training")
    assert not bare.marks_answers() and training.marks_answers()
    for chat in chats:
        conversation = CHATS[chat]
        wanted = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        text, spans = render_with_spans(bare, conversation, wanted, _MARKS)
        their_text, their_spans = training.render_marked(conversation.messages, conversation.tools)
        assert text == their_text
        assert _joined(spans) == _joined(their_spans)


def _joined(spans):
    """Spans with those that touch made one."""
    joined = []
    for begin, end in spans:
        if joined and joined[-1][1] == begin:
            begin = joined.pop()[0]
        joined.append((begin, end))
    return joined


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_a_turn_adds_to_what_was_there(name):
    """With more turns, no text before them changes: what is served is what was trained."""
    template = ChatTemplate(NAMED_TEMPLATES[name], name, TOKENS)
    texts = [template.render(SYSTEM.messages[:count]) for count in range(2, 6)]
    prompts = [
        template.render(SYSTEM.messages[:count], add_generation_prompt=True) for count in (2, 4)
    ]
    if name == "qwen":  # it takes the thought out of earlier answers
        texts.pop(1)
    assert all(b.startswith(a) for a, b in pairwise(texts))
    assert texts[-1].startswith(prompts[1])
    assert template.render(SYSTEM.messages[:3]).startswith(prompts[0])

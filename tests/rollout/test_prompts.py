"""A chat's prompt is what stood before the answers in training."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainwright.data.masks import Renderer
from trainwright.data.templates import find_template
from trainwright.data.templates_named import NAMED_TEMPLATES
from trainwright.data.tokenizers import byte_tokenizer, load_tokenizer
from trainwright.errors import UserError
from trainwright.rollout.prompts import chat_prompt

TURNS = [
    {"role": "user", "content": "Is </s> a word?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "naïve"},
]


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_prompts_are_those_of_training(name: str, tmp_path: Path) -> None:
    """Also for tokenizers to which "</s>" in a plain text is only text."""
    made = byte_tokenizer()
    made.chat_template = NAMED_TEMPLATES[name]
    made.save_pretrained(str(tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    renderer = Renderer(tmp_path, find_template(None, tmp_path))
    assert chat_prompt(tokenizer, TURNS) == renderer.prompt_ids(TURNS)
    # And plain texts are what they were.
    assert tokenizer("</s>")["input_ids"] == [256, *b"</s>"]


def test_templates_that_fail_or_are_not_there_are_told(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(UserError, match="no chat template"):
        chat_prompt(tokenizer, TURNS)
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(UserError, match="only one turn"):
        chat_prompt(tokenizer, TURNS)
    tokenizer.chat_template = "{{ messages[9].content }}"
    with pytest.raises(UserError, match="cannot be used"):
        chat_prompt(tokenizer, TURNS)
    with pytest.raises(UserError, match="return_tensors"):
        chat_prompt(tokenizer, TURNS, variables={"return_tensors": "pt"})

"""Requests are understood or refused by the field's name; nothing is ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trainwright.rollout.api_requests import (
    NOT_OFFERED,
    ApiError,
    ChatRequest,
    CompletionRequest,
    read_request,
)

TURNS = [{"role": "user", "content": "Hello"}]


def read(**change: Any) -> CompletionRequest:
    request = {"model": "base", "prompt": "Hello", **change}
    return read_request(CompletionRequest, json.dumps(request).encode())


def chat(**change: Any) -> ChatRequest:
    request = {"model": "base", "messages": TURNS, **change}
    return read_request(ChatRequest, json.dumps(request).encode())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "greater than or equal to 1"),
    ({"max_tokens": 1.5}, "valid integer"),
    ({"temperature": -1}, "greater than or equal to 0"),
    ({"temperature": float("nan")}, "finite number"),
    ({"temperature": "hot"}, "valid number"),
    ({"top_p": 1.5}, "less than or equal to 1"),
    ({"stop": ""}, "at least 1 character"),
    ({"stop": ["a", ""]}, "at least 1 character"),
    ({"prompt": []}, "at least 1"),
    ({"prompt": [1, "b"]}, "valid string.*; or: .*valid integer"),
    ({"model": None}, "valid string"),
    ({"stream_options": {"include_usage": True}}, "stream"),
    ({"frequency_penalty": 0.5}, "not offered"),
    ({"echo": True}, "not offered"),
    ({"logprobs": 0}, "not offered"),
    ({"best_of": 3}, "not offered"),
    ({"topp": 0.5}, "no parameter"),
    ({"max_completion_tokens": 5}, "no parameter"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=str)
def test_what_is_not_understood_is_refused_by_its_name(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ApiError, match=message) as refused:
        read(**change)
    error = refused.value.body["error"]
    assert (refused.value.status, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == next(iter(change))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more"),
        ({"prompt": "Hello"}, "prompt"),
    ],
)
def test_chats_that_cannot_be_are_refused(change: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(**change)
    assert refused.value.body["error"]["param"] == param


def test_fields_that_ask_for_nothing_are_taken() -> None:
    nothing = {name: values[0] for name, values in NOT_OFFERED.items() if values}
    assert chat(**nothing, user="me", metadata={"a": "b"}, n=None, stream=None) == chat()
    assert read(**dict.fromkeys(NOT_OFFERED)) == read()


def test_what_is_left_out_is_as_openai_has_it() -> None:
    plain = read().sampling(9)
    assert (plain.temperature, plain.top_p, plain.stop, plain.top_k) == (1.0, 1.0, (), 0)
    assert read().sampling(9).seed != read().sampling(9).seed
    assert (read().room, read(max_tokens=5).room) == (16, 5)
    assert (chat().room, chat(max_tokens=5, max_completion_tokens=4).room) == (None, 4)
    asked = read(temperature=0, top_p=0.5, top_k=3, min_p=0.1, stop="x", seed=7).sampling(9)
    assert (asked.temperature, asked.top_p, asked.top_k, asked.min_p) == (0, 0.5, 3, 0.1)
    assert (asked.stop, asked.seed, asked.max_new_tokens) == (("x",), 7, 9)


def test_prompts_are_texts_or_token_ids_one_or_several() -> None:
    assert read(prompt="a").prompts == ["a"]
    assert read(prompt=["a", "b"]).prompts == ["a", "b"]
    assert read(prompt=[1, 2]).prompts == [[1, 2]]
    assert read(prompt=[[1, 2], [3]]).prompts == [[1, 2], [3]]

"""Turns of a conversation, however a dataset writes them, in OpenAI's form and in order.

Known are OpenAI's `role`/`content` (with tool calls, reasoning content and blocks of content) and
ShareGPT's `from`/`value`. A conversation that makes no sense is refused with the number of its
turn, counted from 1 as people do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trainwright.data.examples import Conversation, Message, RowRefusedError

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
    **dict.fromkeys(("tool_response", "function_response"), "tool"),
}
_CALLS = ("function_call", "tool_call")  # roles whose whole content is a call, as JSON
_REASONING = ("reasoning_content", "reasoning", "thinking")
# Keys that say whether a turn is trained on: true or false, or a weight of 0 or 1.
_TRAIN = ("train", "weight", "loss_weight", "training")
_DELETE = "mend or delete the row"


def conversation_of(row: Mapping[str, Any], turns: object) -> Conversation:
    """The conversation of a row that does not say what its prompt is: the last answer completes it.

    `row` may have `tools` and a `system` message beside the turns. Raises RowRefusedError.
    """
    messages = with_system(row, messages_of(turns))
    check_order(messages)
    last = messages[-1]
    if last["role"] != "assistant":
        raise RowRefusedError(
            f"the last turn, {len(messages)}, is the {last['role']}'s: there is no answer to learn",
            "add the assistant's answer, or delete the turns after its last one",
        )
    return Conversation(messages, len(messages) - 1, tools_of(row.get("tools")))


def messages_of(turns: object, names: str = "turn") -> tuple[Message, ...]:
    """Turns in OpenAI's form; what is said of them is not yet checked for order.

    `names` is what a turn is called in a refusal ("turn", "turn of `chosen`").
    """
    if isinstance(turns, str):
        turns = from_json(turns, "the conversation")
    if isinstance(turns, Mapping):
        turns = [turns]
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        what = f"the conversation is {type_name(turns)}, not a list of turns"
        raise RowRefusedError(what, "name the column that holds the turns in `columns`")
    if not turns:
        raise RowRefusedError("the conversation has no turns", "delete the row")
    return tuple(_message(turn, f"{names} {number}") for number, turn in enumerate(turns, start=1))


def with_system(row: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """`messages` after the row's `system` message, where it has one and the turns have none."""
    system = row.get("system")
    if not system or (messages[:1] and messages[0]["role"] == "system"):
        return messages
    return ({"role": "system", "content": text_of(system, "`system`")}, *messages)


def check_order(messages: Sequence[Message]) -> None:
    """Refuse turns that cannot follow each other, and turns in which nothing is said."""
    before = ""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "system" and number > 1:
            what = f"turn {number} is a system message, which can only be the first"
            raise RowRefusedError(what, "move it to the beginning, or make it part of a user turn")
        if role == before and role != "tool":
            what = f"turns {number - 1} and {number} are both the {role}'s: a turn is missing"
            raise RowRefusedError(what, "add the missing turn, or join the two")
        if role == "tool" and before != "assistant" and before != "tool":
            what = f"turn {number} is a tool's answer, but no turn of the assistant comes before it"
            raise RowRefusedError(what, "add the assistant's call, or delete the turn")
        if role == "user" and before == "tool":
            what = f"turn {number} is the user's, but the assistant has not answered the tool yet"
            raise RowRefusedError(what, "add the assistant's answer to the tool's result")
        _check_content(message, number)
        before = role


def _check_content(message: Message, number: int) -> None:
    role = message["role"]
    if role == "tool" or message["content"].strip() or message.get("tool_calls"):
        return
    if role == "assistant" and message.get("train") is not False:
        what = f"turn {number}, the assistant's, is empty: there is nothing to learn in it"
        fix = 'write the missing answer, or mark the turn with "train": false'
        raise RowRefusedError(what, fix)
    if role == "user":
        raise RowRefusedError(f"turn {number}, the user's, is empty", "write the missing text")


def tools_of(value: object) -> tuple[Mapping[str, Any], ...]:
    """Functions as JSON schemas in OpenAI's form, from a list of them or from its JSON text."""
    if isinstance(value, str):
        value = from_json(value, "`tools`") if value.strip() else None
    if value is None:
        return ()
    tools = []
    for tool in value if isinstance(value, list | tuple) else [value]:
        if isinstance(tool, str):
            tool = from_json(tool, "`tools`")
        if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping):
            tool = {"type": "function", **_present(tool)}
        elif isinstance(tool, Mapping) and tool.get("name"):
            tool = {"type": "function", "function": _present(tool)}
        else:
            what = "`tools` holds something that is no function with a `name`"
            raise RowRefusedError(what, "write functions as JSON schemas, as OpenAI's API has them")
        tools.append(tool)
    return tuple(tools)


def text_of(value: object, name: str) -> str:
    """`value` as text; RowRefusedError if it is none. Null is empty text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        what = f"{name} is {type_name(value)}, not text"
        raise RowRefusedError(what, "mend or delete the row, or name another column in `columns`")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            what = f"{name} holds half a surrogate pair, {half}: no valid text"
            raise RowRefusedError(what, _DELETE) from None
    return value


def from_json(text: str, name: str) -> Any:
    """The value of JSON text; RowRefusedError where it is none."""
    try:
        return json.loads(text_of(text, name))
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "it is nested too deep")
        raise RowRefusedError(f"{name} is not valid JSON: {reason}", _DELETE) from None


def type_name(value: object) -> str:
    """What a value is, for people."""
    if isinstance(value, bool):
        return "true or false"
    names: dict[type, str] = {int: "a number", float: "a number", str: "text", dict: "an object"}
    names |= {list: "a list", tuple: "a list", type(None): "missing"}
    return names.get(type(value), f"of type {type(value).__name__}")


def _present(mapping: Mapping[str, Any]) -> dict[str, Any]:
    # Parquet gives every struct all fields of its column, null where a row has none.
    return {key: value for key, value in mapping.items() if value is not None}


def _message(turn: object, name: str) -> Message:
    if not isinstance(turn, Mapping):
        what = f"{name} is {type_name(turn)}, not an object with `role` and `content`"
        raise RowRefusedError(what, _DELETE)
    turn = _present(turn)
    role_key = "role" if "role" in turn else "from"
    given = turn.get(role_key)
    if given is None:
        what = f"{name} has no `role` (or `from`); it has {_keys(turn)}"
        raise RowRefusedError(what, "name the keys of a turn in `columns`: `role` and `content`")
    role = _ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        known = "system, user (human), assistant (gpt), function_call and tool (observation)"
        what = f"the {role_key} of {name} is {json.dumps(given)}; known are {known}"
        raise RowRefusedError(what, "rename the role")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, Mapping):
        content = [content]
    message: dict[str, Any] = {"role": role, "content": ""}
    calls: list[Any] = []
    if isinstance(given, str) and given.lower() in _CALLS:
        calls += _calls_in(content, name)
    elif isinstance(content, Sequence) and not isinstance(content, str):
        _read_blocks(content, message, calls, name)
    else:
        message["content"] = text_of(content, f"the content of {name}")
    _read_reasoning(turn, message, name)
    calls += _list(turn.get("tool_calls")) + _list(turn.get("function_call"))
    if calls:
        if role != "assistant":
            what = f"{name} calls tools, but is the {role}'s"
            raise RowRefusedError(what, "only the assistant calls tools: mend the role")
        message["tool_calls"] = [_call(call, name) for call in calls]
    for key in ("name", "tool_call_id"):
        if turn.get(key):
            message[key] = text_of(turn[key], f"`{key}` of {name}")
    if not _is_trained(turn, name):
        message["train"] = False
    return message


def _read_blocks(
    blocks: Sequence[Any], message: dict[str, Any], calls: list[Any], name: str
) -> None:
    """Content in blocks: `{"type": "text", "text": …}`, with `value` for any type's content."""
    texts, reasons = [], []
    for block in blocks:
        if isinstance(block, str):
            texts.append(text_of(block, f"the content of {name}"))
            continue
        kind = block.get("type") if isinstance(block, Mapping) else None
        value = block.get(kind, block.get("value", block.get("text"))) if kind else None
        if kind == "text":
            texts.append(text_of(value, f"the text of {name}"))
        elif kind in _REASONING:
            reasons.append(text_of(value, f"the reasoning of {name}"))
        elif kind in _CALLS:
            calls += _calls_in(value, name)
        else:
            what = (
                f"{name} holds {json.dumps(kind)}, which is no text"
                if kind
                else (f"a block of the content of {name} has no `type`")
            )
            raise RowRefusedError(what, "only text, reasoning and tool calls can be trained on")
    message["content"] = "".join(texts)
    if reasons:
        message["reasoning_content"] = "".join(reasons)


def _read_reasoning(turn: Mapping[str, Any], message: dict[str, Any], name: str) -> None:
    for key in _REASONING:
        if turn.get(key):
            message["reasoning_content"] = text_of(turn[key], f"`{key}` of {name}")
            return


def _calls_in(content: object, name: str) -> list[Any]:
    value = from_json(content, f"the call of {name}") if isinstance(content, str) else content
    return _list(value)


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _call(call: object, name: str) -> dict[str, Any]:
    """A call in OpenAI's form: its `arguments` an object, not JSON text, as templates want them."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    called = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(called, str) or not called:
        what = f"{name} calls a tool without saying its `name`"
        raise RowRefusedError(what, 'write calls as {"name": …, "arguments": {…}}')
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = from_json(arguments, f"`arguments` of {name}") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        what = f"`arguments` of {name} are {type_name(arguments)}, not an object"
        raise RowRefusedError(what, _DELETE)
    made: dict[str, Any] = {"type": "function"}
    if isinstance(call, Mapping) and call.get("id"):
        made["id"] = text_of(call["id"], f"the call's `id` in {name}")
    made["function"] = {"name": text_of(called, "a name"), "arguments": dict(arguments)}
    return made


def _is_trained(turn: Mapping[str, Any], name: str) -> bool:
    for key in _TRAIN:
        if key in turn:
            value = turn[key]
            if isinstance(value, bool | int | float) and value in (0, 1):
                return bool(value)
            what = f"`{key}` of {name} is {json.dumps(value, default=str)}"
            raise RowRefusedError(what, "a turn is trained on or not: write 1 or 0")
    return True


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in list(row)[:8]) or "no keys at all"

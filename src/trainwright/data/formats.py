"""A row of a dataset as an Example: the formats that people's files have, recognised by their keys.

| format | keys |
|---|---|
| text | text |
| prompt_completion | prompt, completion: both text, or both lists of turns |
| alpaca | instruction, input, output; system, history; or `instances` of input and output |
| sharegpt | conversations of from and value; system, tools |
| messages | messages of role and content (OpenAI); tools; or a row that is the bare list |
| preference | chosen, rejected; prompt, or turns, or instruction and input; margin |
| kto | label or kto_tag, with an answer in one of the ways above |
| oasst | an OpenAssistant message tree, of which the best rated path is taken |

Text stays text: a chat template is applied to turns only. An Alpaca row becomes turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from trainwright.data.examples import Conversation, Example, Message, RowRefusedError, Text
from trainwright.data.formats_chat import (
    check_order,
    conversation_of,
    messages_of,
    text_of,
    tools_of,
    type_name,
    with_system,
)
from trainwright.data.formats_pairs import pair_of

Format = Literal[
    "text", "prompt_completion", "alpaca", "sharegpt", "messages", "preference", "kto", "oasst"
]
FORMATS: tuple[Format, ...] = get_args(Format)

# The names by which `columns` may map, and other names under which files often have the same.
COLUMNS: dict[str, tuple[str, ...]] = {
    "text": (),
    "prompt": ("question", "query"),
    "completion": ("response", "answer"),
    "instruction": (),
    "input": (),
    "output": (),
    "system": ("system_prompt",),
    "history": (),
    "conversations": ("conversation",),
    "messages": (),
    "tools": ("functions",),
    "chosen": (),
    "rejected": (),
    "margin": (),
    "label": ("kto_tag",),
    # Keys of a turn rather than of a row.
    "role": (),
    "content": (),
}
_OF_TURNS = ("role", "content")


def recognise(row: object, columns: Mapping[str, str] | None = None) -> Format:
    """The format of a row; `columns` maps our column names to the file's.

    Raises RowRefusedError, naming the keys that there are, where it is none of those known.
    """
    if isinstance(row, list | tuple):
        return "messages"
    renamed = _renamed(row, columns or {})
    keys = {key for key, value in renamed.items() if value is not None}
    if {"chosen", "rejected"} <= keys:
        return "preference"
    # Labels of other kinds are classes, which have nothing to do with an answer's worth.
    judged = isinstance(renamed.get("label"), bool)
    if judged and keys & {"completion", "conversations", "messages", "output"}:
        return "kto"
    if {"message_tree_id", "prompt"} <= keys:
        return "oasst"
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "sharegpt"
    if "instruction" in keys and keys & {"output", "completion", "instances"}:
        return "alpaca"
    if {"prompt", "completion"} <= keys:
        return "prompt_completion"
    if "text" in keys:
        return "text"
    if isinstance(row, Mapping) and row and all(map(_is_registered, row.values())):
        what = "this is LLaMA-Factory's list of datasets, not a dataset"
        raise RowRefusedError(what, "name the files of the list as sources, with its `columns`")
    raise RowRefusedError(
        f"the format is not known: the row has {_keys_of(row)}",
        "say which columns hold what, for instance `columns: {prompt: YOURS, completion: YOURS}`; "
        f"the formats are {', '.join(FORMATS)}",
    )


def example_of(
    row: object,
    format: Format | None = None,
    columns: Mapping[str, str] | None = None,
    name: str = "",
) -> Example:
    """The example that a row holds.

    `format` None means: whatever the row's keys say. `columns` maps our column names (`COLUMNS`) to
    the file's. Raises RowRefusedError for a row that cannot be understood, or has nothing to learn.
    """
    format = format or recognise(row, columns)
    if isinstance(row, list | tuple):
        row = {"conversations" if format == "sharegpt" else "messages": row}
    return _READERS[format](_renamed(row, columns or {}), name)


def _renamed(row: object, columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with our names for its columns."""
    if not isinstance(row, Mapping):
        raise RowRefusedError(
            f"the row is {type_name(row)}, not an object with named columns",
            "write every row as a JSON object",
        )
    renamed = dict(row)
    for ours, others in COLUMNS.items():
        if ours in columns or ours in _OF_TURNS:
            continue
        theirs = next((other for other in others if renamed.get(other) is not None), None)
        if theirs is not None and renamed.get(ours) is None:
            renamed[ours] = renamed.pop(theirs)
    for ours, theirs in columns.items():
        if ours in _OF_TURNS:
            continue
        if theirs not in row:
            what = f"there is no column `{theirs}`; the row has {_keys_of(row)}"
            raise RowRefusedError(what, f"mend `columns.{ours}`")
        renamed[ours] = row[theirs]
        if theirs not in columns and theirs != ours:
            renamed.pop(theirs, None)
    return _with_turns_renamed(renamed, columns)


def _with_turns_renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    names = {columns[ours]: ours for ours in _OF_TURNS if ours in columns}
    if not names:
        return row

    def renamed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {names.get(key, key): each for key, each in value.items()}
        return [renamed(each) for each in value] if isinstance(value, list | tuple) else value

    turns = ("conversations", "messages", "prompt", "completion", "chosen", "rejected")
    return {key: renamed(value) if key in turns else value for key, value in row.items()}


def _text(row: Mapping[str, Any], name: str) -> Example:
    return Example(name, (Text("", _filled(row, "text")),))


def _prompt_completion(row: Mapping[str, Any], name: str) -> Example:
    return Example(name, (_answered(row),))


def _answered(row: Mapping[str, Any]) -> Text | Conversation:
    """A prompt and its completion: text where both are text, else turns."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None and not isinstance(completion, list | tuple):
        raise _missing(row, "prompt")
    if completion is None:
        raise _missing(row, "completion")
    system = row.get("system")
    if isinstance(prompt, str) and isinstance(completion, str) and not system:
        return Text(text_of(prompt, "`prompt`"), _filled(row, "completion"))
    context = _as_turns(prompt, "user", "turn of `prompt`") if prompt is not None else ()
    answer = _as_turns(completion, "assistant", "turn of `completion`")
    if answer[0]["role"] in ("user", "system"):
        context, answer = (), answer  # the whole conversation stands in `completion`
    messages = with_system(row, (*context, *answer))
    first = len(messages) - len(answer)
    check_order(messages)
    if messages[-1]["role"] != "assistant" or first == len(messages):
        what = f"`completion` ends with the {messages[-1]['role']}'s turn"
        raise RowRefusedError(what, "end it with the assistant's answer")
    if not context:
        first = len(messages) - 1
    return Conversation(messages, first, tools_of(row.get("tools")))


def _as_turns(value: object, role: str, names: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": role, "content": text_of(value, f"`{names}`")},)
    return messages_of(value, names)


def _alpaca(row: Mapping[str, Any], name: str) -> Example:
    return Example(name, (_alpaca_conversation(row),))


def _alpaca_conversation(row: Mapping[str, Any]) -> Conversation:
    if row.get("instances") is not None:
        row = {**row, **_only_instance(row["instances"])}
    if "output" not in row and "completion" in row:
        row = {**row, "output": row["completion"]}
    answer = {"role": "assistant", "content": _filled(row, "output")}
    messages = (*alpaca_prompt(row), answer)
    check_order(messages)
    return Conversation(messages, len(messages) - 1, tools_of(row.get("tools")))


def alpaca_prompt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns before the answer: system, history, then instruction and input, each on a line."""
    history = row.get("history") or []
    messages: list[Message] = []
    for number, turn in enumerate(history, start=1):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            what = f"entry {number} of `history` is not a pair of instruction and answer"
            raise RowRefusedError(what, "write `history` as [[instruction, answer], …]")
        asked, answered = (text_of(each, f"entry {number} of `history`") for each in turn)
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answered})
    lines = [text_of(row.get(key), f"`{key}`") for key in ("instruction", "input")]
    asked = "\n".join(line for line in lines if line)
    if not asked.strip():
        raise RowRefusedError("`instruction` is empty", "write the instruction, or delete the row")
    return with_system(row, (*messages, {"role": "user", "content": asked}))


def _only_instance(instances: object) -> Mapping[str, Any]:
    """`input` and `output` of a Self-Instruct task that has one instance."""
    if isinstance(instances, list | tuple) and len(instances) == 1:
        [instance] = instances
        if isinstance(instance, Mapping):
            return instance
    count = len(instances) if isinstance(instances, list | tuple) else type_name(instances)
    what = f"`instances` holds {count} examples, but a row is one"
    raise RowRefusedError(what, "write one row an instance: instruction, input and output")


def _conversation(column: str) -> Callable[[Mapping[str, Any], str], Example]:
    def read(row: Mapping[str, Any], name: str) -> Example:
        other = "messages" if column == "conversations" else "conversations"
        turns = row.get(column, row.get(other))
        if turns is None:
            raise _missing(row, column)
        return Example(name, (conversation_of(row, turns),))

    return read


def _preference(row: Mapping[str, Any], name: str) -> Example:
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            raise _missing(row, column)
    if row.get("instruction") is not None:
        row = {**row, "prompt": alpaca_prompt(row)}
    return Example(name, pair_of(row), margin=_margin(row))


def _margin(row: Mapping[str, Any]) -> float:
    # Scores that the answers were rated with are none: their unit is not that of a model's.
    margin = row.get("margin", 0.0)
    if margin is None:
        return 0.0
    if isinstance(margin, int | float) and not isinstance(margin, bool):
        return float(margin)
    what = f"`margin` is {type_name(margin)}, not a number"
    raise RowRefusedError(what, "mend or delete the row")


def _kto(row: Mapping[str, Any], name: str) -> Example:
    label = row.get("label")
    if label not in (True, False):  # 1 and 0 are equal to these
        what = "`label` is missing" if label is None else f"`label` is {label!r}"
        raise RowRefusedError(what, "write true for a desirable answer, false for another")
    turns = row.get("messages", row.get("conversations"))
    if turns is None and row.get("instruction") is None:
        return Example(name, (_answered(row),), label=bool(label))
    judged = _alpaca_conversation(row) if turns is None else conversation_of(row, turns)
    return Example(name, (judged,), label=bool(label))


def _oasst(row: Mapping[str, Any], name: str) -> Example:
    """The path of a tree on which every reply is the best rated one, up to the last answer."""
    messages: list[Message] = []
    node: Any = row["prompt"]
    while isinstance(node, Mapping):
        role = "assistant" if node.get("role") == "assistant" else "user"
        messages.append({"role": role, "content": text_of(node.get("text"), "`text`")})
        replies = [each for each in node.get("replies") or () if not each.get("deleted")]
        # `rank` is 0 for the best; messages that nobody compared have none.
        node = min(replies, key=lambda each: _rank(each), default=None)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise RowRefusedError("the tree holds no answer of the assistant", "delete the row")
    check_order(messages)
    return Example(name, (Conversation(tuple(messages), len(messages) - 1),))


def _rank(node: Mapping[str, Any]) -> float:
    rank = node.get("rank")
    return float("inf") if rank is None else rank


def _filled(row: Mapping[str, Any], column: str) -> str:
    if row.get(column) is None:
        raise _missing(row, column)
    text = text_of(row[column], f"`{column}`")
    if not text.strip():
        what = f"`{column}` is empty: there is nothing to learn"
        raise RowRefusedError(what, "write it, or delete the row")
    return text


def _missing(row: Mapping[str, Any], column: str) -> RowRefusedError:
    return RowRefusedError(
        f"there is no `{column}`; the row has {_keys_of(row)}",
        f"add it, or say which column it is: `columns: {{{column}: YOURS}}`",
    )


def _is_registered(value: object) -> bool:
    places = {"file_name", "hf_hub_url", "ms_hub_url", "script_url"}
    return isinstance(value, Mapping) and bool(places & value.keys())


def _keys_of(row: object) -> str:
    keys = list(row) if isinstance(row, Mapping) else []
    shown = ", ".join(f"`{key}`" for key in keys[:8]) + (", …" if len(keys) > 8 else "")
    return shown or "no keys at all"


_READERS: dict[Format, Callable[[Mapping[str, Any], str], Example]] = {
    "text": _text,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _conversation("conversations"),
    "messages": _conversation("messages"),
    "preference": _preference,
    "kto": _kto,
    "oasst": _oasst,
}

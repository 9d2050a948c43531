"""Rows of every format beside the sequences that they mean, written out by hand."""

from __future__ import annotations

import json

from trainwright.data.examples import Conversation, Text


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def conversation(*messages, first, tools=()):
    return Conversation(messages, first, tuple(tools))


CAT = {"name": "cat", "description": "Shows a file", "parameters": {"type": "object"}}
CAT_TOOL = {"type": "function", "function": CAT}

# format, row, its sequences
ROWS = {
    "text": ("text", {"text": "Once.", "source": "x"}, [Text("", "Once.")]),
    "text prompt and completion": (
        "prompt_completion",
        {"prompt": "2+2=", "completion": "4"},
        [Text("2+2=", "4")],
    ),
    "question and answer": (
        "prompt_completion",
        {"question": "2+2?", "answer": "4"},
        [Text("2+2?", "4")],
    ),
    "turns as prompt and completion": (
        "prompt_completion",
        {
            "prompt": [user("a"), assistant("b"), user("c")],
            "completion": [assistant("d")],
        },
        [conversation(user("a"), assistant("b"), user("c"), assistant("d"), first=3)],
    ),
    "prompt with a system column": (
        "prompt_completion",
        {"system": "S", "prompt": "a", "completion": "b"},
        [conversation(system("S"), user("a"), assistant("b"), first=2)],
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "Add.", "input": "2, 3", "output": "5"},
        [conversation(user("Add.\n2, 3"), assistant("5"), first=1)],
    ),
    "alpaca without input": (
        "alpaca",
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        [conversation(user("Say hi."), assistant("hi"), first=1)],
    ),
    "alpaca with history": (
        "alpaca",
        {
            "instruction": "And now?",
            "input": None,
            "output": "six",
            "system": "Count.",
            "history": [["Begin.", "four"], ["Next.", "five"]],
        },
        [
            conversation(
                system("Count."),
                user("Begin."),
                assistant("four"),
                user("Next."),
                assistant("five"),
                user("And now?"),
                assistant("six"),
                first=6,
            )
        ],
    ),
    "self-instruct": (
        "alpaca",
        {"instruction": "Add.", "instances": [{"input": "1, 1", "output": "2"}], "id": 7},
        [conversation(user("Add.\n1, 1"), assistant("2"), first=1)],
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
                {"from": "human", "value": "c"},
                {"from": "gpt", "value": "d"},
            ]
        },
        [conversation(system("S"), user("a"), assistant("b"), user("c"), assistant("d"), first=4)],
    ),
    "sharegpt with tools": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "show a.txt"},
                {"from": "function_call", "value": '{"name": "cat", "arguments": {"file": "a"}}'},
                {"from": "observation", "value": "AAA"},
                {"from": "gpt", "value": "It says AAA."},
            ],
            "tools": json.dumps([CAT]),
        },
        [
            conversation(
                user("show a.txt"),
                assistant("", tool_calls=[call("cat", file="a")]),
                {"role": "tool", "content": "AAA"},
                assistant("It says AAA."),
                first=3,
                tools=[CAT_TOOL],
            )
        ],
    ),
    "messages": (
        "messages",
        {"messages": [system("S"), user("a", name="Ann"), assistant("b")]},
        [conversation(system("S"), user("a", name="Ann"), assistant("b"), first=2)],
    ),
    "a bare list": (
        "messages",
        [user("a"), assistant("b")],
        [conversation(user("a"), assistant("b"), first=1)],
    ),
    "messages with calls and reasoning": (
        "messages",
        {
            "messages": [
                user("show a"),
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": "I need the file.",
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "cat", "arguments": '{"file": "a"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "AAA"},
                assistant("AAA"),
            ],
            "tools": [CAT_TOOL],
        },
        [
            conversation(
                user("show a"),
                assistant(
                    "",
                    reasoning_content="I need the file.",
                    tool_calls=[
                        {
                            "type": "function",
                            "id": "c1",
                            "function": {"name": "cat", "arguments": {"file": "a"}},
                        }
                    ],
                ),
                {"role": "tool", "content": "AAA", "tool_call_id": "c1"},
                assistant("AAA"),
                first=3,
                tools=[CAT_TOOL],
            )
        ],
    ),
    "content in blocks, with weights": (
        "messages",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                    "loss_weight": 0.0,
                },
                {"role": "assistant", "content": "c", "weight": 0},
                user("d"),
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "value": "hm"},
                        {"type": "tool_call", "value": '{"name": "cat", "arguments": {}}'},
                    ],
                    "loss_weight": 1.0,
                },
            ]
        },
        [
            conversation(
                user("ab", train=False),
                assistant("c", train=False),
                user("d"),
                assistant("", reasoning_content="hm", tool_calls=[call("cat")]),
                first=3,
            )
        ],
    ),
    "preference of texts": (
        "preference",
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        [Text("2+2=", "4"), Text("2+2=", "5")],
    ),
    "preference of texts that begin alike": (
        "preference",
        {"chosen": "Is snow white? It is.", "rejected": "Is snow white? Its not."},
        [Text("Is snow white?", " It is."), Text("Is snow white?", " Its not.")],
    ),
    "preference of conversations": (
        "preference",
        {
            "chosen": [user("a"), assistant("b"), user("c"), assistant("good")],
            "rejected": [user("a"), assistant("b"), user("c"), assistant("bad")],
        },
        [
            conversation(user("a"), assistant("b"), user("c"), assistant("good"), first=3),
            conversation(user("a"), assistant("b"), user("c"), assistant("bad"), first=3),
        ],
    ),
    "preference with the prompt repeated": (
        "preference",
        {
            "prompt": "a",
            "chosen": [user("a"), assistant("good")],
            "rejected": [user("a"), assistant("bad")],
        },
        [
            conversation(user("a"), assistant("good"), first=1),
            conversation(user("a"), assistant("bad"), first=1),
        ],
    ),
    "preference with turns as prompt": (
        "preference",
        {
            "prompt": [system("S"), user("a")],
            "chosen": [assistant("good")],
            "rejected": [assistant("bad")],
        },
        [
            conversation(system("S"), user("a"), assistant("good"), first=2),
            conversation(system("S"), user("a"), assistant("bad"), first=2),
        ],
    ),
    "hh-rlhf": (
        "preference",
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad",
        },
        [
            conversation(user("a"), assistant("b"), user("c"), assistant("good"), first=3),
            conversation(user("a"), assistant("b"), user("c"), assistant("bad"), first=3),
        ],
    ),
    "llama-factory's ranking": (
        "preference",
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        [
            conversation(user("a"), assistant("good"), first=1),
            conversation(user("a"), assistant("bad"), first=1),
        ],
    ),
    "alpaca with preferences": (
        "preference",
        {
            "instruction": "Add.",
            "input": "1, 2",
            "output": "3",
            "chosen": "It is 3.",
            "rejected": "3, silly.",
        },
        [
            conversation(user("Add.\n1, 2"), assistant("It is 3."), first=1),
            conversation(user("Add.\n1, 2"), assistant("3, silly."), first=1),
        ],
    ),
    "the same answer twice": (
        "preference",
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]},
        [conversation(user("a"), assistant("b"), first=1)] * 2,
    ),
    "kto of texts": (
        "kto",
        {"prompt": "2+2=", "completion": "5", "label": False},
        [Text("2+2=", "5")],
    ),
    "kto of messages": (
        "kto",
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")], "label": True},
        [conversation(user("a"), assistant("b"), user("c"), assistant("d"), first=3)],
    ),
    "kto of sharegpt": (
        "kto",
        {
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            "kto_tag": True,
        },
        [conversation(user("a"), assistant("b"), first=1)],
    ),
    "oasst": (
        "oasst",
        {
            "message_tree_id": "t",
            "prompt": {
                "role": "prompter",
                "text": "a",
                "replies": [
                    {"role": "assistant", "text": "gone", "rank": 0, "deleted": True},
                    {"role": "assistant", "text": "worse", "rank": 1, "replies": []},
                    {
                        "role": "assistant",
                        "text": "better",
                        "rank": 0,
                        "replies": [{"role": "prompter", "text": "thanks", "replies": []}],
                    },
                ],
            },
        },
        [conversation(user("a"), assistant("better"), first=1)],
    ),
}

"""Rows of every format against what they mean, written out by hand; refusals and their words."""

from __future__ import annotations

import pytest

from tests.data.expected_formats import ROWS, assistant, call, conversation, user
from trainwright.data.examples import Example, RowRefusedError, Text
from trainwright.data.formats import FORMATS, example_of, recognise
from trainwright.data.formats_rows import read_rows


@pytest.mark.parametrize("case", ROWS)
def test_rows_mean_what_they_say(case):
    format, row, sequences = ROWS[case]
    assert recognise(row) == format
    example = example_of(row, name="f:1")
    assert example.sequences == tuple(sequences)
    assert example.name == "f:1"
    assert example_of(row, format).sequences == tuple(sequences)


def test_every_format_is_tried():
    assert {format for format, _, _ in ROWS.values()} == set(FORMATS)


def test_labels_and_margins():
    assert example_of(ROWS["kto of texts"][1]).label is False
    assert example_of(ROWS["kto of messages"][1]).label is True
    assert example_of(ROWS["text"][1]).label is None
    # Numbers may be classes: only true and false say by themselves that an answer is judged.
    judged = {**ROWS["kto of texts"][1], "label": 1}
    assert recognise(judged) == "prompt_completion"
    assert example_of(judged, "kto").label is True
    with pytest.raises(RowRefusedError, match="`label` is 'good'"):
        example_of({**judged, "label": "good"}, "kto")
    pair = ROWS["preference of texts"][1]
    assert example_of(pair).margin == 0.0
    assert example_of({**pair, "margin": 2}).margin == 2.0
    assert example_of({**pair, "score_chosen": 8.5, "score_rejected": 3.0}).margin == 0.0


def test_columns_map_names():
    row = {"q": "2+2?", "a": "4", "text": "something else"}
    columns = {"prompt": "q", "completion": "a"}
    assert recognise(row, columns) == "prompt_completion"
    assert example_of(row, columns=columns) == Example("", (Text("2+2?", "4"),))
    # Our names may be the file's for other things.
    swapped = {"prompt": "the answer", "completion": "the question"}
    columns = {"prompt": "completion", "completion": "prompt"}
    assert example_of(swapped, columns=columns).sequences == (Text("the question", "the answer"),)
    # A column that has another name now is not the one that it was.
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert recognise(pair) == "preference"
    assert recognise(pair, {"completion": "chosen"}) == "prompt_completion"
    turns = {"dialog": [{"who": "human", "said": "a"}, {"who": "gpt", "said": "b"}]}
    columns = {"messages": "dialog", "role": "who", "content": "said"}
    assert example_of(turns, columns=columns).sequences == (
        conversation(user("a"), assistant("b"), first=1),
    )


def turns(*roles):
    return {"messages": [{"role": role, "content": f"text {i}"} for i, role in enumerate(roles)]}


REFUSED = {
    "an empty answer": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]},
        "turn 2, the assistant's, is empty",
    ),
    "an empty question": (
        {"messages": [user(""), assistant("b")]},
        "turn 1, the user's, is empty",
    ),
    "no answer at the end": (turns("user", "assistant", "user"), "the last turn, 3, is the user's"),
    "a turn missing": (turns("user", "user", "assistant"), "turns 1 and 2 are both the user's"),
    "two answers": (turns("user", "assistant", "assistant"), "turns 2 and 3 are both the assis"),
    "a late system message": (turns("user", "assistant", "system"), "turn 3 is a system message"),
    "a tool nobody called": (turns("user", "tool", "assistant"), "turn 2 is a tool's answer"),
    "a tool not answered": (
        turns("user", "assistant", "tool", "user", "assistant"),
        "turn 4 is the user's, but the assistant has not answered the tool",
    ),
    "an unknown role": (turns("user", "wizard"), 'the role of turn 2 is "wizard"'),
    "no role": ({"messages": [{"content": "a"}]}, "turn 1 has no `role`"),
    "no turns": ({"messages": []}, "the conversation has no turns"),
    "turns that are text": ({"messages": "hello"}, "the conversation is not valid JSON"),
    "a turn that is text": ({"messages": ["hello"]}, "turn 1 is text, not an object"),
    "content that is a number": ({"messages": [user(5), assistant("b")]}, "is a number, not text"),
    "an image": (
        {"messages": [user([{"type": "image_url", "image_url": "x"}]), assistant("b")]},
        'turn 1 holds "image_url", which is no text',
    ),
    "half a weight": (
        {"messages": [user("a"), assistant("b", weight=0.5)]},
        "`weight` of turn 2 is 0.5",
    ),
    "a call that is no JSON": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": "cat(a)"},
            ]
        },
        "the call of turn 2 is not valid JSON",
    ),
    "a call without a name": (
        {"messages": [user("a"), {"role": "assistant", "tool_calls": [{"arguments": {}}]}]},
        "turn 2 calls a tool without saying its `name`",
    ),
    "a call with a list": (
        {"messages": [user("a"), assistant("", tool_calls=[{"name": "f", "arguments": [1]}])]},
        "`arguments` of turn 2 are a list, not an object",
    ),
    "a user who calls": (
        {"messages": [user("a", tool_calls=[call("f")]), assistant("b")]},
        "turn 1 calls tools, but is the user's",
    ),
    "tools that are no JSON": (
        {"messages": [user("a"), assistant("b")], "tools": "cat"},
        "`tools` is not valid JSON",
    ),
    "tools without names": (
        {"messages": [user("a"), assistant("b")], "tools": [{"parameters": {}}]},
        "`tools` holds something that is no function",
    ),
    "an empty completion": ({"prompt": "a", "completion": "\n"}, "`completion` is empty"),
    "half a surrogate pair": ({"prompt": "a", "completion": "\ud83d"}, "half a surrogate pair"),
    "an empty instruction": ({"instruction": " ", "output": "b"}, "`instruction` is empty"),
    "several instances": (
        {"instruction": "a", "instances": [{"output": "b"}, {"output": "c"}]},
        "`instances` holds 2 examples",
    ),
    "a broken history": (
        {"instruction": "a", "output": "b", "history": [["x"]]},
        "entry 1 of `history` is not a pair",
    ),
    "nothing in common": ({"chosen": "yes", "rejected": "no"}, "there is no `prompt`"),
    "other questions": (
        {
            "chosen": [user("a"), assistant("b")],
            "rejected": [user("x"), assistant("b")],
        },
        "chosen and rejected differ in turn 1, before the assistant's answer",
    ),
    "only a beginning": (
        {
            "chosen": [user("a"), assistant("b")],
            "rejected": [user("a"), assistant("b"), user("c"), assistant("d")],
        },
        "one of chosen and rejected is only the beginning of the other",
    ),
    "no prompt in common": (
        {"chosen": [assistant("b")], "rejected": [assistant("c")]},
        "no prompt in common",
    ),
    "rejected ends with a question": (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b"), user("c")]},
        "`rejected` does not end with the assistant's answer",
    ),
    "a margin that is text": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "wide"},
        "`margin` is text, not a number",
    ),
    "keys nobody knows": ({"foo": 1, "bar": 2}, "the row has `foo`, `bar`"),
    "no row": (7, "the row is a number"),
    "a registry": (
        {"alpaca": {"file_name": "alpaca.json"}, "c4": {"hf_hub_url": "allenai/c4"}},
        "LLaMA-Factory's list of datasets",
    ),
    "a tree without answers": (
        {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "a", "replies": []}},
        "the tree holds no answer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    row, words = REFUSED[case]
    with pytest.raises(RowRefusedError) as refused:
        example_of(row)
    assert words in refused.value.what
    assert refused.value.fix


def test_a_missing_column_is_named():
    with pytest.raises(
        RowRefusedError, match=r"no column `reply`; the row has `q`, `a`"
    ) as refused:
        example_of({"q": "a", "a": "b"}, columns={"prompt": "q", "completion": "reply"})
    assert "columns.completion" in refused.value.fix
    with pytest.raises(RowRefusedError, match="there is no `output`"):
        example_of({"instruction": "a"}, "alpaca")


# What the files hold, counted by hand (grep and jq): rows that are understood, rows refused.
REAL = {
    "instruct/axolotl_alpaca.json": ("alpaca", 2, []),
    "instruct/axolotl_conversation.json": ("sharegpt", 1, []),
    "instruct/axolotl_conversation_missingturns.json": (
        "sharegpt",
        0,
        ["axolotl_conversation_missingturns.json: turn 2, the assistant's, is empty"],
    ),
    "instruct/fastchat_dummy_conversation.json": ("sharegpt", 500, []),
    "instruct/lf_alpaca_en_demo.json": ("alpaca", 999, []),
    "instruct/lf_glaive_toolcall_en_demo.json": ("sharegpt", 300, []),
    "instruct/lf_reason_tool_use_demo_50.jsonl": ("messages", 50, []),
    "instruct/lf_v1_sft_demo.jsonl": ("messages", 500, []),
    "instruct/oasst_en_100_tree.jsonl": ("oasst", 100, []),
    "instruct/rasbt_instruction_data.json": ("alpaca", 1100, []),
    "instruct/self_instruct_seed_tasks.jsonl": ("alpaca", 175, []),
    "preference/hh_rlhf_harmless_base_test.jsonl.gz": (
        "preference",
        2299,
        ["hh_rlhf_harmless_base_test.jsonl.gz:87: `chosen`: turn 4, the assistant's, is empty"],
    ),
    "preference/lf_dpo_en_demo.json": ("preference", 300, []),
    "preference/lf_kto_en_demo.json": ("kto", 300, []),
    "preference/rasbt_instruction_with_preference.json": ("preference", 1100, []),
}


@pytest.mark.shared
@pytest.mark.parametrize("file", REAL)
def test_real_files(shared, file):
    format, understood, refusals = REAL[file]
    examples, refused = 0, []
    for name, row in read_rows(shared / file):
        assert recognise(row) == format
        try:
            example = example_of(row, name=name)
        except RowRefusedError as error:
            refused.append(f"{name}: {error.what}")
            continue
        examples += 1
        assert len(example.sequences) == (2 if format == "preference" else 1)
    assert examples == understood
    for words in refusals:
        assert any(words in each for each in refused)
    assert bool(refused) == bool(refusals)


@pytest.mark.shared
def test_the_registry_is_refused(shared):
    [(_, row)] = read_rows(shared / "instruct" / "lf_dataset_info.json")
    with pytest.raises(RowRefusedError, match="LLaMA-Factory's list of datasets"):
        recognise(row)

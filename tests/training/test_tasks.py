"""Tasks with right answers: scores beside transformers', every layout alike, bad rows by name."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import assemble_here, small_recipe
from tests.training.test_evaluation import StepOf
from tests.training.test_exactness import EVEN, LAYOUTS
from tests.workers import run_on
from trainwright.errors import UserError
from trainwright.recipe.evaluation import Task
from trainwright.report.history import read_history
from trainwright.report.html import render
from trainwright.training.metrics import read_metrics
from trainwright.training.questions import read_questions
from trainwright.training.tasks import extracted, normal

CHOICES = [
    {
        "question": f"is {n} a",
        "choices": ["ééé", "mat", "a tree", " b"][: 2 + n % 3],
        "answer": n % 2 if n % 3 else "ab"[n % 2],
    }
    for n in range(11)
]
SUMS = [{"prompt": f"{n}+{n}=" + "." * (n % 4), "answer": [2 * n, f" {n}X"]} for n in range(7)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(folder: str, parallel: dict) -> tuple[list[dict], list[list[dict]]]:
    """The records of two tasks, and what came of each row, of untrained weights on this layout."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    choices, sums = write(path / "choices.jsonl", CHOICES), write(path / "sums.jsonl", SUMS)
    recipe = small_recipe(
        path,
        model={"config": {**EVEN, "num_hidden_layers": 4}},
        parallel={"micro_batch": 2, **parallel},
        evaluation={
            "every": 1000,
            "tasks": [
                str(choices),
                {"path": str(sums), "max_new_tokens": 6, "extract": "^.{3}", "name": "adding"},
            ],
        },
    )
    assembled = assemble_here(recipe)
    assembled.trainer.hooks[-2].after_step(20, StepOf(), 0.0, True)
    assembled.store.close()
    if assembled.writer is None:
        return [], []
    assembled.writer.close()
    records = [r for r in read_metrics(path / "run") if r["kind"] == "task"]
    files = [path / "run" / "tasks" / f"{r['name']}-step-00000020.jsonl" for r in records]
    return records, [[json.loads(line) for line in file.open()] for file in files]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, list[dict], list[list[dict]]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, *run_on(1, asked, str(folder), {"workers": 1})[0]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Any:
    """The same weights in transformers' own model."""
    from transformers import LlamaForCausalLM

    from trainwright.models.weights import save_model

    folder = tmp_path_factory.mktemp("theirs")
    recipe = small_recipe(folder, model={"config": {**EVEN, "num_hidden_layers": 4}})
    assembled = assemble_here(recipe)
    assembled.store.close()
    save_model(assembled.trainer.step.spread.model, folder / "saved")
    return LlamaForCausalLM.from_pretrained(folder / "saved").eval()


def test_choices_are_scored_as_transformers_scores_them(alone, theirs) -> None:
    folder, records, details = alone
    right, right_norm = [], []
    for n, (row, found) in enumerate(zip(CHOICES, details[0], strict=True)):
        log_probs = []
        for choice in row["choices"]:
            apart = "" if choice.startswith(" ") else " "
            context, answer = row["question"].encode(), (apart + choice).encode()
            ids = torch.tensor([[256, *context, *answer]])
            with torch.no_grad():
                table = theirs(ids).logits[0].double().log_softmax(-1)
            first = 1 + len(context)
            places = range(first - 1, first - 1 + len(answer))
            log_probs.append(sum(table[p, ids[0, p + 1]].item() for p in places))
        assert found["log_probs"] == pytest.approx(log_probs, abs=1e-4)
        assert found["row"].startswith("choices.jsonl:")
        by_byte = [lp / len(c.encode()) for lp, c in zip(log_probs, row["choices"], strict=True)]
        right.append(float(log_probs.index(max(log_probs)) == n % 2))
        right_norm.append(float(by_byte.index(max(by_byte)) == n % 2))
        assert (found["acc"], found["acc_norm"]) == (right[-1], right_norm[-1])
    [record] = [r for r in records if r["name"] == "choices"]
    assert (record["task"], record["rows"], record["step"]) == ("multiple_choice", 11, 20)
    for name, values in (("acc", right), ("acc_norm", right_norm)):
        assert record[name] == pytest.approx(statistics.mean(values))
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert record[f"{name}_stderr"] == pytest.approx(error)
    assert 0 < record["acc"] < 1 and 0 < record["acc_norm"] < 1  # or nothing would have been seen
    page = render(read_history(folder / "run"))
    assert "<h2>Tasks</h2>" in page and "adding" in page


def test_answers_are_those_that_transformers_generates(alone, theirs) -> None:
    _, records, details = alone
    for row, found in zip(SUMS, details[1], strict=True):
        ids = torch.tensor([[256, *row["prompt"].encode()]])
        made = theirs.generate(
            ids, do_sample=False, max_new_tokens=6, eos_token_id=257, pad_token_id=258
        )[0, ids.shape[1] :].tolist()
        text = bytes(token for token in made if token < 256).decode(errors="replace")
        assert found["text"] == text
        assert found["answer"] == (text[:3] if len(text) > 2 and "\n" not in text[:3] else "")
    assert records[1]["exact_match"] == 0.0 and records[1]["name"] == "adding"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: " ".join(list(layout)[-2:]))
def test_every_layout_gives_the_same_answers(layout, alone, tmp_path) -> None:
    _, expected, details = alone
    records, found = run_on(2, asked, str(tmp_path), layout)[0]
    for record, other in zip(records, expected, strict=True):
        assert record.pop("time") and {**other, "time": None} == {**record, "time": None}
    for mine, other in zip(found[0], details[0], strict=True):
        assert mine.pop("log_probs") == pytest.approx(other["log_probs"], abs=1e-4)
        assert mine == {key: value for key, value in other.items() if key != "log_probs"}
    assert found[1] == details[1]


def test_a_right_answer_is_one_of_those_accepted_in_the_form_asked_for() -> None:
    task = Task(path=Path("q.jsonl"), extract=r"#### (-?\d+)")
    assert extracted(task, "2 #### 3, no: #### -14 apples") == "-14"
    assert extracted(task, "#### none") == ""
    assert extracted(Task(path=Path("q.jsonl"), extract="[a-z]+"), "1 two three 4") == "three"
    plain, small = Task(path=Path("q")), Task(path=Path("q"), ignore_case=True)
    assert normal(plain, " Paris\n") == "Paris" != normal(small, " Paris\n") == "paris"


def test_rows_that_are_no_questions_are_refused_all_at_once(tmp_path) -> None:
    good = {"prompt": "a", "choices": ["x", "y"], "answer": 1}
    bad = [
        {**good, "answer": 2},
        {**good, "answer": "C"},
        {**good, "answer": True},
        {**good, "choices": ["x"]},
        {**good, "choices": ["x", " "]},
        {"choices": ["x", "y"], "answer": 0},
        {"messages": [{"role": "assistant", "content": "y"}], "choices": ["x", "y"], "answer": 0},
        {"messages": "hello", "choices": ["x", "y"], "answer": 0},
    ]
    file = write(tmp_path / "q.jsonl", [good, *bad, {**good, "answer": "b"}])
    with pytest.raises(UserError) as refused:
        read_questions(Task(path=file))
    mistakes = refused.value.mistakes
    assert [m.where for m in mistakes] == [f"q.jsonl:{n}" for n in range(2, 2 + len(bad))]
    assert all(m.fix for m in mistakes) and "A to B" in mistakes[0].fix
    open_rows = [{"prompt": "a", "answer": 3.5}, {"prompt": "a"}, {"prompt": "", "answer": "b"}, 1]
    with pytest.raises(UserError) as refused:
        read_questions(Task(path=write(tmp_path / "o.jsonl", open_rows), kind="exact_match"))
    assert [m.where for m in refused.value.mistakes] == [f"o.jsonl:{n}" for n in (2, 3, 4)]
    assert len(read_questions(Task(path=file, rows=1))[1]) == 1
    many = write(tmp_path / "many.jsonl", [{"prompt": "a"}] * 50)
    with pytest.raises(UserError, match=r"30 more of 50 rows"):
        read_questions(Task(path=many))


def test_tasks_are_checked_before_any_training(tmp_path) -> None:
    long = write(tmp_path / "long.jsonl", [{"prompt": "word " * 20, "answer": "b"}])
    chat = write(tmp_path / "chat.jsonl", [
        {"messages": [{"role": "user", "content": "hi"}], "answer": "b"}
    ])  # fmt: skip
    tasks = [str(long), str(chat), str(tmp_path / "missing.jsonl")]
    with pytest.raises(UserError) as refused:
        assemble_here(small_recipe(tmp_path, evaluation={"tasks": tasks}))
    text = str(refused.value)
    assert "101 tokens" in text or "102 tokens" in text
    assert "chat template" in text and "missing.jsonl" in text
    assert len(refused.value.mistakes) == 3


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ({"path": "a.jsonl", "extract": "("}, "extract"),
        ({"path": "a.jsonl", "kind": "multiple_choice", "stop": ["x"]}, "stop"),
        ({"path": "….jsonl"}, "name"),
    ],
)
def test_a_task_that_cannot_be_is_refused_in_the_recipe(task, key, tmp_path) -> None:
    with pytest.raises(ValueError, match=key):
        small_recipe(tmp_path, evaluation={"tasks": [task]})
    with pytest.raises(ValueError, match="two tasks"):
        small_recipe(tmp_path, evaluation={"tasks": ["a.jsonl", "b/a.jsonl"]})


def test_an_answer_to_a_chat_ends_with_the_turn(tmp_path) -> None:
    """Trained on turns: answers come through the template, and end where it ends them."""
    from tests.training.tuning import recipe_of, train
    from trainwright.data.tokenizers import byte_tokenizer
    from trainwright.models.families import decoder_config, new_hf_config
    from trainwright.models.weights import initialise, new_model, save_model

    base = tmp_path / "base"
    base.mkdir()
    shape = {**EVEN, "max_position_embeddings": 128}
    model = new_model(decoder_config(new_hf_config("llama", shape, 260)))
    initialise(model, 1)
    save_model(model, base)
    byte_tokenizer().save_pretrained(str(base))
    turns = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in (("red", "Stop"), ("green", "Go"))
    ]
    chats = write(tmp_path / "chats.jsonl", turns * 6)
    task = write(tmp_path / "lights.jsonl", [
        {"prompt": "red", "answer": "stop"},
        {"prompt": "green", "answer": ["go", "walk"]},
        {"prompt": "green", "answer": "stop"},
        {"messages": [{"role": "user", "content": "red"}], "answer": "STOP"},
    ])  # fmt: skip
    run = train(recipe_of(
        tmp_path, base, chats,
        data={"validation": 0},
        training={"steps": 60},
        evaluation={"tasks": [{"path": str(task), "chat": True, "ignore_case": True}]},
    ))  # fmt: skip
    [record] = [r for r in read_metrics(run.path) if r["kind"] == "task"]
    assert record["step"] == 60  # at the end only: no more was asked for
    rows = [json.loads(line) for line in run.answers("lights", 60).open()]
    assert [row["text"] for row in rows] == ["Stop", "Go", "Go", "Stop"]
    assert [row["exact_match"] for row in rows] == [True, True, False, True]
    assert record["exact_match"] == 0.75


def test_answers_end_where_the_template_ends_a_turn(tmp_path) -> None:
    from trainwright.data.templates_named import NAMED_TEMPLATES
    from trainwright.data.tokenizers import byte_tokenizer
    from trainwright.models.families import decoder_config, new_hf_config
    from trainwright.models.weights import new_model
    from trainwright.parallel.spread import whole_model
    from trainwright.training.tasks import open_renderer, stop_at_turn_end

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = NAMED_TEMPLATES["chatml"]
    tokenizer.save_pretrained(str(tmp_path))
    model = new_model(decoder_config(new_hf_config("llama", EVEN, 260)))
    before, end = model.stop_token_ids, tokenizer.convert_tokens_to_ids("<|im_end|>")
    for _ in range(2):
        stop_at_turn_end(whole_model(model, torch.device("cpu")), open_renderer(tmp_path))
    assert model.stop_token_ids == (*before, end)

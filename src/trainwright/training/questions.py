"""Questions with right answers: rows of a task's file, understood, checked, made into tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from trainwright.data.examples import Message, RowRefusedError
from trainwright.data.formats_rows import read_rows
from trainwright.data.masks import Renderer
from trainwright.errors import Mistake, UserError
from trainwright.recipe.evaluation import Task, TaskKind

_SHOWN = 20  # bad rows that are named; the others are counted

Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class Question:
    """A row of a task.

    `name` says where it stands ("sums.jsonl:12"). `texts` are the answers that count, or the
    choices, of which number `right` is the answer.
    """

    name: str
    prompt: Prompt
    texts: tuple[str, ...]
    right: int | None = None


@dataclass(frozen=True)
class Encoded:
    """A question as tokens: its prompt, and the prompt with each of its choices.

    Of a choice's tokens the first `before` are the prompt's.
    """

    prompt: tuple[int, ...]
    choices: tuple[tuple[tuple[int, ...], int], ...] = ()


def read_questions(task: Task) -> tuple[TaskKind, list[Question]]:
    """The questions of a task, and its kind, which the first row tells if the recipe does not.

    Raises UserError with every row that is none, and for a file that cannot be read.
    """
    if not task.path.is_file():
        what = f"there is no file {task.path}"
        raise UserError(Mistake(what, "name one with a row for each question", where=task.title))
    rows = list(islice(read_rows(task.path), task.rows))
    if not rows:
        raise UserError(Mistake("holds no rows", "give a file that does", where=str(task.path)))
    kind = task.kind or _kind_of(rows[0][1])
    understand = _choice if kind == "multiple_choice" else _open_question
    return kind, _each(rows, lambda pair: understand(task, *pair))


def encode_questions(
    task: Task, questions: Sequence[Question], renderer: Renderer, limit: int | None
) -> list[Encoded]:
    """Tokens of each question, for a model of at most `limit` positions.

    Raises UserError with every question that is too long, or that the chat template refuses.
    """
    named = [(question.name, question) for question in questions]
    return _each(named, lambda pair: _encoded(pair[1], renderer, limit))


def _each(rows: Sequence[tuple[str, Any]], use: Callable[[tuple[str, Any]], Any]) -> list[Any]:
    """What `use` makes of every row; UserError with all that it refuses."""
    results, mistakes = [], []
    for row in rows:
        try:
            results.append(use(row))
        except RowRefusedError as error:
            mistakes.append(Mistake(error.what, error.fix, where=row[0]))
    if len(mistakes) > _SHOWN:
        more = f"{len(mistakes) - _SHOWN:,} more of {len(rows):,} rows are refused"
        mistakes[_SHOWN:] = [Mistake(more, "mend those that are named first")]
    if mistakes:
        raise UserError(mistakes)
    return results


def _kind_of(row: Any) -> TaskKind:
    return "multiple_choice" if isinstance(row, dict) and "choices" in row else "exact_match"


def _prompt(task: Task, row: Any) -> Prompt:
    """`messages`, or `prompt` (or `question`), in the chat template where the task says so."""
    if not isinstance(row, Mapping):
        raise RowRefusedError("the row is no object", 'write {"prompt": …, "answer": …}')
    if "messages" in row:
        turns = row["messages"]
        if not isinstance(turns, list) or not turns or not all(map(_is_turn, turns)):
            what = "`messages` is no list of turns"
            raise RowRefusedError(what, 'write [{"role": "user", "content": …}, …]')
        if turns[-1]["role"] == "assistant":
            what = "`messages` ends with the assistant's turn, which is what is asked for"
            raise RowRefusedError(what, "leave that turn out; the answer stands in `answer`")
        return tuple(turns)
    key = "prompt" if "prompt" in row or "question" not in row else "question"
    text = row.get(key)
    if not isinstance(text, str) or not text:
        what = f"`{key}` is no text" if key in row else "there is no `prompt` and no `messages`"
        raise RowRefusedError(what, f"give the question as `{key}`")
    return ({"role": "user", "content": text},) if task.chat else text


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, Mapping)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
    )


def _open_question(task: Task, name: str, row: Any) -> Question:
    prompt = _prompt(task, row)
    given = row.get("answer")
    answers = given if isinstance(given, list) else [given]
    if not answers or not all(_is_answer(answer) for answer in answers):
        what = "`answer` is no text, number or list of these" if "answer" in row else "no `answer`"
        raise RowRefusedError(what, "give the text that counts as right, or a list of such texts")
    return Question(name, prompt, tuple(str(answer) for answer in answers))


def _is_answer(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _choice(task: Task, name: str, row: Any) -> Question:
    prompt = _prompt(task, row)
    choices, right = row.get("choices"), row.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise RowRefusedError("`choices` is no list of two or more texts", "write them as a list")
    if isinstance(right, str) and len(right) == 1 and right.isalpha():
        right = ord(right.upper()) - ord("A")
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(choices):
        last = chr(ord("A") + len(choices) - 1)
        what = f"`answer` is {row.get('answer')!r}, which names none of {len(choices)} choices"
        raise RowRefusedError(what, f"give its index, from 0, or its letter, A to {last}")
    return Question(name, prompt, tuple(choices), right)


def _encoded(question: Question, renderer: Renderer, limit: int | None) -> Encoded:
    prompt, _ = renderer.continued(question.prompt)
    longest = len(prompt) + 1  # room for one token of an answer
    choices = []
    for text in question.texts if question.right is not None else ():
        ids, before = renderer.continued(question.prompt, _joined(question.prompt, text))
        if before == 0:
            what = "no token stands before the choice, so nothing predicts its first one"
            raise RowRefusedError(what, "begin the prompt with another word or a line end")
        longest = max(longest, len(ids))
        choices.append((tuple(ids), before))
    if limit is not None and longest > limit:
        what = f"the question has {longest:,} tokens, and the model's context {limit:,}"
        raise RowRefusedError(what, "shorten it, or leave the row out")
    return Encoded(tuple(prompt), tuple(choices))


def _joined(prompt: Prompt, choice: str) -> str:
    """A choice as it follows a prompt: after a blank, unless it or the template has one."""
    apart = not isinstance(prompt, str) or prompt[-1].isspace() or choice[0].isspace()
    return choice if apart else f" {choice}"

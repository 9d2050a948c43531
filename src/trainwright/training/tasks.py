"""Tasks with right answers: a model is asked, its answers are compared, the outcome is kept."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainwright.data.masks import Renderer
from trainwright.data.templates import find_template
from trainwright.errors import Mistake, UserError
from trainwright.files import write_atomically
from trainwright.models.decoder import Decoder
from trainwright.parallel.spread import SpreadModel, force_eager
from trainwright.recipe.evaluation import Task, TaskKind
from trainwright.rollout.engine import generate
from trainwright.rollout.sampling import SamplingParams
from trainwright.training.continuations import score_continuations
from trainwright.training.questions import Encoded, Question, encode_questions, read_questions

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskResult:
    """What came of a task: how many questions, mean scores with their standard errors, each row.

    exact_match has the score `exact_match`; multiple_choice `acc`, by the highest log-probability,
    and `acc_norm`, by the highest one a byte of the choice.
    """

    name: str
    kind: TaskKind
    rows: int
    scores: Mapping[str, float]
    errors: Mapping[str, float | None]  # standard error of each mean; None of a single row
    details: Sequence[Row]

    def record(self) -> dict[str, Any]:
        """What is written of it, without the rows."""
        own: dict[str, Any] = {"name": self.name, "task": self.kind, "rows": self.rows}
        for name, score in self.scores.items():
            own |= {name: score, f"{name}_stderr": self.errors[name]}
        return own


class Examiner:
    """Puts tasks' questions to a model, on however many workers it is spread.

    `tokenizer` is what generation reads and writes with, `directory` where it is saved, with its
    chat template.
    """

    def __init__(
        self, spread: SpreadModel, tokenizer: Any, directory: Path, *, micro_batch: int
    ) -> None:
        self.spread, self.tokenizer, self.micro_batch = spread, tokenizer, micro_batch
        self.renderer = open_renderer(directory)
        stop_at_turn_end(spread, self.renderer)

    def run(self, task: Task) -> TaskResult:
        """Ask all of a task's questions. Collective. Raises UserError as `read_questions` does."""
        kind, questions = read_questions(task)
        limit = context_length(self.spread)
        encoded = encode_questions(task, questions, self.renderer, limit)
        if kind == "multiple_choice":
            details = self._choose(questions, encoded)
            names = ["acc", "acc_norm"]
        else:
            details = self._answer(task, questions, encoded)
            names = ["exact_match"]
        found = {name: _mean([row[name] for row in details]) for name in names}
        return TaskResult(
            task.title,
            kind,
            len(details),
            {name: mean for name, (mean, _) in found.items()},
            {name: error for name, (_, error) in found.items()},
            details,
        )

    def _choose(self, questions: Sequence[Question], encoded: Sequence[Encoded]) -> list[Row]:
        sequences = [choice for each in encoded for choice in each.choices]
        scores = iter(score_continuations(self.spread, sequences, micro_batch=self.micro_batch))
        details = []
        for question in questions:
            log_probs = [next(scores)[0] for _ in question.texts]
            by_byte = [
                log_prob / len(text.encode())
                for log_prob, text in zip(log_probs, question.texts, strict=True)
            ]
            row = _described(question) | {"choices": question.texts, "right": question.right}
            for name, values in (("acc", log_probs), ("acc_norm", by_byte)):
                row[name] = values.index(max(values)) == question.right
            details.append(row | {"log_probs": log_probs})
        return details

    def _answer(
        self, task: Task, questions: Sequence[Question], encoded: Sequence[Encoded]
    ) -> list[Row]:
        texts = self._generate(
            [each.prompt for each in encoded],
            SamplingParams(task.max_new_tokens, temperature=0, stop=tuple(task.stop)),
        )
        details = []
        for question, text in zip(questions, texts, strict=True):
            answer = extracted(task, text)
            accepted = {normal(task, each) for each in question.texts}
            row = _described(question) | {"text": text, "answer": answer}
            row |= {"accepted": question.texts, "exact_match": normal(task, answer) in accepted}
            details.append(row)
        return details

    def _generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[str]:
        """Texts after prompts: shared out where every worker has all of the model."""
        world, alone = self.spread.mesh.world, self.spread.alone
        own = list(prompts[world.rank :: world.size]) if alone else list(prompts)
        with force_eager():
            completions = generate(
                self.spread.model,
                self.tokenizer,
                own,
                params,
                device=world.device,
                # One differing bit would end a text on one worker and leave the others waiting.
                agree=None if alone else world.first_workers,
            )
        texts = [completion.text for completion in completions]
        if not alone:
            return texts
        gathered = world.gather(texts)
        return [gathered[n % world.size][n // world.size] for n in range(len(prompts))]


def check_tasks(tasks: Sequence[Task], tokenizer: Path, max_positions: int | None) -> None:
    """Read and encode every question before any training; UserError with all that is wrong."""
    if not tasks:
        return
    renderer = open_renderer(tokenizer)
    mistakes: list[Mistake] = []
    for task in tasks:
        try:
            _, questions = read_questions(task)
            encode_questions(task, questions, renderer, max_positions)
        except UserError as error:
            mistakes += error.mistakes
    if mistakes:
        raise UserError(mistakes)


def open_renderer(directory: Path) -> Renderer:
    """The tokenizer of a directory with its own chat template, if it has one."""
    return Renderer(directory, find_template(None, directory))


def context_length(spread: SpreadModel) -> int | None:
    """Tokens of context that the model was made for; None where it does not say."""
    part = spread.parts[0]
    return part.config.max_positions if isinstance(part, Decoder) else part.max_positions


def stop_at_turn_end(spread: SpreadModel, renderer: Renderer) -> None:
    """Let the model's answers end where the chat template ends a turn."""
    end = renderer.stop_id
    for part in spread.parts:
        if end is not None and end not in part.stop_token_ids:
            part.stop_token_ids = (*part.stop_token_ids, end)


def save_details(result: TaskResult, path: Path) -> None:
    """Write what came of each row as JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in result.details)
    write_atomically(path, "".join(lines).encode(errors="backslashreplace"))


def extracted(task: Task, text: str) -> str:
    """The answer in a model's text: of the last match of `extract` the first group, or all of it.

    "" where nothing matches; the whole text without an expression.
    """
    if task.extract is None:
        return text
    matches = list(re.finditer(task.extract, text))
    if not matches:
        return ""
    last = matches[-1]
    return (last[1] if last.re.groups else last[0]) or ""


def normal(task: Task, text: str) -> str:
    """A text as it is compared: without blanks around it, and in small letters if case is none."""
    return text.strip().casefold() if task.ignore_case else text.strip()


def _described(question: Question) -> Row:
    return {"row": question.name, "prompt": question.prompt}


def _mean(values: Sequence[bool]) -> tuple[float, float | None]:
    """The mean, and its standard error: the sample's deviation / √n."""
    number, mean = len(values), sum(values) / len(values)
    if number == 1:
        return mean, None
    return mean, math.sqrt(mean * (1 - mean) / (number - 1))

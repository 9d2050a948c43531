"""`trainwright evaluate`: held-out loss, tasks with right answers, and lm-eval's tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from trainwright.recipe.evaluation import Task
    from trainwright.training.evaluate import HeldOutLoss
    from trainwright.training.score import Subject
    from trainwright.training.tasks import TaskResult

EXAMPLE = """
Examples:

  trainwright evaluate runs/quickstart

  trainwright evaluate runs/quickstart --step 200 --data notes.txt

  trainwright evaluate ./some-model --data 'texts/*.txt' --sequence-length 512

  trainwright evaluate runs/sft --task questions.jsonl --chat --extract '#### (-?[0-9]+)'

  trainwright evaluate ./some-model --harness arc_easy,hellaswag --few-shot 5 --rows 200
"""

TASKS = "Tasks"


def evaluate(
    model: Annotated[str, typer.Argument(help="A run, a Hugging Face directory, or a hub id.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="File, folder or glob to score, not the run's held-out documents."),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Saved step; default the newest.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of context; default the recipe's, else 1,024.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Most rows to score, or questions to ask.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="File to write the results to as JSON.", dir_okay=False)
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Questions with answers: a file, or the name of a task of the run's recipe.",
            rich_help_panel=TASKS,
        ),
    ] = None,
    extract: Annotated[
        str | None,
        typer.Option(
            help="Of --task files: regular expression of the answer.", rich_help_panel=TASKS
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of --task files: tokens of an answer.", rich_help_panel=TASKS),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="Folder for what came of each question; default the run's.", rich_help_panel=TASKS
        ),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            help="lm-eval's tasks by name, and folders or files of task YAML, with commas between.",
            rich_help_panel=TASKS,
        ),
    ] = None,
    few_shot: Annotated[
        int | None,
        typer.Option(
            min=0, help="Of --harness: solved examples before a question.", rich_help_panel=TASKS
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Put questions into the chat template, as a user's turns.",
            rich_help_panel=TASKS,
        ),
    ] = False,
    trust_task_code: Annotated[
        bool,
        typer.Option(
            "--trust-task-code",
            help="Run Python that your own task YAML names or brings.",
            rich_help_panel=TASKS,
        ),
    ] = False,
) -> None:
    """Score a model: on held-out data, on questions with right answers, or by lm-eval.

    A run is scored by what it optimises, on its held-out documents and its recipe's tasks.
    """
    import json

    from rich.console import Console

    from trainwright.errors import UserError
    from trainwright.files import write_json
    from trainwright.training.score import open_subject, score

    options = {"chat": chat, "extract": extract, "max_new_tokens": max_new_tokens, "rows": rows}
    by_itself = not (data or task or harness)
    tasks = _tasks(model, task or [], options, own=by_itself)
    found = None
    if harness is not None:
        from trainwright.training.harness_tasks import find_tasks

        found = find_tasks(harness, trusted=trust_task_code)
    subject = open_subject(model, step=step)
    results: dict[str, Any] = {}
    tables = []
    if data or (by_itself and not (subject.run is None and tasks)):
        losses = score(
            subject,
            data or [],
            sequence_length=sequence_length,
            most_rows=rows,
            batch=batch,
        )
        results |= {name: loss.record() for name, loss in losses.items()}
        tables += [_loss_table(subject, losses)] if losses else []
    if tasks:
        answered = _ask(subject, tasks, batch, answers)
        results["tasks"] = {result.name: result.record() for result in answered}
        tables.append(_score_table(f"{subject.name}: tasks", results["tasks"]))
    if found is not None:
        from trainwright.training.harness import run_harness

        results["harness"] = run_harness(
            subject, found, few_shot=few_shot, rows=rows, batch=batch, chat=chat
        )
        tables.append(_score_table(f"{subject.name}: lm-eval", results["harness"]))
    if not results:
        fix = "say what to score with --data, or ask it something with --task or --harness"
        raise UserError(f"{model} has held nothing out and has no tasks", fix)
    if output is not None:
        write_json(output, results)
    if as_json:
        typer.echo(json.dumps(results))
        return
    for table in tables:
        Console().print(table)


def _tasks(model: str, given: list[str], options: dict[str, Any], *, own: bool) -> list[Task]:
    """The tasks that are meant: files, or those of the run's recipe by name; if `own` all these."""
    from pydantic import ValidationError

    from trainwright.errors import Mistake, UserError
    from trainwright.recipe.evaluation import Task
    from trainwright.training.run_directory import RunDirectory

    run = RunDirectory(Path(model))
    known = {task.title: task for task in run.read_recipe().evaluation.tasks} if run.exists else {}
    if own:
        changes = {"rows": options["rows"]} if options["rows"] else {}
        return [task.model_copy(update=changes) for task in known.values()]
    tasks = []
    for text in given:
        changes = {key: value for key, value in options.items() if value}
        values = known[text].model_dump() if text in known else {"path": text}
        try:
            tasks.append(Task.model_validate({**values, **changes}))
        except ValidationError as error:
            raise UserError(Mistake(each["msg"], where=text) for each in error.errors()) from None
    return tasks


def _ask(subject: Subject, tasks: list[Task], batch: int, folder: Path | None) -> list[TaskResult]:
    """Put the tasks' questions, and write down what came of each."""
    from trainwright.errors import UserError
    from trainwright.training.tasks import Examiner, save_details

    if not subject.writes:
        fix = "see how it ranks pairs: leave --task out, or score pairs with --data"
        raise UserError(f"{subject.name} is a reward model: it scores texts and writes none", fix)
    examiner = Examiner(
        subject.spread, subject.load_tokenizer(), subject.directory, micro_batch=batch
    )
    results = []
    for task in tasks:
        result = examiner.run(task)
        if folder is not None:
            save_details(result, folder / f"{result.name}.jsonl")
        elif subject.run is not None and subject.step is not None:
            save_details(result, subject.run.answers(result.name, subject.step))
        results.append(result)
    return results


def _loss_table(subject: Subject, losses: dict[str, HeldOutLoss]) -> Table:
    """Held-out losses: as of texts, or with the objective's own figures."""
    from trainwright.report.tables import UNKNOWN, significant

    plain = subject.section.kind in ("next_token", "sft")
    figures = list(subject.objective.figures)
    preferred = ["rewards/accuracies", "rewards/margins"]
    if set(preferred) <= set(figures):
        figures = preferred
    columns = ["perplexity", "bits per byte"] if plain else figures
    table = _table(subject.name, ["data"], ["loss", *columns, "targets"])
    for name, loss in losses.items():
        bits = UNKNOWN if loss.bits_per_byte is None else f"{loss.bits_per_byte:.4f}"
        shown = [f"{loss.perplexity:,.2f}", bits]
        if not plain:
            shown = [significant(loss.figures[each], 4) for each in figures]
        table.add_row(name, f"{loss.loss:.4f}", *shown, f"{loss.targets:,}")
    return table


def _score_table(title: str, results: dict[str, dict[str, Any]]) -> Table:
    """Every score of every task, with its standard error where it has one."""
    from trainwright.report.tables import UNKNOWN

    table = _table(title, ["task", "score"], ["value", "standard error", "rows"])
    for name, record in results.items():
        scores = {key: value for key, value in record.items() if f"{key}_stderr" in record}
        for number, (key, value) in enumerate(scores.items()):
            error = record[f"{key}_stderr"]
            table.add_row(
                "" if number else name,
                key,
                f"{value:.4f}",
                UNKNOWN if error is None else f"{error:.4f}",
                "" if number else f"{record['rows']:,}",
            )
    return table


def _table(title: str, texts: list[str], numbers: list[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in (*texts, *numbers):
        table.add_column(column, justify="left" if column in texts else "right")
    return table


evaluate.__doc__ = f"{evaluate.__doc__}\n{EXAMPLE}"

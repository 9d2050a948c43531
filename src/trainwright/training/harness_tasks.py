"""Which of lm-eval's tasks are meant, and whether those that a user brings may run code.

Task YAML is more than data: `!function` and `class` name Python to import, a metric that lm-eval
does not know is fetched from a hub and run, and templates are Jinja without a sandbox. Files of
lm-eval's own package are trusted; others are not unless the user says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainwright.errors import Mistake, UserError

_STANDARD = "tag:yaml.org,2002:"
_HARMLESS = {f"{_STANDARD}{name}" for name in ("null", "bool", "int", "float", "str")} | {
    f"{_STANDARD}{name}" for name in ("seq", "map", "timestamp", "merge", "value")
}
_TRUST = "read the code, then add --trust-task-code"


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks by name, the manager that loads them, and whether their own code may run."""

    names: tuple[str, ...]
    manager: Any
    trusted: bool

    def guarded(self) -> AbstractContextManager[None]:
        """Within, templates run in a sandbox, unless the tasks are trusted."""
        return nullcontext() if self.trusted else _sandboxed_templates()


def find_tasks(text: str, *, trusted: bool = False) -> HarnessTasks:
    """The tasks that `text` lists: names, task YAML files, and folders of those, with commas.

    Names are looked for in the folders first; folders without any name stand for all their tasks.
    Raises UserError where lm-eval is missing, for names that nobody knows, and for files that would
    run code without being trusted.
    """
    if importlib.util.find_spec("lm_eval") is None:
        fix = "pip install 'trainwright[harness]'"
        raise UserError("--harness runs EleutherAI's lm-eval, which is not installed", fix)
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Kind

    class Manager(TaskManager):
        """Tells as a mistake what keeps a task, or its data, from being loaded."""

        def load(self, task_list: Any) -> Any:
            try:
                return super().load(task_list)
            except Exception as error:  # whatever hubs, networks, templates and files bring
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                what = f"lm-eval cannot load the tasks: {reason}"
                fix = "check the task, its data and the network"
                raise UserError(what, fix) from error

    given = [part.strip() for part in text.split(",") if part.strip()]
    folders = [Path(part).expanduser() for part in given if Path(part).expanduser().is_dir()]
    files = [Path(part).expanduser() for part in given if _is_yaml(part)]
    if not trusted:
        found = [file for folder in folders for file in sorted(folder.rglob("*.yaml"))]
        mistakes = [mistake for file in (*found, *files) for mistake in _refusals(file)]
        if mistakes:
            raise UserError(mistakes)
    known = Manager(include_path=[str(each) for each in folders], include_defaults=False)
    # Named tasks; where none is, all that the folders hold.
    names = [each for each in given if not Path(each).expanduser().exists()]
    paths = [str(file) for file in files]
    if not names and not paths:
        names = sorted(name for name, each in known.task_index.items() if each.kind == Kind.TASK)
    if any(name not in known.task_index for name in names):  # takes seconds: thousands of files
        known = Manager(include_path=[str(each) for each in folders])
    missing = [Mistake(f"there is no task {name}", _near(name, known.all_tasks)) for name in names
               if name not in known.task_index]  # fmt: skip
    if missing or not (names or paths):
        raise UserError(missing or [Mistake(f"{text} holds no task", "name one of lm-eval's")])
    return HarnessTasks((*names, *paths), known, trusted)


def _is_yaml(text: str) -> bool:
    return text.endswith((".yaml", ".yml")) and Path(text).expanduser().is_file()


def _near(name: str, known: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"


def _refusals(file: Path, seen: frozenset[Path] = frozenset()) -> Iterator[Mistake]:
    """What in a task's file, or in one that it includes, would run code."""
    import lm_eval
    import yaml
    from lm_eval.api.registry import METRIC_REGISTRY

    package = Path(lm_eval.__file__).resolve().parent
    file = file.resolve()
    if file in seen or file.is_relative_to(package):
        return
    try:
        tree = yaml.compose(file.read_text(), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).strip().split("\n")[0]
        yield Mistake(f"cannot be read: {reason}", "mend it, or leave it out", where=str(file))
        return
    for node in _nodes(tree):
        where = f"{file}:{node.start_mark.line + 1}"
        if node.tag not in _HARMLESS:
            what = f"`{node.tag} {getattr(node, 'value', '')}` runs Python code"
            yield Mistake(what, _TRUST, where=where)
        for key, value in _entries(node):
            if key == "class":
                yield Mistake("`class` runs Python code", _TRUST, where=where)
            elif key == "hf_evaluate" or (key == "metric" and value not in METRIC_REGISTRY):
                what = f"`{key}: {value}` fetches code from a hub and runs it"
                yield Mistake(what, f"take a metric of lm-eval's own, or {_TRUST}", where=where)
    for key, value in _entries(tree):
        for name in value if isinstance(value, list) else [value]:
            if key == "include" and isinstance(name, str):
                yield from _refusals(file.parent / name, seen | {file})


def _nodes(node: Any) -> Iterator[Any]:
    """A YAML node and all within it."""
    import yaml

    if node is None:
        return
    yield node
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from (*_nodes(key), *_nodes(value))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _nodes(item)


def _entries(node: Any) -> Iterator[tuple[str, Any]]:
    """The keys of a mapping with their values: a text, or the texts of a list."""
    import yaml

    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        texts = value.value
        if isinstance(value, yaml.SequenceNode):
            texts = [item.value for item in value.value]
        yield str(key.value), texts


@contextmanager
def _sandboxed_templates() -> Iterator[None]:
    """Within, lm-eval's templates are Jinja in a sandbox."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    open_environment = utils.env
    sandbox = SandboxedEnvironment(
        loader=open_environment.loader,
        undefined=open_environment.undefined,
        keep_trailing_newline=open_environment.keep_trailing_newline,
    )
    sandbox.filters.update(open_environment.filters)
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = open_environment

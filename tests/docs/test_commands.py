"""What README and docs tell a reader to type works: each command is run, in order, as written.

The quickstart's recipe is shrunk to a few seconds; nothing else about it changes.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PAGES = ["README.md", "docs/getting-started.md", "docs/planner.md"]
SHRUNK = [
    ("tokens: 900_000", "tokens: 12_288"),
    ("preset: 4m", "config: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, "
     "num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 256}"),
    ("- python-stdlib ", "- {kind: python-stdlib, limit: 60} "),
    ("validation: 0.05", "validation: 0.2"),
    ("vocab_size: 4096", "vocab_size: 512"),
]  # fmt: skip


def commands(page: str) -> list[str]:
    """The page's `trainwright …` lines, with continued lines joined."""
    text = (REPOSITORY / page).read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?: {4}|\$ )(trainwright .*)$", text, flags=re.MULTILINE)
    return list(dict.fromkeys(line.partition(" #")[0].strip() for line in lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder with a small quickstart and a few texts."""
    folder = tmp_path_factory.mktemp("reader")
    recipe = (REPOSITORY / "examples" / "quickstart.yaml").read_text()
    for before, after in SHRUNK:
        assert before in recipe, before
        recipe = recipe.replace(before, after)
    shutil.copytree(REPOSITORY / "examples", folder / "examples")
    (folder / "examples" / "quickstart.yaml").write_text(recipe)
    texts = folder / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"Text number {number}. " * (40 + number))
    return folder


def run(folder: Path, command: list[str]) -> str:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRAINWRIGHT_CACHE": str(folder / "cache"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        input="What does textwrap.dedent do?\n\n" if "chat" in command else None,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def shrunk(command: str) -> list[str]:
    """The command; a recipe of the reader's own is cut to two small steps."""
    words = shlex.split(command, comments=True)
    if words[1] == "train" and "quickstart" not in command:
        small = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, "
        small += "num_attention_heads: 2, num_key_value_heads: 2}"
        words += ["training.steps=2", f"model.config={small}"]
        if "sft" not in command:
            words += ["data.sequence_length=64", "training.batch_tokens=512"]
            words += ["tokenizer.train.vocab_size=300"]
    return words


def test_the_pages_hold_commands():
    assert sum(len(commands(page)) for page in PAGES) >= 12


@pytest.mark.slow
def test_every_command_of_the_pages_works_as_written(folder):
    every = dict.fromkeys(command for page in PAGES for command in commands(page))  # once each
    for command in every:
        if "--from-step" not in command:
            run(folder, shrunk(command))
    assert (folder / "runs" / "quickstart" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_the_pages_works_as_written(folder, page):
    text = (REPOSITORY / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for number, block in enumerate(blocks):
        script = folder / f"{Path(page).stem}-{number}.py"
        script.write_text(block)
        run(folder, [sys.executable, str(script)])

"""`trainwright init` and `validate` as a user meets them: screens, exit codes, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainwright.recipe.load import load_recipe
from trainwright.recipe.starters import STARTERS, starter_text


def trainwright(*words: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **variables}
    return subprocess.run(
        [sys.executable, "-m", "trainwright", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_lists_every_verb_and_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from trainwright.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 0, done.stderr
    verbs = ["init", "validate", "data", "train", "evaluate", "report", "generate", "chat"]
    for verb in [*verbs, "export", "doctor"]:
        assert f" {verb} " in done.stdout


@pytest.mark.parametrize("verb", ["init", "validate"])
def test_help_of_a_verb_has_an_example(verb: str, tmp_path: Path) -> None:
    done = trainwright(verb, "--help", folder=tmp_path)
    assert done.returncode == 0
    assert "Examples:" in done.stdout
    assert f"trainwright {verb} " in done.stdout


def test_version_and_unknown_verb(tmp_path: Path) -> None:
    assert trainwright("--version", folder=tmp_path).stdout.startswith("trainwright ")
    wrong = trainwright("trian", folder=tmp_path)
    assert wrong.returncode == 2
    assert "Did you mean 'train'" in wrong.stderr


def test_init_writes_starters_and_never_over_a_file(tmp_path: Path) -> None:
    for name in STARTERS:
        done = trainwright("init", name, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        file = tmp_path / f"{name}.yaml"
        assert file.read_text(encoding="utf-8") == starter_text(name)
        load_recipe(file)
    file = tmp_path / "quickstart.yaml"
    file.write_text("mine")
    again = trainwright("init", "quickstart", folder=tmp_path)
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert file.read_text() == "mine"
    assert trainwright("init", "--force", folder=tmp_path).returncode == 0
    assert file.read_text(encoding="utf-8") == starter_text("quickstart")
    trainwright("init", "pretrain", "--output", "deep/own.yaml", folder=tmp_path)
    assert (tmp_path / "deep" / "own.yaml").exists()


def test_init_lists_starters_and_presets(tmp_path: Path) -> None:
    starters = trainwright("init", "--list", folder=tmp_path).stdout
    assert all(name in starters for name in STARTERS)
    presets = trainwright("init", "--presets", folder=tmp_path).stdout.splitlines()
    [row] = [line.split() for line in presets if line.split()[:2] == ["llama", "8b"]]
    assert row[-1] == "8,030,261,248"
    assert not list(tmp_path.iterdir())
    unknown = trainwright("init", "quikstart", folder=tmp_path)
    assert unknown.returncode == 2
    assert "did you mean `quickstart`?" in unknown.stderr


def test_validate_prints_all_mistakes_and_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "model:\n  family: llama\n  presett: 4m\n[bold]: 1\n"
        "training:\n  steps: many\ndata: {sources: [none.txt]}\n"
    )
    done = trainwright("validate", "recipe.yaml", "optimizer.lr=3", folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for words in (
        "recipe.yaml:3: model.presett: unknown key `presett`",
        "    fix: did you mean `preset`?",
        "recipe.yaml:4: ",
        "recipe.yaml:6: training.steps: expected a whole number",
        "recipe.yaml:7: data.sources.0.path: there is no file",
        "command line: optimizer.lr: unknown key `lr`",
        " mistakes",
    ):
        assert words in done.stderr

    broken = trainwright("validate", "nothing.yaml", folder=tmp_path)
    assert broken.returncode == 2
    assert "nothing.yaml: there is no such file" in broken.stderr
    assert "error: no recipe is given" in trainwright("validate", folder=tmp_path).stderr


def test_validate_summarises_and_prints(tmp_path: Path) -> None:
    trainwright("init", folder=tmp_path)
    done = trainwright("validate", "quickstart.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("nothing is wrong", "4,212,992", "python-stdlib", "900,000 tokens", "2 proc"):
        assert words in done.stdout
    table = dict(line.split() for line in done.stdout.partition("GiB\n")[2].splitlines())
    parts = sum(float(size) for name, size in table.items() if name not in ("sum", "limit"))
    assert float(table["sum"]) == pytest.approx(parts, abs=0.05)
    assert float(table["weights"]) == pytest.approx(4 * 4_212_992 / 2**30, abs=0.01)
    assert float(table["limit"]) > 0

    printed = trainwright(
        "validate", "quickstart.yaml", "--print", "training.steps=7", folder=tmp_path
    )
    (tmp_path / "whole.yaml").write_text(printed.stdout)
    recipe = load_recipe(tmp_path / "whole.yaml")
    assert recipe == load_recipe(tmp_path / "quickstart.yaml", ["training.steps=7"])
    assert "keep_last: 2" in printed.stdout

    (tmp_path / "[bold]a.txt").write_text("a glob's brackets are no markup")
    globbed = trainwright(
        "validate", "quickstart.yaml", "data.sources.0='[[]bold]*.txt'", folder=tmp_path
    )
    assert "[[]bold]*.txt" in globbed.stdout, globbed.stderr

    if not torch.cuda.is_available():
        paged = trainwright("validate", "quickstart.yaml", "optimizer=paged-adamw", folder=tmp_path)
        assert paged.returncode == 2
        assert "here is no GPU" in paged.stderr and "write `name: adamw`" in paged.stderr

    illegal = trainwright("validate", "quickstart.yaml", "parallel.workers=3", folder=tmp_path)
    assert illegal.returncode == 2
    assert "8 rows do not share out evenly over 3 workers" in illegal.stderr


def test_validate_prints_the_schema_quietly_into_a_closed_pipe(tmp_path: Path) -> None:
    whole = trainwright("validate", "--schema", folder=tmp_path)
    assert json.loads(whole.stdout)["title"] == "Trainwright recipe"
    reader, writer = os.pipe()
    os.close(reader)  # whoever reads has gone already
    done = subprocess.run(
        [sys.executable, "-m", "trainwright", "validate", "--schema"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_the_package_itself_imports_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys, trainwright\n"
        "from trainwright import Recipe\n"
        "assert Recipe.__module__ == 'trainwright.recipe.schema'\n"
        "import trainwright.recipe.load, trainwright.planner.check, trainwright.planner.plan\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'transformers' not in sys.modules\n"
        "assert {'Recipe', 'train', 'load_model', 'generate', 'export'} <= set(dir(trainwright))\n"
        "try: trainwright.nothing\n"
        "except AttributeError: pass\n"
        "else: raise SystemExit('no AttributeError')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("raised", "code", "traceback"),
    [
        ("KeyboardInterrupt", 130, False),
        ("UserError('wrong', fix='right')", 2, False),
        ("RuntimeError('a fault of ours')", 1, True),
    ],
)
def test_exit_codes(raised: str, code: int, traceback: bool, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from trainwright.cli import main as door\n"
        "from trainwright.errors import UserError\n"
        "@door.app.command()\n"
        "def boom() -> None:\n"
        f"    raise {raised}\n"
        "sys.argv = ['trainwright', 'boom']\n"
        "door.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == code
    assert ("Traceback" in done.stderr) is traceback
    if code == 2:
        assert done.stderr == "error: wrong\n    fix: right\n"

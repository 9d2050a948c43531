"""Runs that are killed, interrupted, continued: through the command line, with real signals."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.training.runs import write_recipe
from trainwright.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "trainwright"]


def start(*arguments: object, **options) -> subprocess.Popen:
    """`trainwright …` with its output captured, in a session of its own."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        **options,
    )


def run(*arguments: object, expect: int = 0, **options) -> str:
    """Output of `trainwright …`, which must exit with `expect`."""
    process = start(*arguments, **options)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == expect, output
    return output


def records(folder: Path, kind: str = "step") -> list[dict]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def wait_for(process: subprocess.Popen, condition) -> None:
    """Until `condition()`, however long the machine takes; the process must not end before."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and every worker, workers first."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    process.communicate()


def saved_tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    store = CheckpointStore(folder / "run" / "checkpoints")
    names = [n for n in store.metadata(step) if n.startswith(("model.", "optimizer."))]
    into = {n: empty_like(store.metadata(step)[n]) for n in names}
    store.load(step, into)
    return into


def empty_like(stored) -> torch.Tensor:
    return torch.empty(stored.shape, dtype=stored.dtype)


SECTIONS = {
    "training": {"steps": 40},
    "parallel": {"workers": 2, "micro_batch": 2},
    "checkpoint": {"every": 5, "keep_last": 20},
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    run("train", write_recipe(folder, **SECTIONS))
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A run whose launcher and workers were killed after step 20, in mid-flight."""
    folder = tmp_path_factory.mktemp("killed")
    recipe = write_recipe(folder, **SECTIONS)
    process = start("train", recipe)
    checkpoint = folder / "run" / "checkpoints" / "step-00000020"
    wait_for(process, checkpoint.exists)
    kill_all(process)
    assert len(records(folder)) < 40
    return folder


def test_a_killed_run_goes_on_to_the_same_bits(unbroken, killed, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(killed), str(copy)], check=True)
    recipe = write_recipe(copy, **SECTIONS)
    output = run("train", recipe, f"data.sources.0={killed / 'texts.jsonl'}")
    assert "going on from step" in output
    expected, got = saved_tensors(unbroken, 40), saved_tensors(copy, 40)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    ours, theirs = records(copy), records(unbroken)
    assert [r["step"] for r in ours] == list(range(1, 41))
    for key in ("loss", "batch_hash", "gradient_norm"):
        assert [r[key] for r in ours] == [r[key] for r in theirs]


@pytest.mark.parametrize("workers", [1, 4])
def test_a_killed_run_goes_on_with_other_workers(unbroken, killed, tmp_path, workers):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(killed), str(copy)], check=True)
    sections = {**SECTIONS, "parallel": {"workers": workers, "micro_batch": 2}}
    recipe = write_recipe(copy, **sections)
    run("train", recipe, f"data.sources.0={killed / 'texts.jsonl'}")
    ours, theirs = records(copy), records(unbroken)
    assert [r["batch_hash"] for r in ours] == [r["batch_hash"] for r in theirs]
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-5)


def test_an_interrupted_run_saves_and_says_how_to_go_on(tmp_path):
    recipe = write_recipe(tmp_path, **{**SECTIONS, "training": {"steps": 100_000}})
    process = start("train", recipe)
    wait_for(process, (tmp_path / "run" / "checkpoints" / "step-00000005").exists)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    assert f"trainwright train {recipe}" in output
    assert "Traceback" not in output and "death signal" not in output
    newest = CheckpointStore(tmp_path / "run" / "checkpoints").latest()
    assert newest == records(tmp_path)[-1]["step"]


def test_the_same_command_works_under_torchrun(unbroken, tmp_path):
    recipe = write_recipe(tmp_path, **{**SECTIONS, "checkpoint": {"every": 1000}})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node=2", "-m", "trainwright", "train", str(recipe)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [r["loss"] for r in records(tmp_path)] == [r["loss"] for r in records(unbroken)]
    assert (tmp_path / "run" / "report.html").exists()


def test_a_full_disk_while_saving_ends_the_run_and_leaves_what_was_saved(killed, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(killed), str(copy)], check=True)
    recipe = write_recipe(copy, **SECTIONS)
    before = CheckpointStore(copy / "run" / "checkpoints").steps()

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    source = f"data.sources.0={killed / 'texts.jsonl'}"
    output = run("train", recipe, source, expect=2, preexec_fn=no_room)
    assert "Traceback" not in output
    assert "checkpoints" in output
    store = CheckpointStore(copy / "run" / "checkpoints")
    assert store.steps() == before
    assert all(store.verify(step) == [] for step in before)


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_offered(killed, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(killed), str(copy)], check=True)
    store = CheckpointStore(copy / "run" / "checkpoints")
    newest = store.latest()
    file = next(store.directory(newest).glob("model-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))
    recipe = write_recipe(copy, **SECTIONS)
    source = f"data.sources.0={killed / 'texts.jsonl'}"
    output = run("train", recipe, source, expect=2)
    assert file.name in output
    assert str(store.steps()[-2]) in output
    assert "Traceback" not in output
    run("train", recipe, source, "--from-step", store.steps()[-2])
    assert store.latest() == 40

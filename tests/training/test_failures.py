"""What a run does when something is wrong: the message, the exit code, and nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.runs import assemble_here, small_recipe, train_here, write_recipe, write_texts
from tests.workers import run_on
from trainwright.checkpoint.store import CheckpointStore
from trainwright.cli.main import main
from trainwright.errors import UserError
from trainwright.objectives.next_token import NextToken
from trainwright.training.prepare import prepare_run
from trainwright.training.run_directory import RunDirectory, locked, open_run
from trainwright.training.step import BrokenNumbersError


def command(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    """Exit code and standard error of `trainwright …`, run in this process."""
    monkeypatch.setattr("sys.argv", ["trainwright", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    return int(exit_.value.code or 0), said.err


def poison(trainer, step: int) -> None:
    """From `step` on, one norm's weight is infinite."""
    plain = trainer.data.batch

    class Poisoned:
        def batch(self, index, rows):
            if index == step:
                with torch.no_grad():
                    trainer.step.spread.model.model.norm.weight[0] = float("inf")
            return plain(index, rows)

    trainer.data = Poisoned()


def test_a_broken_loss_stops_the_run_names_the_documents_and_saves_nothing(tmp_path):
    recipe = small_recipe(tmp_path, checkpoint={"every": 4, "keep_last": 9})
    assembled = assemble_here(recipe)
    real = assembled.trainer.data
    poison(assembled.trainer, 9)
    with pytest.raises(BrokenNumbersError) as error:
        assembled.trainer.run()
    assembled.store.close()
    documents = {name for row in real.batch(9).documents for name in row}
    assert set(error.value.documents) == documents
    assert next(iter(error.value.documents)) in str(error.value)
    store = CheckpointStore(Path(recipe.run_directory) / "checkpoints")
    assert store.steps() == [4, 8]
    assert store.verify(8) == []


def poisoned_rank(folder: str) -> tuple[list[str], list[str]]:
    recipe = small_recipe(Path(folder), parallel={"workers": 2, "micro_batch": 2})
    assembled = assemble_here(recipe)
    step = assembled.trainer.step

    class Poisoned(NextToken):
        calls = 0

        def __call__(self, model, batch):
            sums, figures = super().__call__(model, batch)
            self.calls += 1
            if step.world.rank == 1 and self.calls == 6:  # third step, second micro-batch
                sums = {name: each * float("nan") for name, each in sums.items()}
            return sums, figures

    step.objective = Poisoned()
    rows = assembled.trainer.data.batch(2).documents[6:8]
    try:
        assembled.trainer.run()
    except BrokenNumbersError as error:
        return sorted(error.documents), sorted(name for row in rows for name in row)
    finally:
        assembled.store.close()
    raise AssertionError("the run did not stop")


def test_every_worker_stops_and_only_the_micro_batch_at_fault_is_named(tmp_path):
    small_recipe(tmp_path)
    for named, expected in run_on(2, poisoned_rank, str(tmp_path)):
        assert named == expected


def test_fp16_skips_a_step_that_overflows_and_halves_its_scale(tmp_path):
    recipe = small_recipe(tmp_path, training={"precision": "fp16", "steps": 3})
    assembled = assemble_here(recipe)
    step = assembled.trainer.step
    step.loss_scale.value = 2.0**60
    before = [parameter.detach().clone() for parameter in step.parameters]
    batch = assembled.trainer.data.batch(0)
    stats = step(batch, 1e-2, 0)
    assert stats.skipped
    assert step.loss_scale.value == 2.0**59
    assert all(torch.equal(a, b) for a, b in zip(before, step.parameters, strict=True))
    step.loss_scale.value = 1024.0
    stats = step(batch, 1e-2, 0)
    assert not stats.skipped
    assert not all(torch.equal(a, b) for a, b in zip(before, step.parameters, strict=True))
    assembled.store.close()


def test_fp16_and_bf16_follow_fp32(tmp_path):
    losses = {}
    for precision in ("fp32", "bf16", "fp16"):
        folder = tmp_path / precision
        folder.mkdir()
        losses[precision] = train_here(
            small_recipe(folder, training={"precision": precision})
        ).losses
    for narrow, tolerance in (("bf16", 0.03), ("fp16", 0.01)):
        assert losses[narrow] == pytest.approx(losses["fp32"], rel=tolerance)
        assert losses[narrow] != losses["fp32"]


def test_a_batch_without_any_target_is_refused(tmp_path):
    assembled = assemble_here(small_recipe(tmp_path))
    batch = assembled.trainer.data.batch(0)
    np.copyto(batch.labels, -100)
    with pytest.raises(UserError, match="no target"):
        assembled.trainer.step(batch, 1e-3, 0)
    assembled.store.close()


def test_another_recipe_may_not_continue_a_run(tmp_path, monkeypatch, capsys):
    train_here(small_recipe(tmp_path))
    changed = write_recipe(tmp_path, optimizer={"learning_rate": 1e-4}, seed=1)
    code, said = command(monkeypatch, capsys, "train", changed)
    assert code == 2
    assert "optimizer.learning_rate" in said
    assert "seed" in said
    assert "run_directory" in said


def test_what_only_spreads_or_saves_the_work_may_change(tmp_path):
    train_here(small_recipe(tmp_path))
    changed = small_recipe(
        tmp_path,
        parallel={"micro_batch": 2},
        training={"activation_offload": True},
        checkpoint={"every": 7},
        tracking={"log_every": 5},
    )
    assert open_run(changed).has_trained


def test_a_recipe_corrected_before_anything_was_learnt_takes_the_place_of_the_first(tmp_path):
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    (folder / "resolved.yaml").write_text(write_recipe(tmp_path, seed=5).read_text())
    (folder / "recipe.yaml").write_text("name: before\n")
    assert not RunDirectory(folder).has_trained
    recipe = small_recipe(tmp_path)
    prepare_run(open_run(recipe), recipe, "name: corrected\n", lambda message: None)
    assert (folder / "recipe.yaml").read_text() == "name: corrected\n"


def test_a_folder_of_other_files_is_not_touched(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    code, said = command(monkeypatch, capsys, "train", write_recipe(tmp_path))
    assert code == 2
    assert "no run of Trainwright" in said
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_two_trainings_of_one_folder_are_refused(tmp_path, monkeypatch, capsys):
    recipe = small_recipe(tmp_path)
    with locked(open_run(recipe)):
        code, said = command(monkeypatch, capsys, "train", write_recipe(tmp_path))
    assert code == 2
    assert "another process" in said


def test_a_bad_line_of_data_is_named(tmp_path, monkeypatch, capsys):
    file = write_texts(tmp_path, documents=5000)
    lines = file.read_text().splitlines()
    lines[4710] = '{"text": "cut off'
    file.write_text("\n".join(lines))
    code, said = command(monkeypatch, capsys, "train", write_recipe(tmp_path))
    assert code == 2
    assert "texts.jsonl:4711" in said


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: (folder / "texts.jsonl").write_text(""), "empty"),
        (lambda folder: (folder / "texts.jsonl").unlink(), "texts.jsonl"),
    ],
)
def test_missing_and_empty_data_are_told_before_anything_is_made(
    make, expected, tmp_path, monkeypatch, capsys
):
    recipe = write_recipe(tmp_path)
    make(tmp_path)
    code, said = command(monkeypatch, capsys, "train", recipe)
    assert code == 2
    assert expected in said
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path)
    code, said = command(
        monkeypatch, capsys, "train", recipe, "model.config.vocab_size=100", "tokenizer=bytes"
    )
    assert code == 2
    assert "vocab" in said


def test_steps_that_are_logged_are_what_was_asked(tmp_path):
    recorder = train_here(small_recipe(tmp_path, tracking={"log_every": 6}))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [r for line in lines if (r := json.loads(line))["kind"] == "step"]
    assert [r["step"] for r in steps] == [6, 12, 18, 20]
    assert [r["loss"] for r in steps] == [recorder.losses[i] for i in (5, 11, 17, 19)]

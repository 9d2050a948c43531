"""The promise of the README's first command, kept in full: minutes, not seconds."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.prove


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A fresh clone after `make quickstart`, its environment made anew."""
    folder = tmp_path_factory.mktemp("clone") / "trainwright"
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(folder)], check=True)
    subprocess.run(["make", "quickstart"], cwd=folder, check=True)
    return folder


def test_held_out_files_take_at_most_1_75_bits_a_byte(clone):
    lines = (clone / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()
    evaluations = [r for line in lines if (r := json.loads(line))["kind"] == "evaluation"]
    assert evaluations[-1]["bits_per_byte"] <= 1.75


def test_transformers_gives_our_logits(clone):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import trainwright

    run = clone / "runs" / "quickstart"
    theirs = AutoModelForCausalLM.from_pretrained(run / "export")
    ours = trainwright.load_model(run)
    text = (REPOSITORY / "src" / "trainwright" / "errors.py").read_text()
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :256]
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4

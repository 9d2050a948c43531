"""A rank of 512 that trains Llama 3 8B, simulated by the command that users have."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.prove

RECIPE = """
name: large
model: {family: llama, preset: 8b, config: {vocab_size: 128256}}
tokenizer: bytes
data: {sources: [python-stdlib], sequence_length: 8192}
training: {steps: 1, batch_sequences: 64, precision: bf16, recompute: none}
parallel: {dp_shard: 64, tp: 8, micro_batch: 1}
"""
# The published shape, and the plan.
HIDDEN, FFN, KEYS, LAYERS, VOCABULARY, SEQUENCE = 4096, 14_336, 1024, 32, 128_256, 8192
SHARDS, TENSOR, NARROW, WIDE = 64, 8, 2, 4


def formulas() -> dict[tuple[str, str], float]:
    """By hand, from the shape; a message counts as the rings send it."""
    matrices = LAYERS * (2 * HIDDEN**2 + 2 * HIDDEN * KEYS + 3 * HIDDEN * FFN)
    # A worker has 16,032 of the vocabulary's rows, which 64 shards pad to 251 each.
    vocabularies = 2 * SHARDS * math.ceil(VOCABULARY / TENSOR / SHARDS) * HIDDEN
    norms = (2 * LAYERS + 1) * HIDDEN
    own = matrices / TENSOR + vocabularies + norms
    others, cut = (SHARDS - 1) / SHARDS, (TENSOR - 1) / TENSOR
    stream = SEQUENCE * HIDDEN * NARROW
    # A layer's two halves are entered and left, and both once more on the way back; besides, the
    # embedding is left and the head entered.
    passes = LAYERS * 2 * 2 + 2
    world = 2 * 511 / 512 * 8
    return {
        ("fsdp", "all_gather"): others * 2 * own * NARROW,  # forward, and again backward
        ("fsdp", "reduce_scatter"): others * own * WIDE,
        ("tp", "all_gather"): passes * cut * stream,
        ("tp", "reduce_scatter"): passes * cut * stream,
        # Three numbers a token of the loss; the norms' gradients, as sharded.
        ("tp", "all_reduce"): 2 * cut * WIDE * (3 * SEQUENCE + norms / SHARDS),
        # The batch's weight, its hash, a wish to stop; the loss; the gradients' norm.
        ("world", "all_reduce"): 5 * world,
    }


def test_a_step_of_one_rank_of_512(tmp_path: Path) -> None:
    recipe = tmp_path / "large.yaml"
    recipe.write_text(RECIPE)
    command = ["verify", str(recipe), "--simulate", "512", "--rank", "137", "--json"]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "trainwright.cli.main", *command],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    assert os.waitstatus_to_exitcode(status) == 0, text
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(line["equal"] for line in lines)
    expected = formulas()
    assert {(line["group"], line["collective"]) for line in lines} == expected.keys()
    for line in lines:
        # Each call is rounded to a byte.
        by_hand = expected[line["group"], line["collective"]]
        assert abs(line["sent"] - by_hand) <= line["calls"] / 2, line
    assert seconds < 60
    assert used.ru_maxrss * 1024 < 2e9  # Linux counts in KiB

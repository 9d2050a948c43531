"""Ranks that call different collectives, or wait for each other: named, with their lines."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.resilience import jobs
from tests.workers import start
from trainwright.resilience.reports import first_cause


def lines_of(job: str) -> range:
    """Line numbers of a job's code."""
    code = jobs.JOBS[job].__code__
    return range(code.co_firstlineno, max(line for _, _, line in code.co_lines() if line) + 1)


def run_job(job: str, logs: Path, world_size: int = 2) -> tuple[list[int], dict[int, str]]:
    """Exit codes and logs of the ranks."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        start(jobs.serve, job, rank, world_size, store.port, str(logs))
        for rank in range(world_size)
    ]
    deadline = time.monotonic() + 45
    for rank in ranks:
        rank.join(timeout=max(0.0, deadline - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.join()
    del store
    return codes, {r: (logs / f"rank{r}.log").read_text() for r in range(world_size)}


def assert_line_named(text: str, job: str) -> None:
    assert any(f"jobs.py:{line} in {job}" in text for line in lines_of(job)), text


def test_different_sizes_are_told_even_where_the_library_aborts(tmp_path):
    codes, _ = run_job("different_sizes", tmp_path)
    assert 0 not in codes
    text = str(first_cause(tmp_path, dict(enumerate(codes))))
    assert text.startswith("ranks called different collectives as number 2 on the group tp")
    assert "rank 0 called all_reduce of float32[4], at" in text
    assert "rank 1 called all_reduce of float32[8], at" in text
    assert_line_named(text, "different_sizes")


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ("crossed", ["all_reduce 1 on tp (ranks 0, 1) of float32[6]", "receive 1 from rank 0"]),
        ("forgotten", ["all_reduce 1 on tp (ranks 0, 1) of float32[2, 3]", "barrier 1 on world"]),
    ],
)
def test_a_hang_names_ranks_collectives_and_lines(job, expected, tmp_path):
    codes, said = run_job(job, tmp_path)
    assert codes == [1, 1]
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["kind"] == "hang"
    for rank, wait in enumerate(expected):
        line = next(line for line in verdict["text"].splitlines() if f"rank {rank} (" in line)
        assert wait in line
    assert_line_named(verdict["text"], job)
    assert "the run hangs" in said[0] + said[1]
    for rank in range(2):
        waiting = json.loads((tmp_path / f"waiting-rank{rank}.json").read_text())
        assert waiting["waits"][0]["collective"] in expected[rank]


def test_different_collectives_end_with_a_comparison(tmp_path):
    codes, said = run_job("different_collectives", tmp_path)
    assert codes == [1, 1]
    together = said[0] + said[1]
    assert "all_reduce of float32[1000]" in together
    assert "broadcast of float32[1000]" in together
    assert "different collectives as number 1 on the group tp" in together


def test_a_slow_rank_is_not_accused(tmp_path):
    codes, said = run_job("slow", tmp_path, world_size=3)
    assert codes == [0, 0, 0], said
    assert {file.suffix for file in tmp_path.iterdir()} == {".log"}

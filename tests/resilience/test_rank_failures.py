"""One rank killed, stopped or raising: everybody ends soon, and the screen says who it was."""

from __future__ import annotations

import pytest

from tests.resilience.faults import LIMIT, run_with_fault

pytestmark = pytest.mark.slow


def test_a_killed_rank_is_named_and_all_end(tmp_path):
    outcome = run_with_fault(tmp_path, "killed", rank=1, step=3)
    assert outcome.code == 1
    assert outcome.first_line().startswith("rank 1 was killed (SIGKILL)")
    assert "rank1.log" in outcome.said
    assert outcome.seconds < LIMIT


def test_a_stopped_rank_is_named_with_what_it_did_last_and_all_end(tmp_path):
    outcome = run_with_fault(tmp_path, "stopped", rank=0, step=3)
    assert outcome.code == 1
    assert outcome.first_line().startswith("rank 0 (process ")
    assert "was stopped (SIGSTOP)" in outcome.first_line()
    assert ".py:" in outcome.first_line()
    assert "rank 1 " not in outcome.said.split("rank 0", 1)[1]
    assert outcome.seconds < LIMIT


def test_a_raising_rank_shows_its_own_error_first_and_all_end(tmp_path):
    outcome = run_with_fault(tmp_path, "raising", rank=1, step=4)
    assert outcome.code == 1
    assert outcome.first_line().startswith("rank 1 failed:")
    assert "ValueError: the disk of rank 1 says no" in outcome.said
    assert "Connection" not in outcome.said
    assert "the disk of rank 1 says no" in outcome.log(1)
    assert (outcome.run / "logs" / "rank0.log").exists()
    assert outcome.seconds < LIMIT


@pytest.mark.prove
def test_under_torchrun_the_ranks_watch_each_other(tmp_path):
    outcome = run_with_fault(tmp_path, "stopped", rank=0, step=3, torchrun=True)
    assert outcome.code == 1
    assert outcome.first_line().startswith("rank 0 (process ")
    assert "was stopped (SIGSTOP)" in outcome.first_line()
    assert outcome.seconds < LIMIT


def test_under_torchrun_a_raising_rank_speaks_first(tmp_path):
    outcome = run_with_fault(tmp_path, "raising", rank=1, step=4, torchrun=True)
    assert outcome.code == 1
    assert outcome.first_line().startswith("rank 1 failed:")
    assert "ValueError: the disk of rank 1 says no" in outcome.said
    assert outcome.seconds < LIMIT

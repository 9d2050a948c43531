"""Two workers on a CPU of which one has a third of a core: rows by speed beside an even split."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.prove


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_rows_by_speed_make_a_step_1_3_times_as_fast():
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "unequal.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    first, second = found["rows"]
    assert first + second == 16 and first > second
    assert found["even"] >= 1.3 * found["planned"], found

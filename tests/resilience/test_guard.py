"""A rank without others, whose launching process is killed."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil

LAUNCHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
time.sleep(600)
"""
WORKER = """
import os, time
from pathlib import Path
from trainwright.resilience.guard import watched
with watched(Path(".")):
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


def test_it_ends_with_it(tmp_path):
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, WORKER],
        cwd=tmp_path,
        env={**os.environ, "TORCHELASTIC_RUN_ID": "run"},
        stdout=subprocess.PIPE,
        text=True,
    )
    worker = psutil.Process(int(launcher.stdout.readline()))
    try:
        assert worker.is_running() and launcher.poll() is None
        launcher.kill()
        launcher.wait()
        worker.wait(timeout=60)  # raises where it goes on
    finally:
        launcher.kill()
        if worker.is_running():
            worker.kill()
        launcher.stdout.close()

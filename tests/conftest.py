"""What all tests share: no network, and the folder of real files where there is one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run beside each other: threads that spin while they wait would take the others' cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Plans follow what has been measured of a machine: tests are the same on every one.
_CACHE = tempfile.TemporaryDirectory(prefix="trainwright-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where tests run beside each other, files with slow ones first: none is left alone at last."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data files: `TRAINWRIGHT_SHARED`, or `shared/data` beside the repository."""
    folder = Path(os.environ.get("TRAINWRIGHT_SHARED", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data files are not here: {folder} (set TRAINWRIGHT_SHARED)")
    return folder

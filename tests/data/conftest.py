"""A cache that most tests of data share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.made import made_recipe, write_texts
from trainwright.data.prepare import prepare_data


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> Path:
    """A cache that holds the byte tokenizer, so that few tests import transformers."""
    folder = tmp_path_factory.mktemp("bytes")
    write_texts(folder)
    prepare_data(made_recipe(folder))
    return folder / "cache"

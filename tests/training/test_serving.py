"""What `serve` makes of runs: an adapter under the run's name, its base under the base's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import SHAPE
from tests.training.tuning import recipe_of, train
from trainwright.data.tokenizers import byte_tokenizer
from trainwright.errors import UserError
from trainwright.models.adapters import set_active
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.models.weights import initialise, new_model, save_model
from trainwright.training.artifacts import load_model
from trainwright.training.exporting import export_run
from trainwright.training.run_directory import RunDirectory
from trainwright.training.serving import open_served


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    shape = {**SHAPE, "max_position_embeddings": 256}
    model = new_model(decoder_config(new_hf_config("llama", shape, 260)))
    initialise(model, 1)
    save_model(model, folder / "small")
    byte_tokenizer().save_pretrained(str(folder / "small"))
    rows = [
        {"messages": [
            {"role": "user", "content": f"What is {n}?"},
            {"role": "assistant", "content": f"It is {n}."},
        ]}
        for n in range(20)
    ]  # fmt: skip
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tuned(folder: Path, **adapter: Any) -> RunDirectory:
    """A run that has trained an adapter of `small` for some steps."""
    path = folder / "-".join(["run", *adapter])
    sections = {"adapter": {"rank": 4, **adapter}, "run_directory": str(path)}
    return train(recipe_of(folder, folder / "small", folder / "chats.jsonl", **sections))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(10, 40)[None])


@pytest.mark.parametrize("adapter", [{}, {"init": "pissa"}, {"quantise": "nf4"}], ids=str)
def test_a_run_is_served_with_its_base_and_other_adapters(folder: Path, adapter: Any) -> None:
    run = tuned(folder, **adapter)
    other = folder / f"exported-{run.path.name}"
    export_run(run, other)
    served = open_served(run.path, {"again": other})
    name = run.path.name
    assert served.names == {name: ("default",), "small": (), "again": ("served_0",)}
    assert served.context == 256
    found = {}
    for each, names in served.names.items():
        set_active(served.model, names)
        found[each] = logits(served.model)
    assert torch.equal(found[name], logits(load_model(run.path)))
    torch.testing.assert_close(found["again"], found[name], rtol=1e-4, atol=1e-4)
    assert (found["small"] - found[name]).abs().max() > 1e-2
    if "quantise" not in adapter:
        plain = logits(load_model(folder / "small"))
        torch.testing.assert_close(found["small"], plain, rtol=1e-4, atol=1e-5)


def test_a_run_that_trained_whole_layers_is_served_alone(folder: Path) -> None:
    run = tuned(folder, train_also=["lm_head"])
    served = open_served(run.path)
    assert served.names == {run.path.name: ("default",)}
    with pytest.raises(UserError, match="train_also"):
        open_served(run.path, {"other": folder})

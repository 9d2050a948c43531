"""`trainwright export`: GGUF files of runs and models, and uploads to a hub that answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.checkpoint.hub_server import TOKEN, Hub, hub
from tests.training.runs import small_recipe, train_here
from trainwright.checkpoint.export import MARKER
from trainwright.cli.main import main
from trainwright.errors import UserError
from trainwright.recipe.load import dump_recipe
from trainwright.recipe.schema import Recipe
from trainwright.training.api import finish_run
from trainwright.training.artifacts import load_model
from trainwright.training.exporting import check_further, export_gguf, export_run
from trainwright.training.run_directory import RunDirectory


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    train_here(small_recipe(folder, training={"steps": 4}))
    return folder / "run"


@pytest.fixture(scope="module")
def adapted(run, tmp_path_factory) -> Path:
    """A run that trained an adapter on the first run's model."""
    folder = tmp_path_factory.mktemp("adapted")
    base = export_run(run, folder / "base")
    values = yaml.safe_load(dump_recipe(small_recipe(folder, training={"steps": 4})))
    values |= {"model": {"path": str(base)}, "tokenizer": None, "adapter": {"rank": 4}}
    train_here(Recipe.model_validate(values))
    return folder / "run"


def in_a_process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, and of a hub's variables none but those given."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**kept, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
    )


def logits(folder: Path, file: str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(torch.arange(40, 60)[None]).logits


def test_files_of_a_run_and_of_its_export_are_the_same(run, tmp_path) -> None:
    made = export_gguf(run, tmp_path / "a", kinds=["f32", "q8_0"], step=4)
    assert [file.name for file in made.files] == ["small-F32.gguf", "small-Q8_0.gguf"]
    with torch.no_grad():
        want = load_model(run)(torch.arange(40, 60)[None])
    assert (logits(made.folder, "small-F32.gguf") - want).abs().max() < 1e-5 * want.std()
    rough = (logits(made.folder, "small-Q8_0.gguf") - want).abs().max()
    assert 0 < rough < 0.1 * want.std()

    export_run(run, tmp_path / "small")
    again = export_gguf(tmp_path / "small", tmp_path / "b", kinds=["f32"])
    assert again.files[0].read_bytes() == made.files[0].read_bytes()
    _, front, body = (made.folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["trainwright", "next_token"],
    }
    assert "llama-cli -m small-F32.gguf" in body


def test_an_adapter_is_merged_first(adapted, tmp_path) -> None:
    made = export_gguf(adapted, tmp_path / "gguf", kinds=["f32"])
    with torch.no_grad():
        want = load_model(adapted)(torch.arange(40, 60)[None])
        base = load_model(adapted.parent / "base")(torch.arange(40, 60)[None])
    found = logits(made.folder, made.files[0].name)
    assert (found - want).abs().max() < 1e-4 * want.std()
    assert (found - base).abs().max() > 1e-2 * want.std()


def test_a_recipe_asks_for_more_at_the_end(run, tmp_path) -> None:
    shutil.copytree(run, tmp_path / "run")
    there = RunDirectory(tmp_path / "run")
    resolved = yaml.safe_load(there.resolved.read_text())
    resolved["export"] |= {"at_end": True, "gguf": ["q4_0", "f16"], "push": "me/model"}
    there.resolved.write_text(yaml.safe_dump(resolved))
    with pytest.raises(UserError, match=r"nothing is uploaded to me/model while HF_HUB_OFFLINE"):
        check_further(there)  # before the run, and it says so again when the run is done
    with pytest.raises(UserError, match="the run is finished, but nothing is uploaded"):
        finish_run(there)
    made = {file.name for file in (there.path / "gguf").iterdir()}
    assert made == {"small-Q4_0.gguf", "small-F16.gguf", "README.md", MARKER}
    assert (there.export / "model.safetensors").is_file()


def test_the_command_line_and_its_refusals(run, tmp_path, monkeypatch, capsys) -> None:
    def call(*arguments: object, expect: int = 0) -> str:
        monkeypatch.setattr("sys.argv", ["trainwright", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        said = capsys.readouterr()
        assert int(exit_.value.code or 0) == expect and "Traceback" not in said.err, said
        return " ".join((said.err if expect else said.out).split())

    told = call(run, tmp_path / "out", "--gguf", "q8_0", "--gguf", "f16")
    assert "out/small-F16.gguf (" in told and "out/small-Q8_0.gguf (" in told
    for arguments, reason in (
        (["--gguf", "q3_k"], "there is no GGUF type 'q3_k' here"),
        (["--gguf", "f16", "--dtype", "bf16"], "--gguf says the type"),
        (["--private"], "add --push OWNER/NAME"),
        (["--push", "me/model"], "while HF_HUB_OFFLINE is set"),
    ):
        assert reason in call(run, tmp_path / "made", *arguments, expect=2)
    monkeypatch.setitem(sys.modules, "gguf", None)
    told = call(run, tmp_path / "made", "--gguf", "f16", expect=2)
    assert "pip install 'trainwright[gguf]'" in told


@pytest.fixture
def server():
    with hub() as running:
        yield running


# What the command line does last, without the rest of it: importing torch takes its time.
PUSH = """
import sys
from pathlib import Path
from trainwright.checkpoint.hub import push
from trainwright.errors import UserError
folder, to, private = sys.argv[1:]
try:
    print(push([Path(folder)], to, private=private == "private", leave_out=["trainwright.json"]))
except UserError as error:
    sys.exit(f"refused: {error}")
"""


def push(
    folder: Path, to: str, server: Hub, private: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Push a folder to the server, in a process of its own."""
    here = {"HF_ENDPOINT": server.address, "HF_TOKEN": TOKEN, "HF_HOME": str(folder.parent)}
    return in_a_process("-c", PUSH, folder, to, private, **{**here, **environment})


def on_disk(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != MARKER}


def test_every_byte_of_an_export_arrives(run, tmp_path, server) -> None:
    told = in_a_process(
        *("-m", "trainwright", "export", run, tmp_path / "out"),
        *("--push", "me/model", "--private"),
        HF_ENDPOINT=server.address,
        HF_TOKEN=TOKEN,
        HF_HOME=str(tmp_path / "home"),
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines()[-1] == f"{server.address}/me/model"
    assert server.files["me/model"] == on_disk(tmp_path / "out")
    assert "model.safetensors" in server.files["me/model"] and server.private["me/model"]
    _, front, body = server.files["me/model"]["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "| objective | next_token |" in body and "| training loss | " in body

    # A second time it is there; GGUF files join it.
    made = export_gguf(run, tmp_path / "gguf", kinds=["q8_0"])
    told = push(made.folder, "me/model", server, "private")
    assert told.returncode == 0, told.stderr
    assert server.files["me/model"] == on_disk(tmp_path / "out") | on_disk(made.folder)
    assert server.commits == ["Upload from Trainwright"] * 2


def test_an_adapter_says_what_it_is(adapted, tmp_path, server) -> None:
    told = push(export_run(adapted, tmp_path / "out"), "me/adapter", server)
    assert told.returncode == 0, told.stderr
    assert not server.private["me/adapter"]
    card = server.files["me/adapter"]["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "peft" and "lora" in front["tags"]
    assert "base_model" not in front  # a folder of this machine means nothing on the hub
    assert "AutoPeftModelForCausalLM" in card


def test_uploads_that_fail_say_why(tmp_path, server) -> None:
    server.files["me/public"], server.private["me/public"] = {}, False
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "README.md").write_text("# a model\n")
    for to, private, environment, reason in (
        ("me/model", "", {"HF_TOKEN": ""}, "needs a token of the hub"),
        ("me/model", "", {"HF_TOKEN": "hf_wrong"}, "does not accept the token"),
        ("other/model", "", {}, "no right to write to other/model"),
        ("me/model", "", {"HF_HUB_OFFLINE": "1"}, "while HF_HUB_OFFLINE is set"),
        ("me/model", "", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "could not be reached"),
        ("me/public", "private", {}, "me/public is there already, and is public"),
        ("a/b/c", "", {}, "'a/b/c' is no name of a repository"),
    ):
        told = push(folder, to, server, private, **environment)
        assert told.returncode == 1 and "refused: " in told.stderr, (to, told.stderr)
        assert reason in told.stderr and "Traceback" not in told.stderr, told.stderr
    assert server.commits == []

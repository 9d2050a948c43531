"""`evaluate`, `generate`, `chat` and `export` on a run, and the same from Python."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import trainwright
from tests.training.runs import small_recipe, train_here
from trainwright.cli.main import main
from trainwright.data.prepare import open_data
from trainwright.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run that saved steps 20 and 40."""
    folder = tmp_path_factory.mktemp("verbs")
    train_here(
        small_recipe(
            folder,
            training={"steps": 40},
            checkpoint={"every": 20, "keep_last": 5},
            data={"packing": "concat"},
        )
    )
    return folder / "run"


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments: object, expect: int = 0) -> str:
        monkeypatch.setattr("sys.argv", ["trainwright", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        said = capsys.readouterr()
        assert int(exit_.value.code or 0) == expect, said
        assert "Traceback" not in said.err
        return said.out if expect == 0 else said.err

    return call


@pytest.fixture(scope="module")
def exported(run) -> Path:
    return trainwright.export(run)


def test_the_export_loads_in_transformers_with_our_logits(run, exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(exported)
    ours = trainwright.load_model(run)
    ids = AutoTokenizer.from_pretrained(exported)("the cat sat", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == theirs.config.bos_token_id
    with torch.no_grad():
        difference = (theirs(ids).logits - ours(ids)).abs().max()
    assert difference < 1e-5


def test_the_export_loads_again_here_bit_for_bit(run, exported):
    from_run, from_export = trainwright.load_model(run), trainwright.load_model(exported)
    for (name, a), (_, b) in zip(
        from_run.named_parameters(), from_export.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_saved_model_loads_in_transformers_and_saves_again_to_the_same_bytes(run, tmp_path):
    from transformers import AutoModelForCausalLM

    model = trainwright.load_model(run)
    (first,) = trainwright.save_model(model, tmp_path / "one")
    again = trainwright.load_model(tmp_path / "one")
    (second,) = trainwright.save_model(again, tmp_path / "two")
    assert first.read_bytes() == second.read_bytes()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-5


def test_an_earlier_step_is_another_model(run, command, tmp_path):
    command("export", run, tmp_path / "early", "--step", 20, "--dtype", "bf16")
    early = trainwright.load_model(tmp_path / "early")
    late = trainwright.load_model(run)
    assert not torch.equal(early.model.norm.weight, late.model.norm.weight)
    config = json.loads((tmp_path / "early" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "step" in (tmp_path / "early" / "README.md").read_text()


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(run, command):
    assert "20, 40" in command("export", run, "--step", 33, expect=2)
    assert "20, 40" in command("evaluate", run, "--step", 33, expect=2)


def test_evaluate_scores_the_held_out_documents_as_transformers_does(run, exported, command):
    from transformers import AutoModelForCausalLM

    told = json.loads(command("evaluate", run, "--json"))["validation"]
    model = AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager")
    batches = open_data(run).validation["validation"]
    total, targets = 0.0, 0
    for row in range(batches.rows):
        batch = batches.read([row])
        segments = batch.segment_ids[0] if batch.segment_ids is not None else [0] * 64
        for segment in sorted({s for s in segments if s >= 0}):
            places = torch.tensor([i for i, s in enumerate(segments) if s == segment])
            ids = torch.from_numpy(batch.input_ids[0])[places][None]
            labels = torch.from_numpy(batch.labels[0])[places]
            with torch.no_grad():
                logits = model(ids).logits[0].double()
            loss = torch.nn.functional.cross_entropy(
                logits, labels, ignore_index=-100, reduction="sum"
            )
            total, targets = total + loss.item(), targets + int((labels >= 0).sum())
    assert told["targets"] == targets
    assert told["loss"] == pytest.approx(total / targets, rel=1e-5)
    assert told["bits_per_byte"] == pytest.approx(total / math.log(2) / batches.text_bytes)


def test_evaluate_takes_any_text_and_any_model(exported, command, tmp_path):
    text = tmp_path / "new.txt"
    text.write_text("the cat sat on a mat and saw one red ball\n" * 20)
    told = json.loads(command("evaluate", exported, "--data", text, "--json"))
    ((name, result),) = told.items()
    assert name == "new"
    assert 0 < result["loss"] < 7
    assert "--data" in command("evaluate", exported, expect=2)


def test_generate_streams_one_prompt_and_completes_several(run, command):
    one = command("generate", run, "the cat", "--temperature", 0, "--max-new-tokens", 12)
    assert one.startswith("the cat")
    several = command(
        "generate", run, "the cat", "one red", "--temperature", 0, "--max-new-tokens", 12
    )
    assert several.startswith(one.rstrip("\n"))
    assert "one red" in several


def test_generate_from_python_is_what_transformers_generates(run, exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (mine,) = trainwright.generate(run, "a mat", temperature=0, max_new_tokens=20)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported)
    ids = tokenizer("a mat", return_tensors="pt")
    theirs = model.generate(**ids, do_sample=False, max_new_tokens=20)[
        0, ids["input_ids"].shape[1] :
    ]
    assert list(mine.token_ids) == theirs.tolist()


def test_chat_needs_a_template_and_uses_the_one_given(run, command, monkeypatch, tmp_path):
    assert "no chat template" in command("chat", run, expect=2)
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n\n"))
    options = ("--template", template, "--max-new-tokens", 5, "--temperature", 0)
    output = command("chat", run, *options)
    assert output.count("model> ") == 2


def test_a_template_cannot_run_code(run, command, monkeypatch, tmp_path):
    template = tmp_path / "evil.jinja"
    target = tmp_path / "owned"
    template.write_text(
        "{{ messages.__class__.__base__.__subclasses__() }}"
        f"{{{{ cycler.__init__.__globals__.os.system('touch {target}') }}}}"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n"))
    monkeypatch.setattr("sys.argv", ["trainwright", "chat", str(run), "--template", str(template)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert not target.exists()


def test_a_folder_that_is_no_model_is_named(command, tmp_path):
    assert "config.json" in command("generate", tmp_path, "x", expect=2)
    assert "nothing-here" in command("generate", tmp_path / "nothing-here", "x", expect=2)


def test_python_says_the_same_as_the_command_line(tmp_path):
    with pytest.raises(UserError, match="no run of Trainwright"):
        trainwright.export(tmp_path)

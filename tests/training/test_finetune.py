"""Fine-tuning from files to a finished model: adapters beside PEFT, resumed runs, refused rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import assemble_here
from tests.training.tuning import THIN, recipe_of, records, saved, train
from tests.workers import run_on
from trainwright.data.opening import open_data
from trainwright.errors import UserError
from trainwright.rollout.engine import generate
from trainwright.rollout.sampling import SamplingParams
from trainwright.training import assemble as assembling
from trainwright.training.artifacts import load_model, open_model
from trainwright.training.exporting import export_run
from trainwright.training.run_directory import RunDirectory


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / "base", THIN, seed=1)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    file = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [
            {"role": "user", "content": f"What is {n} + {n}?"},
            {"role": "assistant", "content": f"It is {2 * n}."},
        ]}
        for n in range(40)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "plus_ratio": 4},
    "dora": {"rank": 4, "dora": True, "targets": ["q_proj", "down_proj"]},
    "pissa": {"rank": 4, "init": "pissa"},
    "head": {"rank": 4, "targets": ["v_proj", "embed_tokens"], "train_also": ["lm_head"]},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_what_peft_loads_and_what_merging_makes(name, base, chats, tmp_path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    run = train(recipe_of(tmp_path, base, chats, adapter=ADAPTERS[name]))
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    export_run(run, tmp_path / "adapter")
    export_run(run, tmp_path / "merged", merge=True)

    ids = torch.arange(10, 40)[None]
    ours = load_model(run.path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(str(base)).eval()
    with torch.no_grad():
        unchanged = plain(ids).logits
        theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
        wanted = theirs(ids).logits
        torch.testing.assert_close(ours(ids), wanted, rtol=1e-4, atol=1e-5)
        assert (wanted - unchanged).abs().max() > 1e-2  # it has learnt something
        merged = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged")).eval()
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    saved = (tmp_path / "adapter" / "chat_template.jinja").read_text()
    assert "assistant" in saved or "message" in saved


@pytest.mark.parametrize("quantise", ["nf4", "int8"])
def test_a_quantised_base_learns_below_where_it_began(quantise, base, chats, tmp_path) -> None:
    recipe = recipe_of(
        tmp_path, base, chats, adapter={"rank": 4, "quantise": quantise}, training={"steps": 12}
    )
    run = train(recipe)
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    assert losses[-1] < losses[0] - 0.2
    size = sum(file.stat().st_size for file in run.checkpoints.rglob("*") if file.is_file())
    assert size < 2 * sum(file.stat().st_size for file in base.iterdir())  # no copy of the base


LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {"workers": 1},
    "replicas": {"workers": 2, "dp_replicate": 2},
    "shards": {"workers": 2, "dp_shard": 2},
    "tensors": {"workers": 2, "tp": 2},
    "stages": {"workers": 2, "pp": 2, "schedule": "1f1b", "micro_batch": 1},
}


def losses_in_bf16(
    folder: str, base: str, source: str, name: str, adapter: dict, wide: bool
) -> list[float]:
    """Losses of an adapter's run, its frozen base held in bf16, or in fp32 if `wide`."""
    recipe = recipe_of(
        Path(folder), Path(base), Path(source), adapter=adapter, training={"precision": "bf16"},
        parallel={**LAYOUTS[name], "threads": 1}, run_directory=f"{folder}/{name}-{wide}",
    )  # fmt: skip
    held, narrow = torch.float32 if wide else torch.bfloat16, assembling.narrow_frozen
    if wide:
        assembling.narrow_frozen = lambda model, dtype: None
    try:
        made = assemble_here(recipe)
    finally:
        assembling.narrow_frozen = narrow
    named = made.trainer.step.spread.named_parameters()
    assert {weight.dtype for name, weight in named if "o_proj" in name} == {held}
    made.close(made.trainer.run())
    return [each["loss"] for each in records(RunDirectory(Path(folder) / f"{name}-{wide}"), "step")]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_frozen_base_in_the_type_of_products_changes_no_bit(name, base, chats, tmp_path) -> None:
    adapter = {"rank": 4, "targets": ["q_proj", "embed_tokens", "down_proj"]}
    if name == "stages":
        adapter["targets"] = ["q_proj", "down_proj"]
    paths = (str(tmp_path), str(base), str(chats))
    workers = LAYOUTS[name]["workers"]
    narrow, *_ = run_on(workers, losses_in_bf16, *paths, name, adapter, False)
    wide, *_ = run_on(workers, losses_in_bf16, *paths, name, adapter, True)
    assert narrow == wide


def test_a_run_with_an_adapter_goes_on_to_the_same_bits(base, chats, tmp_path) -> None:
    adapter = {"rank": 4, "init": "pissa"}
    whole = train(
        recipe_of(tmp_path, base, chats, adapter=adapter, run_directory=str(tmp_path / "a"))
    )
    broken = recipe_of(tmp_path, base, chats, adapter=adapter, run_directory=str(tmp_path / "b"))
    train(broken, steps=3)
    again = train(broken)
    one, other = load_model(whole.path), load_model(again.path)
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert a.equal(b), name


def test_the_reference_of_dpo_is_the_model_without_its_adapter(base, tmp_path) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n} + 1 = ", "chosen": str(n + 1), "rejected": str(n)} for n in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = {}
    head = {"rank": 4, "train_also": ["lm_head"]}
    for name, adapter in (("adapter", {"rank": 4}), ("head", head), ("whole", None)):
        recipe = recipe_of(
            tmp_path, base, file, adapter=adapter, objective={"kind": "dpo"},
            run_directory=str(tmp_path / name),
        )  # fmt: skip
        run = train(recipe)
        lines = (run.path / "metrics.jsonl").read_text().splitlines()
        steps = [record for record in map(json.loads, lines) if record["kind"] == "step"]
        losses[name] = [record["loss"] for record in steps]
        assert losses[name][0] == pytest.approx(0.6931472, abs=1e-6)
        assert losses[name][-1] < 0.68
        assert steps[-1]["rewards/accuracies"] > 0.6
        evaluated = [r for r in map(json.loads, lines) if r["kind"] == "evaluation"]
        assert 0 <= evaluated[-1]["rewards/accuracies"] <= 1
        load_model(run.path)  # the reference's own head is not in its checkpoint
    assert losses["adapter"] != losses["whole"]


def write_pairs(file: Path, rows: int = 30) -> Path:
    pairs = [
        {"prompt": f"{n}? ", "chosen": f"yes {n}", "rejected": f"no {n}", "margin": n / rows}
        for n in range(rows)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return file


@pytest.mark.parametrize("adapter", [None, {"rank": 4}], ids=["whole", "adapter"])
def test_a_reward_model_is_what_transformers_and_peft_load(adapter, base, tmp_path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    classifier = transformers.AutoModelForSequenceClassification
    recipe = recipe_of(
        tmp_path, base, write_pairs(tmp_path / "pairs.jsonl"), adapter=adapter,
        objective={"kind": "reward", "center": 0.01}, training={"steps": 12},
    )  # fmt: skip
    run = train(recipe)
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "step"]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.05
    assert steps[-1]["rewards/accuracies"] > 0.7
    export_run(run, tmp_path / "out")
    if adapter:
        export_run(run, tmp_path / "merged", merge=True)

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    asked = ("7? yes 7", "7? no 7", "17")
    texts = tokenizer(list(asked), padding=True, return_tensors="pt")
    ours = load_model(run.path)
    with torch.no_grad():
        alone = [ours(tokenizer(text, return_tensors="pt")["input_ids"])[0, -1] for text in asked]
        folder = str(tmp_path / ("merged" if adapter else "out"))
        theirs = classifier.from_pretrained(folder).eval()
        assert theirs.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
        found = theirs(**texts).logits[:, 0]
        torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=1e-5)
        if adapter:
            plain = classifier.from_pretrained(str(base), num_labels=1)
            plain.config.pad_token_id = tokenizer.pad_token_id
            adapted = peft.PeftModel.from_pretrained(plain, str(tmp_path / "out")).eval()
            assert adapted.peft_config["default"].task_type == "SEQ_CLS"
            found = adapted(**texts).logits[:, 0]
            torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=1e-5)
    if not adapter:  # and it can be trained on, but asked for no text
        for made in (run.path, tmp_path / "out"):
            with pytest.raises(UserError, match="is a reward model"):
                open_model(made)
        again = recipe_of(
            tmp_path, tmp_path / "out", tmp_path / "pairs.jsonl", objective="reward",
            training={"steps": 1}, optimizer={"learning_rate": 1e-9},
            run_directory=str(tmp_path / "again"),
        )  # fmt: skip
        further = load_model(train(again).path)
        torch.testing.assert_close(further.score.weight, ours.score.weight)


@pytest.mark.parametrize("chat", [None, False])
def test_samples_are_asked_as_the_model_was_taught(chat, base, chats, tmp_path) -> None:
    samples = {"prompts": ["What is 2 + 2?"], "max_new_tokens": 8, "temperature": 0, "chat": chat}
    run = train(recipe_of(tmp_path, base, chats, evaluation={"samples": samples}))
    *_, sample = records(run, "sample")
    opened = open_model(run.path)
    turn = [{"role": "user", "content": "What is 2 + 2?"}]
    ids = opened.tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_dict=False,
        tokenizer_kwargs={"split_special_tokens": False},
    )  # fmt: skip
    prompt = "What is 2 + 2?" if chat is False else ids
    params = SamplingParams(max_new_tokens=8, temperature=0)
    [completion] = generate(opened.model, opened.tokenizer, [prompt], params)
    assert sample["completion"] == completion.text


def test_answers_end_where_the_template_ends_them(base, chats, tmp_path) -> None:
    # The tokenizer's EOS is not what this template ends a turn with, but another token.
    template = (
        "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}<pad>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    file = tmp_path / "own.jinja"
    file.write_text(template)
    recipe = recipe_of(
        tmp_path, base, chats, tokenizer={"path": "bytes", "chat_template": str(file)},
        training={"steps": 1},
    )  # fmt: skip
    run = train(recipe)
    assert (run.tokenizer / "chat_template.jinja").read_text() == template
    opened = open_model(run.path)
    assert opened.model.stop_token_ids[-1] == opened.tokenizer.convert_tokens_to_ids("<pad>")
    export_run(run, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert set(written["eos_token_id"]) >= {257, 258}
    ids = opened.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    assert ids[:2] == [256, ord("u")]  # special tokens are tokens, not their letters


def test_frozen_parameters_stay_as_they_were(base, chats, tmp_path) -> None:
    recipe = recipe_of(
        tmp_path, base, chats, training={"freeze": ["embed_tokens", "layers.0.*"], "steps": 3}
    )
    trained, start = load_model(train(recipe).path), load_model(base)
    values = dict(start.named_parameters())
    for name, parameter in trained.named_parameters():
        frozen = "embed_tokens" in name or "layers.0." in name
        assert parameter.equal(values[name]) == frozen, name


def test_rows_that_cannot_be_trained_on_are_named(base, tmp_path) -> None:
    file = tmp_path / "mixed.jsonl"
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = [good, {"messages": [{"role": "user", "content": "only asked"}]}, good, good, good]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as refused:
        train(recipe_of(tmp_path, base, file))
    mistake, all_of_them = refused.value.mistakes
    assert mistake.where == "mixed.jsonl:2" and mistake.fix
    assert "1 of 5 rows" in all_of_them.what and "bad_rows" in all_of_them.fix
    recipe = recipe_of(
        tmp_path, base, file, data={"bad_rows": "drop", "validation": 0}, training={"steps": 1}
    )
    data = open_data(train(recipe).path)
    assert data.train.documents == 4
    assert data.summary[0].dropped == 1


def test_what_is_too_long_is_cut_or_left_out_and_never_loses_its_target(base, tmp_path) -> None:
    file = tmp_path / "long.jsonl"
    rows = [
        {"prompt": "short ", "completion": "answer"},
        {"prompt": "p" * 20, "completion": "c" * 300},  # loses its end
        {"prompt": "p" * 300, "completion": "c"},  # would lose its target
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, lost = {}, {}
    for too_long in ("cut", "drop"):
        recipe = recipe_of(
            tmp_path, base, file, data={"too_long": too_long, "validation": 0},
            training={"steps": 1}, run_directory=str(tmp_path / too_long),
        )  # fmt: skip
        data = open_data(train(recipe).path)
        documents[too_long] = [each.name for each in data.train.listed(9)]
        assert data.train.targets == data.train.read(range(data.train.rows)).weight
        lost[too_long] = (data.summary[0].lost, data.summary[0].lost_rows)
        assert all(stream.corpus.lengths.max() <= 128 for stream in data.train.streams)
    assert documents == {"cut": ["long.jsonl:1", "long.jsonl:2"], "drop": ["long.jsonl:1"]}
    assert lost["cut"][0] == {"cut": 1, "too long": 1}
    assert lost["cut"][1] == {"cut": ["long.jsonl:2"], "too long": ["long.jsonl:3"]}
    assert lost["drop"] == ({"too long": 2}, {"too long": ["long.jsonl:2", "long.jsonl:3"]})

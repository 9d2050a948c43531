"""Importing: command lines, defaults against the tools' own, refusals, and odd values."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from trainwright.errors import UserError
from trainwright.recipe.importers import Imported, import_config, import_document, to_yaml
from trainwright.recipe.importers.notes import leaves
from trainwright.recipe.yaml_text import Document, parse

FOREIGN = Path(__file__).parent / "foreign"
YAML_EXAMPLES = sorted(FOREIGN.glob("*.yaml"))


def from_text(folder: Path, text: str, **options: Any) -> Imported:
    file = folder / "config.yml"
    file.write_text(text)
    return import_config(file, **options)


def note_kinds(result: Imported) -> dict[str, str]:
    return {note.key: note.kind for note in result.notes}


def test_a_command_line_with_a_launcher() -> None:
    result = import_config(FOREIGN / "trl_sft.sh")
    assert result.tool == "trl"
    recipe = result.recipe
    assert recipe["model"] == {"path": "Qwen/Qwen2-0.5B"}
    assert recipe["parallel"] == {"workers": 2, "zero": 3}
    assert recipe["training"]["batch_sequences"] == 2 * 8 * 2
    assert recipe["training"]["precision"] == "fp16"
    assert recipe["adapter"] == {
        "rank": 32,
        "alpha": 16,
        "dropout": 0.05,
        "targets": ["q_proj", "k_proj", "v_proj"],
        "quantise": "nf4",
    }
    assert recipe["data"]["packing"] == "best-fit"
    words = (FOREIGN / "trl_sft.sh").read_text().replace("=", " ").split()
    given = {word.lstrip("-").removeprefix("no_") for word in words if word.startswith("--")}
    assert given <= set(note_kinds(result))
    assert note_kinds(result)["eos_token"] == "unsupported"


def test_a_push_to_the_hub_needs_a_name(tmp_path: Path) -> None:
    line = "trl sft --model_name_or_path m --dataset_name d --push_to_hub"
    named, bare = f"{line} --hub_model_id me/tuned --hub_private_repo", line
    for text, export in ((named, {"push": "me/tuned", "private": True}), (bare, None)):
        file = tmp_path / "run.sh"
        file.write_text(text + "\n")
        result = import_config(file)
        assert result.recipe.get("export") == export
        assert (note_kinds(result)["push_to_hub"] == "unsupported") == (export is None)


def test_a_command_line_as_words_and_as_json(tmp_path: Path) -> None:
    words = json.loads((FOREIGN / "trl_reward.json").read_text())
    words[1] = "dpo"
    words = [word for word in words if "center_rewards" not in word and word != "0.01"]
    file = tmp_path / "trl_dpo.json"
    file.write_text(json.dumps(words))
    from_words, from_file = import_config(words), import_config(file)
    assert from_words.recipe == from_file.recipe
    assert from_words.recipe["objective"]["kind"] == "dpo"
    assert from_words.recipe["tracking"]["to"] == ["tensorboard", "wandb"]
    assert from_words.recipe["optimizer"]["learning_rate"] == 1e-5
    assert {note.where for note in from_words.notes} == {"command line", ""}


def test_a_command_line_goes_before_its_file(tmp_path: Path) -> None:
    file = tmp_path / "dpo.yaml"
    file.write_text("model_name_or_path: a/b\nbeta: 0.3\nlearning_rate: 1e-6\n")
    result = import_config(["trl", "dpo", "--config", str(file), "--beta=0.5", "--use-peft"])
    assert result.recipe["objective"] == {"kind": "dpo", "beta": 0.5, "loss": "sigmoid"}
    assert result.recipe["adapter"]["rank"] == 16
    places = {note.key: note.where for note in result.notes}
    assert places["learning_rate"] == f"{file}:3"
    assert places["beta"] == "command line"


@pytest.mark.parametrize(
    ("words", "loss"),
    [
        (["--loss_type", "exo_pair"], "exo"),
        (["--loss_type", "apo_zero"], "apo_zero"),
        (["--label_smoothing", "0.1"], "cdpo"),
        (["--loss_type", "robust", "--label_smoothing", "0.1"], "robust"),
        (["--rpo_alpha", "0.5"], {"sigmoid": 1.0, "sft": 0.5}),
        (
            ["--loss_type", "sigmoid", "bco_pair", "--loss_weights", "0.8", "0.2"],
            {"sigmoid": 0.8, "bco": 0.2},
        ),
    ],
)
def test_trl_s_dpo_losses(words: list[str], loss: Any) -> None:
    result = import_config(["trl", "dpo", "--model_name_or_path", "a/b", *words])
    assert result.recipe["objective"]["loss"] == loss


@pytest.mark.parametrize(
    ("rl", "objective"),
    [
        ("ipo", {"kind": "dpo", "loss": "ipo", "beta": 0.1}),
        ("orpo\norpo_alpha: 0.2", {"kind": "orpo", "beta": 0.2}),
        (
            "simpo\nsimpo_gamma: 0.7\ncpo_alpha: 0",
            {"kind": "simpo", "beta": 0.1, "margin": 0.7, "sft_weight": 0},
        ),
        (
            "dpo\nrpo_alpha: 0.5\ndpo_beta: 0.3",
            {"kind": "dpo", "beta": 0.3, "loss": {"sigmoid": 1.0, "sft": 0.5}},
        ),
    ],
)
def test_axolotl_s_preferences(tmp_path: Path, rl: str, objective: dict[str, Any]) -> None:
    text = f"base_model: a/b\nrl: {rl}\nlearning_rate: 1e-5\ndatasets: [{{path: d, type: x}}]\n"
    assert from_text(tmp_path, text).recipe["objective"] == objective


@pytest.mark.parametrize(
    ("setting", "parallel"),
    [
        ("deepspeed: {zero_optimization: {stage: 1}}", {"zero": 1}),
        (
            "deepspeed: {zero_optimization: {stage: 3, offload_param: {device: cpu}}}",
            {"zero": 3, "offload": "parameters"},
        ),
        ("deepspeed: ds_z0.json", None),
        ("deepspeed: written.json", {"zero": 2, "offload": "optimizer"}),
        ("fsdp: shard_grad_op auto_wrap", {"zero": 2}),
        ("fsdp: [hybrid_shard, offload]", {"zero": 3, "offload": "parameters"}),
        ("fsdp_config: {reshard_after_forward: true}", {"zero": 3}),
        ("dp_shard_size: 4\ntensor_parallel_size: 2", {"dp_shard": 4, "tp": 2}),
    ],
)
def test_how_the_work_is_spread(tmp_path: Path, setting: str, parallel: Any) -> None:
    settings = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "written.json").write_text(json.dumps(settings))
    text = f"base_model: a/b\nlearning_rate: 1e-5\n{setting}\n"
    assert from_text(tmp_path, text).recipe.get("parallel") == parallel


@pytest.mark.parametrize(
    ("settings", "parallel"),
    [
        (
            "distributed_type: DEEPSPEED\n"
            "deepspeed_config: {zero_stage: 2, offload_optimizer_device: cpu}\n",
            {"zero": 2, "offload": "optimizer"},
        ),
        (
            "distributed_type: FSDP\n"
            "fsdp_config: {fsdp_reshard_after_forward: true, fsdp_offload_params: true}\n",
            {"zero": 3, "offload": "parameters"},
        ),
        ("distributed_type: MULTI_GPU\n", None),
    ],
)
def test_accelerate_s_file(tmp_path: Path, settings: str, parallel: Any) -> None:
    file = tmp_path / "zero1.yaml"  # what it says goes before what it is called
    file.write_text(settings)
    words = ["accelerate", "launch", f"--config_file={file}", "scripts/sft.py"]
    recipe = import_config([*words, "--model_name_or_path", "a/b"]).recipe
    assert recipe.get("parallel") == parallel


def test_torchtune_s_references(tmp_path: Path) -> None:
    text = """\
root: /data
output_dir: ${root}/out
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer,
               checkpoint_dir: "${output_dir}/../model", model_type: "${nowhere.at_all}"}
dataset: {_component_: torchtune.datasets.text_completion_dataset, source: text,
          data_files: "${root}/a.txt", column: body}
"""
    result = from_text(tmp_path, text)
    assert result.recipe["run_directory"] == "/data/out"
    assert result.recipe["model"] == {"path": "/data/out/../model"}
    assert result.recipe["data"]["sources"] == [{"path": "/data/a.txt", "field": "body"}]
    assert result.recipe["objective"] == {"kind": "next_token"}
    assert note_kinds(result)["root"] == "unsupported"


def test_alpaca_s_wording_is_for_all_data_sets_or_none(tmp_path: Path) -> None:
    alone = "base_model: a/b\nlearning_rate: 1e-5\ndatasets:\n  - {path: a, type: alpaca}\n"
    assert from_text(tmp_path, alone).recipe["tokenizer"] == {"chat_template": "alpaca"}
    mixed = from_text(tmp_path, alone + "  - {path: b, type: chat_template}\n")
    assert "tokenizer" not in mixed.recipe
    assert note_kinds(mixed)["datasets.0.type"] == "approximated"
    named = from_text(tmp_path, alone + "chat_template: chatml\n")
    assert named.recipe["tokenizer"] == {"chat_template": "chatml"}


def test_axolotl_s_own_names_of_turns(tmp_path: Path) -> None:
    text = """\
base_model: a/b
learning_rate: 1e-5
datasets:
  - path: d.jsonl
    type: chat_template
    field_messages: dialogue
    message_property_mappings: {role: speaker, content: said}
"""
    assert from_text(tmp_path, text).recipe["data"]["sources"] == [
        {
            "path": "d.jsonl",
            "format": "messages",
            "columns": {"messages": "dialogue", "role": "speaker", "content": "said"},
        }
    ]


def test_a_tool_may_be_named(tmp_path: Path) -> None:
    text = "model_name_or_path: a/b\nlearning_rate: 3e-5\n"
    with pytest.raises(UserError, match="no tool is known by these keys"):
        from_text(tmp_path, text)
    named = from_text(tmp_path, text, tool="llama-factory")
    assert named.recipe["optimizer"]["learning_rate"] == 3e-5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base_model: a\nrl: grpo\n", "config.yml:2: rl: `grpo`: there is no training by rewards"),
        ("base_model: a\nprocess_reward_model: true\n", "config.yml:2: process_reward_model"),
        ("base_model: a\nadapter: llama-adapter\n", "`llama-adapter` is not known"),
        ("model_name_or_path: a\nstage: ppo\n", "config.yml:2: stage: there is no training in"),
        ("model_name_or_path: a\nstage: sft\nfinetuning_type: oft\n", "`oft` is not known"),
        ("model_name_or_path: a\nstage: dpo\npref_loss: kto_pair\n", "kto_pair"),
        ("model_name_or_path: a\nstage: sft\nwarmup_steps: many\n", "config.yml:3: warmup_steps"),
        ("loss: {_component_: torchtune.rlhf.loss.PPOLoss}\n", "PPOLoss"),
        ("model: {_component_: torchtune.models.llama3_2_vision.x_vision}\n", "text only"),
        ("model_name_or_path: a\ndataset_name: b\nnum_generations: 8\n", "`trl grpo`"),
        ("model: {path: x}\ntraining: {steps: 1}\n", "a recipe of Trainwright's already"),
        ("a: 1\n", "no tool is known by these keys"),
        ("- a\n", "a configuration is a section of keys"),
        ("", "a configuration is a section of keys"),
        ("a: [1\n", "a bracket is opened"),
        ("torchrun --nproc_per_node 2 train.py --x 1\n", "not a command line of TRL's"),
        ("trl --x 1\n", "`trl` has no command"),
        ("trl sft stray --x 1\n", "`stray` belongs to no option"),
        ("trl gkd --model_name_or_path a\n", "no teacher"),
    ],
)
def test_refusals(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        from_text(tmp_path, text)
    assert said in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        import_config(tmp_path / "none.yml")
    with pytest.raises(UserError, match="cannot be read"):
        import_config(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        import_config(tmp_path / "binary")


def test_a_key_given_twice_is_told(tmp_path: Path) -> None:
    result = from_text(tmp_path, "base_model: a/b\nlearning_rate: 1e-5\nlearning_rate: 1e-4\n")
    twice = [note for note in result.notes if note.key == "learning_rate"]
    assert [note.kind for note in twice] == ["translated", "unsupported"]
    assert "given twice" in twice[1].reason


ODD = ["", "word", "a b, c", True, -1, [], ["a"], [1, 2], [{"a": 1}], {}, {"a": {}}]


@pytest.mark.parametrize("file", YAML_EXAMPLES, ids=lambda file: file.stem)
def test_odd_values_are_told_of_or_refused(file: Path) -> None:
    """Whatever stands behind a key: a note for it, or a mistake; never a failure of ours."""
    tree = parse(file.read_text(), file.name).value
    read = 0
    for key in dict.fromkeys([*tree, *leaves(tree)]):
        for odd in ODD:
            changed = copy.deepcopy(tree)
            *around, last = key.split(".")
            here = changed
            for part in around:
                here = here[int(part)] if isinstance(here, list) else here[part]
            here[int(last) if isinstance(here, list) else last] = odd
            try:
                result = import_document(Document(value=changed), str(file))
            except UserError:
                continue
            noted = set(note_kinds(result))
            for leaf in leaves(changed):
                parts = leaf.split(".")
                assert {".".join(parts[: n + 1]) for n in range(len(parts))} & noted, (key, odd)
            read += 1
            if read % 200 == 0:  # parsing takes most of the time
                assert parse(to_yaml(result), "written").value == result.recipe, (key, odd)
    assert read > 100


# transformers' defaults under our keys, for the tools that stand on them.
DEFAULTS = {
    "learning_rate": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_sequences",
    "lr_scheduler_type": "schedule.name",
    "warmup_steps": "schedule.warmup",
}


def test_what_is_left_out_is_transformers_default(tmp_path: Path) -> None:
    arguments = pytest.importorskip("transformers").TrainingArguments
    defaults = {field.name: field.default for field in dataclasses.fields(arguments)}
    recipe = from_text(tmp_path, "model_name_or_path: a/b\nstage: sft\n").recipe
    for theirs, ours in DEFAULTS.items():
        section, _, key = ours.partition(".")
        assert recipe[section][key] == defaults[theirs]
    betas = [defaults["adam_beta1"], defaults["adam_beta2"]]
    assert recipe["optimizer"]["betas"] == betas


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["sft", "dpo", "kto"])
def test_trl_s_arguments_are_all_known(verb: str) -> None:
    """Every argument of the installed TRL, given its default, and the defaults left out."""
    trl = pytest.importorskip("trl")
    kinds = {"sft": "SFTConfig", "dpo": "DPOConfig", "kto": "KTOConfig"}
    classes = [getattr(trl, kinds[verb]), trl.ModelConfig, trl.ScriptArguments]
    fields = [field for each in classes for field in dataclasses.fields(each)]
    words = ["trl", verb, "--use_peft", "--model_name_or_path", "a/b"]
    for name in sorted({field.name for field in fields}):
        if name not in ("use_peft", "model_name_or_path"):
            words += [f"--{name}", "sigmoid" if name == "loss_type" else "1"]
    for note in import_config(words).notes:
        assert note.reason != "not known", note.key
    plain = import_config(["trl", verb, "--model_name_or_path", "a/b", "--use_peft"]).recipe
    defaults = {field.name: field.default for field in fields}
    pair = 1 if verb == "sft" else 2
    assert plain["optimizer"]["learning_rate"] == defaults["learning_rate"]
    assert plain["data"]["sequence_length"] == pair * defaults["max_length"]
    assert plain["adapter"]["rank"] == defaults["lora_r"]
    assert plain["adapter"]["alpha"] == defaults["lora_alpha"]
    assert plain["adapter"]["dropout"] == defaults["lora_dropout"]
    assert plain["training"]["recompute"] == "full"
    assert defaults["gradient_checkpointing"] is True


@pytest.mark.shared
def test_llama_factory_s_own_list(shared: Path, tmp_path: Path) -> None:
    info = (shared / "instruct" / "lf_dataset_info.json").read_text()
    (tmp_path / "dataset_info.json").write_text(info)
    names = [name for name, entry in json.loads(info).items() if "tags" not in entry]
    text = f"model_name_or_path: a/b\nstage: sft\ntemplate: llama3\ndataset: {','.join(names)}\n"
    result = from_text(tmp_path, text)
    sources = dict(zip(names, result.recipe["data"]["sources"], strict=True))
    assert sources["identity"] == {"path": "identity.json", "format": "alpaca"}
    assert sources["lima"] == {"path": "llamafactory/lima", "format": "sharegpt"}
    assert sources["firefly"] == {
        "path": "YeungNLP/firefly-train-1.1M",
        "format": "alpaca",
        "columns": {"instruction": "input", "output": "target"},
    }
    assert sources["dpo_mix_en"]["format"] == "preference"
    assert sources["dpo_mix_en"]["subset"] == "en"
    doubt = next(note for note in result.notes if note.key == "dataset")
    assert doubt.kind == "approximated"
    assert "images cannot be read" in doubt.reason
    assert "not on the Hugging Face hub" in doubt.reason


def test_names_that_other_rooms_know() -> None:
    """Templates, losses, formats and columns that importers write are there to be taken."""
    from trainwright.data.formats import COLUMNS
    from trainwright.data.templates_named import NAMED_TEMPLATES
    from trainwright.recipe.importers import templates, trl
    from trainwright.recipe.objective import PREFERENCE_LOSSES

    assert {ours for ours, _ in templates.NAMED.values()} <= set(NAMED_TEMPLATES)
    assert set(trl.LOSSES.values()) <= set(PREFERENCE_LOSSES)
    for file in YAML_EXAMPLES:
        for source in import_config(file).recipe["data"]["sources"]:
            assert set(source.get("columns", {})) <= set(COLUMNS)

"""lm-eval with our models, beside its own `hf` model on the same exported directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.tuning import THIN, saved
from trainwright.errors import UserError
from trainwright.training.score import open_subject

pytest.importorskip("lm_eval")

from trainwright.training.harness import HarnessModel, run_harness
from trainwright.training.harness_tasks import find_tasks

pytestmark = pytest.mark.slow

DATA = """
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/sums.jsonl}}
test_split: test
doc_to_text: "Q: {{question}}\\nA:"
"""
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
""",
    "free": """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
    # Texts of up to 350 tokens, for a context of 256: windows.
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question * (answer * 24 + 1)}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("tuned") / "model", THIN, seed=1)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch) -> Path:
    """A folder of task YAML, beside its data."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"question": f"What is {n}+{n}?", "choices": [str(2 * n), f"{n} é"], "answer": n % 2}
        for n in range(9)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    shared = DATA.replace("FOLDER", str(tmp_path))
    for name, text in TASKS.items():
        own = "\n".join(line for line in shared.splitlines() if line.partition(":")[0] not in text)
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{own}\n{text}")
    return folder


def evaluated(model: Any, tasks: Path) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    found = find_tasks(str(tasks))
    result = simple_evaluate(
        model, tasks=list(found.names), task_manager=found.manager, log_samples=True
    )
    assert result is not None
    return dict(result)


def test_scores_are_those_of_lm_evals_own_model(model, tasks) -> None:
    from lm_eval.models.huggingface import HFLM

    theirs = evaluated(HFLM(pretrained=str(model), batch_size=4, device="cpu"), tasks)
    subject = open_subject(model)
    ours = evaluated(HarnessModel(subject), tasks)
    assert ours["results"].keys() == set(TASKS)
    for name in TASKS:
        for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            for a, b in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
                if isinstance(a, str):
                    assert a == b
                elif isinstance(a, tuple):  # log-likelihood, and whether it is greedy
                    assert a == (pytest.approx(b[0], abs=1e-4), b[1])
                else:
                    assert a == pytest.approx(b, abs=1e-3)  # a sum over some 350 tokens
    told = run_harness(subject, find_tasks(str(tasks)))
    for name, metrics in theirs["results"].items():
        scores = {k: v for k, v in metrics.items() if k.endswith(",none") and "stderr" not in k}
        assert scores and told[name]["rows"] == 9
        for key, value in scores.items():
            assert told[name][key.removesuffix(",none")] == pytest.approx(value, rel=1e-4)
    error = theirs["results"]["choices"]["acc_stderr,none"]
    assert told["choices"]["acc_stderr"] == pytest.approx(error) and error > 0


def test_a_likeliest_continuation_is_told_as_such(model) -> None:
    from lm_eval.api.instance import Instance

    subject = open_subject(model)
    lm = HarnessModel(subject)
    ids = lm.tok_encode("the cat")
    best = int(subject.spread.model(torch.tensor([ids]))[0, -1].argmax())
    other = (best + 1) % 256
    found = lm._loglikelihood_tokens([(None, ids, [best]), (None, ids, [other])])
    assert [greedy for _, greedy in found] == [True, False] and found[0][0] > found[1][0]
    assert lm.loglikelihood([Instance("loglikelihood", {}, ("", "cat"), 0)])[0][0] < 0


def test_names_few_shots_and_rows_are_heeded(model, tasks) -> None:
    subject = open_subject(model)
    told = run_harness(subject, find_tasks(f"{tasks},choices"), rows=4)
    assert told.keys() == {"choices"} and told["choices"]["rows"] == 4
    file = find_tasks(str(tasks / "choices.yaml"))
    assert run_harness(subject, file, rows=4) == told
    with pytest.raises(UserError, match="did you mean choices"):
        find_tasks(f"{tasks},choice")


EVIL = {
    "function": ("doc_to_text: !function evil.run\n", "!function evil.run"),
    "class": ("class: !function evil.run\n", "`class`"),
    "python": ("doc_to_text: !!python/name:os.system\n", "python/name"),
    "hub metric": ("metric_list: [{metric: someone/metric}]\n", "hub"),
    "evaluate": ("metric_list: [{metric: acc, hf_evaluate: true}]\n", "hub"),
}


@pytest.mark.parametrize("name", EVIL)
def test_code_of_a_stranger_is_not_run(name, tasks) -> None:
    text, told = EVIL[name]
    (tasks / "evil.py").write_text("from pathlib import Path\nPath(__file__ + '.ran').touch()\n")
    (tasks / "base").write_text(text)
    for file, content in (("evil", text), ("through", "include: base\n")):
        (tasks / "evil.yaml").unlink(missing_ok=True)
        (tasks / f"{file}.yaml").write_text(f"task: evil\n{content}")
        for given in (tasks, tasks / f"{file}.yaml"):
            with pytest.raises(UserError) as refused:
                find_tasks(str(given))
            assert any(told in each.what for each in refused.value.mistakes), refused.value
            assert all("--trust-task-code" in each.fix for each in refused.value.mistakes)
    assert not (tasks / "evil.py.ran").exists()


def test_trusted_code_runs(model, tasks) -> None:
    (tasks / "mine.py").write_text("def ask(doc):\n    return doc['question'].upper()\n")
    file = tasks / "choices.yaml"
    lines = file.read_text().splitlines()
    lines = ["doc_to_text: !function mine.ask" if "doc_to_text" in x else x for x in lines]
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"mine\.ask"):
        find_tasks(str(file))
    assert run_harness(open_subject(model), find_tasks(str(file), trusted=True))["choices"]["rows"]


def test_a_template_cannot_reach_python(model, tasks) -> None:
    file, target = tasks / "choices.yaml", tasks / "owned"
    evil = f"{{{{ cycler.__init__.__globals__.os.system('touch {target}') }}}}"
    file.write_text(file.read_text().replace("{{question}}", evil))
    subject = open_subject(model)
    with pytest.raises(UserError, match="cannot load"):
        run_harness(subject, find_tasks(str(file)))
    assert not target.exists()

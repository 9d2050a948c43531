"""The report's traffic: medians of the records beside the closed formulas."""

from __future__ import annotations

import json

from trainwright.planner.plan import Plan
from trainwright.report.history import read_history
from trainwright.report.html import write_report
from trainwright.report.traffic import predicted_traffic, traffic_rows

PLAN = Plan(
    world_size=2,
    dp_replicate=2,
    dp_shard=1,
    micro_batch=2,
    accumulation=1,
    threads=1,
    precision="fp32",
    recompute="none",
    compile=False,
    device="cpu",
    sequence_length=64,
    optimizer="adamw",
)
CONFIG = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
# Two layers (queries and outputs, keys and values, three of the MLP, two norms), both vocabulary
# matrices and the last norm: each gradient is summed by a ring of two, which sends it once.
WEIGHTS = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32) + 2 * 100 * 32 + 32


def run_with_traffic(make_run, run_records):
    records = run_records(9)
    for record in records:
        if record["kind"] == "step":
            odd = record["step"] == 5  # a median does not see it
            record["traffic"] = {
                "world": {"bytes": 40, "seconds": 0.002, "calls": 3},
                "replicas": {"bytes": 9e9 if odd else 4 * WEIGHTS, "seconds": 0.0125, "calls": 1},
            }
    directory = make_run(records=records)
    (directory / "plan.json").write_text(PLAN.to_json())
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text(json.dumps(CONFIG))
    return directory


def test_measured_stands_beside_predicted(make_run, run_records):
    directory = run_with_traffic(make_run, run_records)
    history = read_history(directory)
    assert predicted_traffic(history)["replicas"] == 4 * WEIGHTS
    first, second = traffic_rows(history)
    shown = f"{4 * WEIGHTS / 1e3:.3g} kB"
    assert first == ("replicas", shown, shown, "12.5 ms", "1")
    assert (second.dimension, second.measured, second.calls) == ("world", "40 B", "3")
    page = write_report(directory).read_text()
    assert "<h2>Traffic</h2>" in page and shown in page


def test_what_cannot_be_predicted_is_unknown(make_run, run_records):
    directory = run_with_traffic(make_run, run_records)
    (directory / "model" / "config.json").write_text(json.dumps({"model_type": "mystery"}))
    assert [row.predicted for row in traffic_rows(read_history(directory))] == ["–", "–"]
    (directory / "plan.json").write_text("{}")
    assert [row.predicted for row in traffic_rows(read_history(directory))] == ["–", "–"]


def test_a_single_worker_has_no_traffic(make_run):
    directory = make_run()
    assert traffic_rows(read_history(directory)) == []
    assert "Traffic" not in write_report(directory).read_text()

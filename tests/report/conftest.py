"""A run directory made by hand, as a training run would leave it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from trainwright.report.records import METRICS_FILE, encode_record

BEGAN = 1_790_000_000.0


def example_records(steps: int, seconds: float = 0.4) -> list[dict]:
    """The records of a finished run of `steps` steps: 4,096 tokens each, evaluated each fifth."""
    noise = random.Random(7)
    records: list[dict] = [
        {
            "kind": "start",
            "step": 0,
            "name": "quickstart",
            "parameters": 4_123_456,
            "total_steps": steps,
            "world_size": 2,
            "time": BEGAN,
        }
    ]
    for step in range(1, steps + 1):
        now = BEGAN + 4 + step * seconds
        share = step / steps
        loss = 2.1 + 6.2 * math.exp(-9 * share) + noise.gauss(0, 0.07)
        records.append(
            {
                "kind": "step",
                "step": step,
                "loss": loss,
                "learning_rate": 3e-3
                * min(step / (0.05 * steps), 0.55 + 0.45 * math.cos(3.1 * share)),
                "gradient_norm": math.exp(noise.gauss(0, 0.25)) * (1 + 20 * math.exp(-60 * share)),
                "tokens": 4096,
                "tokens_total": 4096 * step,
                "seconds": seconds,
                "tokens_per_second": 4096 / seconds * noise.uniform(0.94, 1.03),
                "mfu": None,
                "memory_bytes": 1.1e9 + 8e7 * min(step, 20) / 20,
                "batch_hash": "00ff",
                "time": now,
            }
        )
        if step % max(1, steps // 5) == 0:
            records += [
                {
                    "kind": "evaluation",
                    "step": step,
                    "name": "held-out",
                    "loss": loss + 0.2,
                    "bits_per_byte": (loss + 0.2) / 1.9,
                    "tokens": 50_000,
                    "time": now + 0.1,
                },
                {
                    "kind": "sample",
                    "step": step,
                    "prompt": "def mean(values):\n",
                    "completion": "    # <b>bold</b>\n    return sum(values) / len(values)",
                    "time": now + 0.1,
                },
                {
                    "kind": "checkpoint",
                    "step": step,
                    "seconds_stalled": 0.03,
                    "bytes": 49_500_000,
                    "time": now + 0.1,
                },
            ]
    end = {"kind": "end", "step": steps, "status": "finished", "time": records[-1]["time"] + 1}
    return [*records, end]


def write_records(directory: Path, records: list[dict]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / METRICS_FILE).write_bytes(b"".join(map(encode_record, records)))


@pytest.fixture
def run_records() -> Callable[..., list[dict]]:
    """`example_records`, for tests that change some."""
    return example_records


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Builds a whole run directory with `steps` steps, or with the `records` given."""

    def build(name: str = "quickstart", steps: int = 60, records: list[dict] | None = None) -> Path:
        directory = tmp_path / "runs" / name
        write_records(directory, example_records(steps) if records is None else records)
        (directory / "recipe.yaml").write_text("name: quickstart\ntraining:\n  steps: 60\n")
        (directory / "resolved.yaml").write_text("name: quickstart\nseed: 42\n")
        (directory / "plan.json").write_text(json.dumps({"world_size": 2, "micro_batch": 4}))
        environment = {
            "host": "laptop",
            "cpu": "AMD EPYC",
            "cores": 2,
            "memory_bytes": 24_000_000_000,
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "cuda_devices": [],
        }
        (directory / "environment.json").write_text(json.dumps(environment))
        (directory / "export").mkdir()
        return directory

    return build

"""How long the planner takes to rank plans, and the memory it needs, beside what it may take.

    python -m benchmarks.planner_speed [CASE ...]

Each case runs in a process of its own, from starting Python to the last plan; memory is the
process's at its fullest. Rows of 8,192 tokens, in bf16, on the machines of examples/clusters. Of
two pools the times of the plans are printed too: of equal shares, of the plan that is found, and of
work that could be divided at will.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

CLUSTERS = Path(__file__).parent.parent / "examples" / "clusters"
LENGTH = 8192
_MOST_GB = 2.0


@dataclass(frozen=True)
class Case:
    """A model and a machine; `most` are the seconds that it may take."""

    model: str
    cluster: str
    rows: int
    most: float


CASES = {
    "8B": Case("8B", "h100-64", 512, 3),
    "405B": Case("405B", "h100-16384", 2048, 20),
    "three regions": Case("8B", "three-regions", 512, 30),
    "70B in three regions": Case("70B", "three-regions", 512, 30),
    "two speeds": Case("8B", "two-speeds", 128, 30),
}
# Llama 3: hidden, layers, query heads, feed-forward.
MODELS = {
    "8B": (4096, 32, 32, 14336),
    "70B": (8192, 80, 64, 28672),
    "405B": (16384, 126, 128, 53248),
}


def job_of(case: Case) -> Any:
    """The case's job."""
    from trainwright.models.families import decoder_config
    from trainwright.planner.job import Job

    hidden, layers, heads, width = MODELS[case.model]
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": width,
        "vocab_size": 128256,
        "max_position_embeddings": LENGTH,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    return Job(decoder_config(config), LENGTH, case.rows)


def run(name: str) -> None:
    """Ranks the plans of a case and prints what came of it, as JSON."""
    from trainwright.planner.cluster.load import load_cluster
    from trainwright.planner.search.ranking import rank

    case = CASES[name]
    job, cluster = job_of(case), load_cluster(CLUSTERS / f"{case.cluster}.yaml")
    found = rank(job, cluster)
    assert found.winner is not None
    print(
        json.dumps(
            {
                "considered": found.considered,
                "predicted": found.predicted,
                "step": found.winner.prediction.step_seconds.value,
                "mfu": found.winner.prediction.mfu,
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
                "processor": time.process_time(),
            }
        )
    )


def two_speeds() -> None:
    """Plans for unequal pools beside equal shares, and beside work divided at will."""
    from trainwright.planner.cluster.load import load_cluster
    from trainwright.planner.cost.step import predict
    from trainwright.planner.search.ranking import rank

    job, both = job_of(CASES["two speeds"]), load_cluster(CLUSTERS / "two-speeds.yaml")

    def step(cluster: Any) -> Any:
        winner = rank(job, cluster, top=1).winner
        assert winner is not None
        return winner.prediction.step_seconds.value, winner.plan

    fast = both.pools[0]
    alone = [step(replace(both, pools=(pool,)))[0] for pool in both.pools]
    _, even = step(replace(both, pools=(replace(fast, nodes=2),)))
    equal, found = predict(job, even, both).step_seconds.value, step(both)[0]
    bound = 1 / sum(1 / seconds for seconds in alone)
    print(
        f"\ntwo pools, alone {alone[0]:.2f} s and {alone[1]:.2f} s; both, divided at will", end=" "
    )
    print(f"{bound:.2f} s: equal shares {equal:.2f} s, as planned {found:.2f} s")
    print(f"{equal / found:.2f} times as fast as equal shares (at least 1.5)", end=", ")
    print(f"{found / bound - 1:.1%} above the bound (at most 5%)")


def main() -> None:
    """Prints a line a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=[])
    parser.add_argument("--run", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.run)
        return
    title = f"{'case':<22}{'seconds':>8}{'at most':>8}{'CPU s':>7}{'GB':>6}{'at most':>8}"
    print(f"{title}{'candidates':>12}{'predicted':>10}{'step s':>8}{'MFU':>6}")
    for name in arguments.cases or CASES:
        begun = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.planner_speed", "--run", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        taken, found = time.perf_counter() - begun, json.loads(output)
        print(
            f"{name:<22}{taken:8.1f}{CASES[name].most:8.0f}{found['processor']:7.1f}"
            f"{found['peak']:6.2f}{_MOST_GB:8.1f}{found['considered']:12,}{found['predicted']:10}"
            f"{found['step']:8.2f}{found['mfu']:6.1%}"
        )
    two_speeds()


if __name__ == "__main__":
    main()

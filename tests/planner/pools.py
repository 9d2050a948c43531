"""Descriptions of pools of CPUs for tests."""

from __future__ import annotations

from pathlib import Path

POOL = """
  {name}:
    device: {{kind: cpu, memory: 64 GB, peak: {{fp32: {peak} GFLOP/s}}, memory_bandwidth: 40 GB/s,
             power: 60 W}}
    nodes: {nodes}
    inside: {{latency: 1 us, bandwidth: 5 GB/s}}
    between: {{latency: 20 us, bandwidth: 1 GB/s}}
"""


def described(folder: Path, **pools: tuple[float, int]) -> Path:
    """A cluster.yaml with pools of nodes with one CPU each: GFLOP/s and how many."""
    text = "".join(POOL.format(name=n, peak=p, nodes=k) for n, (p, k) in pools.items())
    file = folder / "cluster.yaml"
    file.write_text(f"pools:{text}wide: {{latency: 100 us, bandwidth: 1 GB/s}}\n")
    return file

"""Models and machines that the tests of the search have in common."""

from __future__ import annotations

from dataclasses import replace

from trainwright.models.families import decoder_config
from trainwright.planner.cluster.describe import Cluster, DeviceKind, Link, Pool

_PEAKS = {"fp32": 60e12, "bf16": 900e12, "float8": 1800e12}
FAST = DeviceKind("fast", "cuda", 80e9, _PEAKS, 3e12, 700, 100, 128)
SLOW = replace(
    FAST,
    name="slow",
    peak_flops={name: rate / 3 for name, rate in _PEAKS.items()},
    memory_bandwidth=1e12,
    watts=300,
)
INSIDE = Link("inside", 2e-6, 450e9, 450e9)
BETWEEN = Link("between", 5e-6, 50e9, 50e9)
NEAR = Link("near", 1e-5, 400e9, 400e9, shared=True)  # between pools of one building
FAR = Link("far", 5e-2, 1.25e9, 1.25e9, shared=True)  # between continents


def llama(hidden=2048, layers=16, heads=16, kv_heads=8, width=5632, vocabulary=32000, **more):
    """A Llama of some shape."""
    shape = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": width,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    return decoder_config({**shape, **more})


def mixture(experts=8, layers=8):
    """A Mixtral of two experts a token."""
    return llama(
        1024,
        layers,
        16,
        8,
        2048,
        model_type="mixtral",
        num_local_experts=experts,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.01,
    )


LLAMA_8B = llama(4096, 32, 32, 8, 14336, 128256)
LLAMA_70B = llama(8192, 80, 64, 8, 28672, 128256)


def pool(name="fast", device=FAST, nodes=1, devices=8, **more):
    """Equal nodes of eight devices, or of so many."""
    return Pool(name, device, nodes, devices, INSIDE, BETWEEN, **more)


def cluster(*pools, wide=NEAR):
    """A machine; of one pool of eight fast devices if nothing is said."""
    return Cluster("machine", pools or (pool(),), wide=wide)

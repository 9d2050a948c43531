"""Bytes that training holds on a worker, by closed formula: states and activations.

The formulas leave out what an allocator, a communicator or a kernel's workspace adds; the planner
therefore fills only part of the memory.
"""

from __future__ import annotations

from typing import Literal

from trainwright.models.families import DecoderConfig
from trainwright.planner.shapes import count_parameters

Recompute = Literal["none", "full", "selective"]

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# fp32 weight and gradient, and what the optimizer keeps of a parameter.
_OPTIMIZER_BYTES = {"adamw": 8, "muon": 4, "adamw-8bit": 2}
_WEIGHT_AND_GRADIENT = 8
_HEAD_CHUNK_BYTES = 3 * 4 * (1 << 24)  # a chunk's logits, their gradient and a copy, in fp32


def state_bytes(config: DecoderConfig, optimizer: str, precision: str, dp_shard: int = 1) -> int:
    """Weights, gradients, optimizer state and narrow copies of the weights on one worker.

    Sharded over `dp_shard` workers; the weights that a sharded worker gathers for the moment are
    reckoned as three blocks, or the embedding and head where those are larger.
    """
    counted = count_parameters(config)
    matrices = counted.blocks if optimizer == "muon" else 0
    kept = _OPTIMIZER_BYTES[optimizer] * (matrices or counted.total)
    if optimizer == "muon":
        kept += _OPTIMIZER_BYTES["adamw"] * (counted.total - matrices)
    states = (_WEIGHT_AND_GRADIENT * counted.total + kept) / dp_shard
    element = ELEMENT_BYTES[precision]
    if dp_shard > 1:
        gathered = max(3 * counted.block, counted.embedding + counted.head)
        return int(states + element * gathered)
    return int(states + (element * counted.total if precision != "fp32" else 0))


def activation_bytes(config: DecoderConfig, precision: str, recompute: Recompute) -> float:
    """Bytes kept a token between the forward and the backward pass, over all blocks.

    Of a block, in elements: inputs and outputs of norms and residual sums 4h, queries and attention
    output 2q, keys and values 2k, gate, its activation, up and their product 4f; an fp32 sum a
    head; another q + k where queries and keys are normalised or split from one matrix, and 2h where
    there are norms behind each half. Attention keeps no scores, on any device. `full` keeps each
    block's input and holds one block whole while it is recomputed; `selective` keeps the outputs
    of matrix products and attention besides.
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    key_values = config.num_kv_heads * config.head_dim
    sums = 4 * config.num_heads
    element = ELEMENT_BYTES[precision]

    elements = 4 * hidden + 2 * queries + 2 * key_values + 4 * ffn
    if config.qk_norm is not None or config.fused_projections:
        elements += queries + key_values
    if config.norms == "both":
        elements += 2 * hidden
    whole = element * elements + sums
    products = element * (3 * hidden + 2 * queries + 2 * key_values + 2 * ffn) + sums
    kept = {"none": whole, "full": element * hidden, "selective": products}[recompute]
    at_once = 0 if recompute == "none" else whole - kept
    # The last hidden states, their norm, and the gradients of both.
    return config.num_layers * kept + at_once + 4 * element * hidden


def head_bytes(config: DecoderConfig) -> int:
    """What the chunked output head holds besides: a chunk's logits, and its weight's gradient."""
    return _HEAD_CHUNK_BYTES + 4 * config.vocab_size * config.hidden_size

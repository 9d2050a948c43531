"""The graph that the planner makes without torch, against a trace of the decoder that runs.

torch.export gives every operation of a one-layer model on meta. Those of a projection, a norm, an
activation or an attention are one operator; others (rotations, casts, reshapes) pass a tensor on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.fx import Node

from trainwright.models.decoder import NORMS, Decoder
from trainwright.models.families import DecoderConfig, decoder_config, new_hf_config
from trainwright.planner.search.graph import Graph, decoder_graph
from trainwright.planner.search.sharding import Sharding
from trainwright.planner.shapes import visible_keys

from .test_sharding import line_of

ROWS, LENGTH = 2, 32
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_group": 4,
    "topk_group": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 24}),
    ("gemma3_text", {"head_dim": 16, "sliding_window": 16}),
    ("olmo2", {}),
    ("deepseek_v3", LATENT),
    ("deepseek_v3", {**LATENT, "q_lora_rank": None}),
]
_PLACES = ("self_attn.norm", "self_attn.norm_after", "mlp.norm", "mlp.norm_after")


class Trace:
    """Operators of an exported model: which feed which, and the sizes of their products."""

    def __init__(self, config: DecoderConfig) -> None:
        with torch.device("meta"):
            model = Decoder(config)
        ids = torch.zeros(ROWS, LENGTH, dtype=torch.long, device="meta")
        exported = torch.export.export(model, (ids,), strict=False)
        places = zip(NORMS[config.norms], _PLACES, strict=True)
        self.norms = {f"model.layers.0.{name}": f"layers.0.{place}" for name, place in places}
        self.norms["model.norm"] = "norm"
        self.edges: set[tuple[str, str]] = set()
        self.products: dict[str, tuple[float, ...]] = {}
        self.heads: tuple[int, ...] = ()
        self.adds = iter(("layers.0.self_attn.add", "layers.0.mlp.add"))
        sources: dict[Node, frozenset[str]] = defaultdict(frozenset)
        for node in exported.graph.nodes:
            before = frozenset().union(*(sources[each] for each in node.all_input_nodes))
            name = self.operator(node, [sources[each] for each in node.all_input_nodes])
            self.edges |= {(each, name) for each in before if name not in ("", each)}
            sources[node] = frozenset({name}) if name else before

    def operator(self, node: Node, before: list[frozenset[str]]) -> str:
        """The name of the operator that a node belongs to; "" where it only passes a tensor on."""
        stack = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())
        module, kind = stack[-1][0], str(stack[-1][1]).rpartition(".")[2]
        own = module.removeprefix("model.").replace("_with_mqa", "")
        target = str(node.target)
        if node.op != "call_function" or target == "aten.to.dtype":
            return ""
        if target == "aten.linear.default":
            name = own if kind == "Linear" else "lm_head"
            outputs, inputs = node.args[1].meta["val"].shape  # type: ignore[union-attr]
            self.products[name] = (node.meta["val"].numel() / outputs, outputs, inputs)
            return name
        if target == "aten.embedding.default":
            return "embed_tokens"
        if "attention" in target:
            self.heads = tuple(each.meta["val"].shape[1] for each in node.args[:3])  # type: ignore[union-attr]
            return f"{own}.attention"
        if module in self.norms and any(before):
            return self.norms[module]
        if kind == "GatedMLP" and any(before):
            return f"{own}.activation"
        if kind == "Block" and target.startswith("aten.add") and len(set(before)) == 2:
            return next(self.adds)
        return ""


def planned_edges(graph: Graph) -> Iterator[tuple[str, str]]:
    """The planner's own, with what only shares a tensor out left out."""
    shares = {name for name, operator in graph.operators.items() if operator.kind == "share"}
    origin = {edge.consumer: edge.producer for edge in graph.edges if edge.consumer in shares}
    for edge in graph.edges:
        producer = edge.producer
        while producer in shares:
            producer = origin[producer]
        if edge.consumer not in shares and edge.consumer != "loss":
            yield plain(producer), plain(edge.consumer)


def plain(name: str) -> str:
    """One matrix makes the latent vector and what turns; the planner has them apart."""
    return name.removesuffix(".turned")


@pytest.mark.parametrize(
    ("family", "keys"), FAMILIES, ids=[f"{f} {' '.join(k)[:12]}" for f, k in FAMILIES]
)
def test_the_graph_is_what_the_decoder_does(family: str, keys: dict[str, Any]) -> None:
    config = decoder_config(new_hf_config(family, {**SHAPE, **keys}, 128))
    trace, graph = Trace(config), decoder_graph(config, ROWS, LENGTH)
    assert trace.edges == set(planned_edges(graph))
    sharding, products = Sharding(graph, line_of(2)), defaultdict[str, list[float]](list)
    for name, operator in graph.operators.items():
        if operator.kind == "product":
            rows, columns, inner, times, *_ = sharding.product(operator)
            found = products[plain(name)] or [rows, 0.0, inner]
            products[plain(name)] = [rows, found[1] + times * columns, inner]
    assert {name: list(sizes) for name, sizes in trace.products.items()} == dict(products)
    [attention] = [each for each in graph.operators.values() if each.kind == "attention"]
    scores = sharding.scores(attention)
    assert scores.heads == ROWS * trace.heads[0]
    if config.latent is None:
        assert trace.heads[1:] == (graph.axes["kv_heads"].parts,) * 2
    assert scores.keys == visible_keys(LENGTH, config.layer_windows[0])

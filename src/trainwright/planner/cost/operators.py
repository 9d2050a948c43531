"""What a worker computes for one micro-batch: products, attention and what only moves bytes.

Sizes are a worker's own, after tensor, context and expert parallelism have cut them. A backward
pass is told from the forward one: each product becomes two, of its input's gradient and of its
weight's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from trainwright.models.families import DecoderConfig
from trainwright.planner.job import Job
from trainwright.planner.memory import ELEMENT_BYTES
from trainwright.planner.plan import Plan
from trainwright.planner.shapes import head_outputs, visible_keys
from trainwright.planner.stacks import Stack


class Product(NamedTuple):
    """`times` matrix products [rows, inner] × [inner, columns]; `trained` if of a trained weight.

    `narrow` ones are done in the plan's narrowest type: float8 leaves out heads and routers.
    """

    rows: float
    columns: float
    inner: float
    times: float = 1.0
    trained: bool = True
    narrow: bool = True

    @property
    def flops(self) -> float:
        """A multiplication and an addition count two."""
        return 2.0 * self.rows * self.columns * self.inner * self.times


class Attention(NamedTuple):
    """Scores and their weighted values: `heads` of all rows, each [queries, keys].

    `keys` are those that are computed, on average; `all_keys` those that there are, which a kernel
    that stores its scores computes all the same.
    """

    heads: float
    queries: float
    keys: float
    all_keys: float
    width: int  # of a query and a key
    value_width: int

    @property
    def flops(self) -> float:
        """Of the keys that are seen."""
        return 2.0 * self.heads * self.queries * self.keys * (self.width + self.value_width)


@dataclass(frozen=True)
class Operators:
    """A forward pass through one layer, the head, or the embedding: what is computed and moved.

    `element_bytes` are read and written by kernels that compute next to nothing, `kernels` of them.
    """

    products: tuple[Product, ...] = ()
    attention: Attention | None = None
    element_bytes: float = 0.0
    kernels: int = 0


def layer_operators(job: Job, plan: Plan, layer: int) -> Operators:
    """The forward pass of a layer for one micro-batch, on one worker."""
    config = job.config
    return _layer(
        config,
        config.is_sparse(layer),
        config.layer_windows[layer],
        plan.micro_batch,
        job.sequence_length,
        plan.tp,
        plan.cp,
        plan.ep,
        ELEMENT_BYTES[plan.precision],
        job.stack,
        job.adapter.rank if job.adapter else 0,
        job.adapter is not None and job.adapter.quantise != "none",
        job.visible_share,
        job.imbalance if plan.ep > 1 else 1.0,
        plan.whole,
    )


def head_operators(job: Job, plan: Plan) -> Operators:
    """The final norm, the output head and its loss, in fp32 where logits are made of."""
    config, element = job.config, ELEMENT_BYTES[plan.precision]
    tokens = plan.micro_batch * job.sequence_length / plan.cp
    columns = head_outputs(config) / plan.tp
    trained = job.adapter is None
    products = (Product(tokens, columns, config.hidden_size, 1.0, trained, narrow=False),)
    # Logits are written, read for their largest and their sum, and once more for the target.
    logits = tokens * columns * (element + 3 * 4)
    return Operators(products, None, logits + 2 * element * tokens * config.hidden_size, 6)


def embedding_operators(job: Job, plan: Plan) -> Operators:
    """The look-up: a row read and written for every token."""
    element = ELEMENT_BYTES[plan.precision]
    tokens = plan.micro_batch * job.sequence_length / plan.cp
    return Operators((), None, 2 * element * tokens * job.config.hidden_size / plan.tp, 2)


@lru_cache(maxsize=65536)
def _layer(
    config: DecoderConfig,
    sparse: bool,
    window: int | None,
    rows: int,
    length: int,
    tp: int,
    cp: int,
    ep: int,
    element: int,
    stack: Stack,
    adapter_rank: int,
    quantised: bool,
    visible_share: float,
    imbalance: float,
    whole: tuple[str, ...],
) -> Operators:
    tokens = rows * length / cp
    trained = adapter_rank == 0
    # A part that tp leaves whole is given a share of the tokens instead of a share of its weights.
    cut = {part: 1 if part in whole else tp for part in ("attention", "network")}
    shared = {part: tokens / tp if part in whole else tokens for part in cut}
    products = [
        *_attention_products(config, shared["attention"], cut["attention"], trained),
        *_network_products(
            config, sparse, shared["network"], cut["network"], ep, imbalance, trained
        ),
    ]
    weights = sum(each.columns * each.inner * each.times for each in products)
    products += [
        each
        for product in products
        if adapter_rank
        for each in (
            Product(product.rows, adapter_rank, product.inner, product.times),
            Product(product.rows, product.columns, adapter_rank, product.times),
        )
    ]
    value = config.head_dim if config.latent is None else config.latent.value_dim
    seen = visible_keys(length, window)
    if window is None or window >= length:
        seen *= visible_share
        if "attention" in whole and rows % tp:  # of a row that is cut the last tokens see most
            seen *= 1 + (1 - 1 / tp) * visible_share
    heads = rows * config.num_heads / cut["attention"]
    # Context parallelism gives each worker a share of the queries, which see all the keys.
    queries = length / cp / (tp if "attention" in whole else 1)
    attention = Attention(heads, queries, seen, float(length), config.head_dim, value)
    moved = element * _moved(config, sparse, tokens, tp, stack)
    if quantised:  # each weight is read packed, and written wide before its product
        moved += weights * (1 + element)
    kernels = 14 if stack.fuses_elementwise else 26
    if config.experts is not None and sparse:
        # Tokens are put in order of their experts and back again.
        moved += element * 4 * tokens * config.experts.per_token * config.hidden_size
        kernels += 12
    return Operators(tuple(products), attention, moved, kernels)


def _attention_products(
    config: DecoderConfig, tokens: float, tp: int, trained: bool
) -> list[Product]:
    hidden, latent = config.hidden_size, config.latent
    queries = config.num_heads * config.head_dim / tp
    if latent is None:
        keys = max(1.0, config.num_kv_heads / tp) * config.head_dim
        return [
            Product(tokens, queries + 2 * keys, hidden, 1.0, trained),
            Product(tokens, hidden, queries, 1.0, trained),
        ]
    heads = config.num_heads / tp
    found = [Product(tokens, latent.rank + latent.rope_dim, hidden, 1.0, trained)]
    if latent.query_rank is None:
        found.append(Product(tokens, queries, hidden, 1.0, trained))
    else:
        found.append(Product(tokens, latent.query_rank, hidden, 1.0, trained))
        found.append(Product(tokens, queries, latent.query_rank, 1.0, trained))
    expanded = heads * (latent.plain_dim + latent.value_dim)
    found.append(Product(tokens, expanded, latent.rank, 1.0, trained))
    found.append(Product(tokens, hidden, heads * latent.value_dim, 1.0, trained))
    return found


def _network_products(
    config: DecoderConfig,
    sparse: bool,
    tokens: float,
    tp: int,
    ep: int,
    imbalance: float,
    trained: bool,
) -> list[Product]:
    """Gate and up in one product, where there is a gate; then down. Experts one by one."""
    hidden, inward = config.hidden_size, 2 if config.gated else 1
    spec = config.experts
    if spec is None or not sparse:
        width = config.intermediate_size / tp
        return [
            Product(tokens, inward * width, hidden, 1.0, trained),
            Product(tokens, hidden, width, 1.0, trained),
        ]
    here = spec.count / ep
    each = tokens * spec.per_token * imbalance / here  # ep brings as many tokens as it takes away
    found = [
        Product(tokens, spec.count, hidden, 1.0, trained, narrow=False),
        Product(each, inward * spec.width / tp, hidden, here, trained),
        Product(each, hidden, spec.width / tp, here, trained),
    ]
    if spec.shared_width:
        found.append(Product(tokens, inward * spec.shared_width / tp, hidden, 1.0, trained))
        found.append(Product(tokens, hidden, spec.shared_width / tp, 1.0, trained))
    return found


def _moved(config: DecoderConfig, sparse: bool, tokens: float, tp: int, stack: Stack) -> float:
    """Elements that norms, residuals, rotary turns and activations read and write in a layer."""
    stream = config.hidden_size / (tp if stack.sequence_parallel else 1)
    heads = config.num_heads * config.head_dim / tp
    keys = max(1.0, config.num_kv_heads / tp) * config.head_dim
    width = config.intermediate_size / tp
    if config.experts is not None and sparse:
        spec = config.experts
        width = (spec.per_token * spec.width + spec.shared_width) / tp
    activation = (3 if config.gated else 2) * width
    elements = 10 * stream + 2 * (heads + keys) + activation
    if not stack.fuses_elementwise:  # biases and dropout are kernels of their own
        elements += 6 * stream + 2 * (heads + keys) + 2 * width
    return tokens * elements

"""Training software as the cost model sees it: what it holds of a weight, what it hides.

Our own is `TRAINWRIGHT`; the others are there so that predictions can be held against what has been
published of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GIB = 1 << 30


@dataclass(frozen=True)
class Stack:
    """What a piece of training software holds, fuses and overlaps. Bytes are of a parameter."""

    name: str
    weight_bytes: float  # what is trained from step to step, cut by ZeRO-3
    gradient_bytes: float
    optimizer_bytes: float  # moments, and a master copy where the weight is narrow
    sequence_parallel: bool = True  # tp cuts the stream between the halves of a block too
    flash: bool = True  # attention in one kernel, which stores no scores
    causal: bool = True  # that kernel leaves out what is masked
    fuses_elementwise: bool = True
    overlaps_gathers: bool = True  # weights of the next block while this one computes
    overlaps_gradients: bool = True  # reductions while the backward pass goes on
    overlaps_tensor: float = 0.0  # share of tp's traffic that is hidden in products
    keeps_logits: float = 0.0  # bytes a logit of the head; 0 where it is taken in chunks
    regathers_sequence: bool = False  # tp's inputs gathered anew for gradients of weights
    exposed_gathers: float = 1.0  # share of ZeRO-1's gathers that nothing hides, if any are hidden
    overlaps_experts: float = 0.0  # share of the experts' traffic that is hidden
    overlaps_ring: bool = True  # keys and values travel while attention computes
    selects_attention: bool = False  # `selective` recomputes attention's core, as Megatron-LM does
    scatters_boundary: bool = False  # each of tp's workers sends a share to the next stage
    float8_rate: float = 1.0  # of products scaled by whole tensors, where scales are finer
    version: float = 0.0  # in years: software changes, and a measurement holds for its own time
    gathers_again: bool = True  # FSDP's weights are let go of after the forward pass
    memory_bytes: float = 0.0  # of a device, whatever the model: context, communicators
    holes: float = 0.0  # what the allocator holds besides, as a share of what is counted
    fsdp: bool = True  # weights are cut at every stage of ZeRO, and gathered to compute
    whole_in_pipeline: bool = False  # FSDP in a pipeline gathers once a step, sums whole gradients
    copy_bytes: float = 0.0  # of whole weights, beside them and their gradients
    step_bytes: float = 0.0  # of what a worker's optimizer steps, made anew in each step
    dropout: bool = False  # masks are kept
    keeps_products: float = 1.0  # share of products' outputs that `selective` keeps
    copies_weights: bool = False  # to narrow and widen them, for every micro-batch


TRAINWRIGHT = Stack(
    "trainwright", weight_bytes=4, gradient_bytes=4, optimizer_bytes=8, copies_weights=True
)

# Megatron-LM of Narayanan et al. 2021 and Korthikanti et al. 2022: gradients summed in fp32.
MEGATRON = Stack(
    "megatron-lm",
    weight_bytes=2,
    gradient_bytes=4,
    optimizer_bytes=12,
    sequence_parallel=False,
    flash=False,
    causal=False,
    keeps_logits=8,  # fp16, fp32 and the gradient
    overlaps_gathers=False,
    overlaps_gradients=False,
    scatters_boundary=True,
    fsdp=False,
    dropout=True,
)
MEGATRON_SEQUENCE = replace(
    MEGATRON,
    name="megatron-lm-sp",
    sequence_parallel=True,
    regathers_sequence=True,
    selects_attention=True,
)
# BigScience's Megatron-DeepSpeed: ZeRO-1 in fp16, its own optimizer with fp32 sums in bf16.
# A step flattens the gradients of a worker's part anew, in fp16 and in fp32.
MEGATRON_DEEPSPEED = replace(
    MEGATRON,
    name="megatron-deepspeed",
    scatters_boundary=False,
    gradient_bytes=2,
    step_bytes=6,
    memory_bytes=2.5 * GIB,
    holes=0.23,
)
MEGATRON_DEEPSPEED_BF16 = replace(
    MEGATRON_DEEPSPEED, name="megatron-deepspeed-bf16", gradient_bytes=4, copy_bytes=2
)
# Composer's FSDP, as llm-foundry uses it: weights in fp32, or everything in bf16.
COMPOSER = Stack(
    "llm-foundry", weight_bytes=4, gradient_bytes=4, optimizer_bytes=8, keeps_logits=4, holes=0.1
)
COMPOSER_PURE = replace(
    COMPOSER, name="llm-foundry-bf16", weight_bytes=2, gradient_bytes=2, optimizer_bytes=4
)
TORCHTITAN = Stack(
    "torchtitan",
    weight_bytes=4,
    gradient_bytes=4,
    optimizer_bytes=8,
    keeps_logits=10,  # in bf16, their logarithms and gradients in fp32
    whole_in_pipeline=True,
    keeps_products=0.5,
    holes=0.19,
)
# Without torch.compile gradients in bf16 are a copy besides.
TORCHTITAN_EAGER = replace(
    TORCHTITAN, name="torchtitan-eager", fuses_elementwise=False, keeps_logits=12
)
# Megatron-Core, as Megatron-Bridge runs it: a distributed optimizer.
MEGATRON_CORE = Stack(
    "megatron-core",
    weight_bytes=2,
    gradient_bytes=4,
    optimizer_bytes=12,
    keeps_logits=4,  # bf16 and the gradient: the loss is one kernel
    regathers_sequence=True,
    overlaps_tensor=0.5,  # its bulk and pipelined exchanges, where products are long enough
    exposed_gathers=0.3,
    selects_attention=True,
    fsdp=False,
    holes=0.1,
)

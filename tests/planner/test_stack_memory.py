"""Memory under others' software: published formulas, ZeRO's bytes, and the way through a step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from trainwright.models.families import DecoderConfig, decoder_config, new_hf_config
from trainwright.planner import stacks
from trainwright.planner.cluster.describe import Cluster, DeviceKind, Link, Pool, Rates
from trainwright.planner.cost.memory import memory_timeline, predict_memory, rank_memory
from trainwright.planner.job import Job
from trainwright.planner.memory import activation_bytes, head_bytes, in_flight, state_bytes
from trainwright.planner.parameters import block_weights
from trainwright.planner.plan import Plan, Recompute
from trainwright.planner.schedules import make_schedule, placement
from trainwright.planner.shapes import flops_per_token, parameter_count
from trainwright.planner.stacks import Stack
from trainwright.planner.timeline import Timeline, simulate

GIB = 1 << 30
LINK = Link("any", 1e-6, 1e9, 1e9)


def gpt(layers: int, hidden: int, heads: int, vocabulary: int = 8) -> DecoderConfig:
    """A GPT with a network four times as wide, whose few tokens weigh nothing."""
    shape = {
        "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "tie_word_embeddings": True,
    }  # fmt: skip
    config = decoder_config(new_hf_config("llama", shape, vocabulary))
    return replace(config, gated=False)


def plan_of(**fields: Any) -> Plan:
    """One row of 2,048 tokens a micro-batch, in fp16 on GPUs."""
    plan = replace(Plan.alone("cuda"), precision="fp16", sequence_length=2048)
    plan = replace(plan, **fields)
    world = plan.dp_replicate * plan.dp_shard * plan.tp * plan.pp * plan.cp
    return replace(plan, world_size=world)


def cluster_of(devices: int, gib: float = 80.0, constant: float = 0.0) -> Cluster:
    kind = DeviceKind("any", "cuda", gib * GIB, {}, 1e12, 400, 100, 100)
    rates = Rates(memory_bytes=constant)
    return Cluster("any", (Pool("any", kind, 1, devices, LINK, LINK, rates),))


# Shape, tp, pp, virtual stages, micro-batch; GiB of activations with everything kept, and with
# sequence parallelism and attention recomputed: Korthikanti et al. 2022, arXiv:2205.05198, figures
# 1 and 7 and table 3, by s b h L (10 + 24/t + 5as/(ht)) (1 + (p-1)/(pv)) and 34 s b h L/t (...).
KORTHIKANTI = {
    "22B": ((48, 6144, 64), 8, 1, 1, 4, 59.25, 9.5625),
    "175B": ((96, 12288, 96), 8, 8, 3, 1, 66.84375, 12.3515625),
    "530B": ((105, 20480, 128), 8, 35, 3, 1, 114.0234375, 23.076171875),
    "1T": ((128, 25600, 160), 8, 64, 1, 1, 131.25, 26.5625),
}


@pytest.mark.parametrize("name", KORTHIKANTI)
def test_activations_of_megatron_are_those_of_its_paper(name: str) -> None:
    shape, tp, pp, virtual, rows, everything, selective = KORTHIKANTI[name]
    layers = (shape[0] // (pp * virtual),) * (pp * virtual)
    plan = plan_of(
        tp=tp, pp=pp, micro_batch=rows, accumulation=8 * pp, virtual_stages=virtual,
        schedule="interleaved" if virtual > 1 else "1f1b", stage_layers=layers if pp > 1 else (),
    )  # fmt: skip
    cases: list[tuple[Stack, Recompute, float]] = [
        (stacks.MEGATRON, "none", everything),
        (stacks.MEGATRON_SEQUENCE, "selective", selective),
    ]
    for stack, recompute, gib in cases:
        job = Job(gpt(*shape), 2048, rows, stack=stack)
        rank = rank_memory(job, replace(plan, recompute=recompute), 0)
        held = sum(rank.kept[stage] for stage in in_flight(plan, 0, rank.kept))
        if pp == 1:  # the paper counts no head
            width = shape[1] / tp if stack.sequence_parallel else shape[1]
            held -= rows * 2048 * 2 * 4 * width
        assert held / GIB == pytest.approx(gib, rel=1e-12)


def test_full_recompute_keeps_a_layers_input_and_brings_one_layer_back() -> None:
    job = Job(gpt(48, 6144, 64), 2048, 4, stack=stacks.MEGATRON)
    plan = plan_of(tp=8, micro_batch=4, recompute="full")
    rank = rank_memory(job, plan, 0)
    tokens, width = 4 * 2048, 6144
    assert rank.kept[0] == 48 * 2 * tokens * width + 2 * 4 * tokens * width
    layer = tokens * (width * (10 + 24 / 8) + 5 * 64 * 2048 / 8)
    assert rank.working == layer - 2 * tokens * width


ZERO = [
    (stacks.MEGATRON, 0, lambda d: 18),
    (stacks.MEGATRON_CORE, 1, lambda d: 6 + 12 / d),
    (stacks.MEGATRON_CORE, 2, lambda d: 2 + 16 / d),
    (stacks.MEGATRON_DEEPSPEED, 1, lambda d: 4 + 18 / d),
    (stacks.MEGATRON_DEEPSPEED_BF16, 1, lambda d: 8 + 18 / d),
    (stacks.TORCHTITAN, 3, lambda d: 16 / d),
    (stacks.COMPOSER, 2, lambda d: 16 / d + 2),  # FSDP: gathered, and let go of after the step
    (stacks.COMPOSER_PURE, 3, lambda d: 8 / d),
]


@pytest.mark.parametrize(("stack", "zero", "each"), ZERO)
def test_states_by_zero_stage(stack: Stack, zero: int, each: Any) -> None:
    """Rajbhandari et al. 2020, arXiv:1910.02054: which of them data ranks share."""
    job = Job(gpt(96, 12288, 96), 2048, 64, stack=stack)
    plan = plan_of(tp=4, **({"dp_shard": 16, "zero": zero} if zero else {"dp_replicate": 16}))
    lines = rank_memory(job, plan, 0).lines
    if zero == 3:  # what is gathered of a few blocks at a time
        assert 0 < lines.pop("copies") <= 2 * 3 * 12 * 12288**2 / 4
    parameters = 12 * 96 * 12288**2 / 4
    assert sum(lines.values()) / parameters == pytest.approx(each(16), rel=2e-3)


def test_a_pipeline_of_torchtitan_gathers_once_and_sums_whole_gradients() -> None:
    job = Job(gpt(16, 1024, 8), 2048, 64, stack=stacks.TORCHTITAN)
    plan = plan_of(dp_shard=8, zero=3, pp=4, accumulation=8, stage_layers=(4, 4, 4, 4))
    lines, whole = rank_memory(job, plan, 1).lines, 12 * 4 * 1024**2
    assert lines["copies"] / whole == pytest.approx(2, rel=0.01)
    assert lines["gradients"] / whole == pytest.approx(4, rel=0.01)
    assert lines["weights"] / whole == pytest.approx(4 / 8, rel=0.01)


def test_context_parallel_workers_share_fsdps_states() -> None:
    job = Job(gpt(16, 1024, 8), 2048, 8, stack=stacks.TORCHTITAN)
    plan = plan_of(dp_shard=1, cp=8, zero=3)
    expected = 4 * 12 * 16 * 1024**2 / 8
    assert rank_memory(job, plan, 0).lines["optimizer"] / 2 == pytest.approx(expected, rel=0.01)


def test_our_own_memory_is_the_measured_formulas() -> None:
    config = decoder_config(
        new_hf_config(
            "llama",
            {
                "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
                "num_attention_heads": 8, "num_key_value_heads": 4,
            },
            16384,
        )
    )  # fmt: skip
    plan = plan_of(dp_shard=4, zero=3, micro_batch=2, precision="bf16", accumulation=2)
    counted = state_bytes(config, plan).total + 2 * activation_bytes(config, plan)
    counted += head_bytes(config, plan)
    cluster = cluster_of(4, constant=0.5 * GIB)
    prediction = predict_memory(Job(config, 2048, 16), plan, cluster)
    assert prediction.total.value == pytest.approx(counted + 0.5 * GIB)
    assert sum(prediction.lines.values()) == pytest.approx(prediction.total.value)


SCHEDULES = [
    ("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1), ("zbv", 2), ("dualpipev", 2),
]  # fmt: skip


def step_of(plan: Plan) -> Timeline:
    schedule = make_schedule(plan.schedule, plan.pp, plan.virtual_stages, plan.accumulation)
    times = [1.0] * plan.stages
    places = placement(plan.schedule, plan.pp, plan.virtual_stages)
    return simulate(schedule, places, times, times, times, 0.1)


@pytest.mark.parametrize("stack", [stacks.TRAINWRIGHT, stacks.MEGATRON_CORE])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_the_way_through_a_step_peaks_at_what_is_predicted(
    schedule: str, virtual: int, recompute: str, stack: Stack
) -> None:
    job = Job(gpt(16, 256, 4, vocabulary=2048), 2048, 16, stack=stack)
    plan = plan_of(
        pp=4, accumulation=16, schedule=schedule, virtual_stages=virtual, recompute=recompute,
        stage_layers=(16 // (4 * virtual),) * (4 * virtual),
    )  # fmt: skip
    cluster = cluster_of(4)
    prediction = predict_memory(job, plan, cluster)
    curves = memory_timeline(job, plan, step_of(plan), cluster)
    assert max(size for curve in curves for _, size in curve) == pytest.approx(
        prediction.total.value
    )
    for curve in curves:
        assert [when for when, _ in curve] == sorted(when for when, _ in curve)
        assert curve[0][1] == pytest.approx(curve[-1][1])  # all is let go of again


@pytest.mark.parametrize(
    ("schedule", "virtual", "most"),
    [
        # Micro-batches of a whole rank, by the closed formulas.
        ("gpipe", 1, lambda p, m, i, v: m),
        ("1f1b", 1, lambda p, m, i, v: min(m, p - i)),
        ("interleaved", 2, lambda p, m, i, v: (2 * (p - i - 1) + (v - 1) * p + 1) / v),
        ("zbv", 2, lambda p, m, i, v: p),
    ],
)
def test_activations_in_flight_are_the_closed_formulas(
    schedule: str, virtual: int, most: Any
) -> None:
    stack = replace(stacks.MEGATRON_CORE, keeps_logits=0, holes=0)
    ranks, many = 4, 16
    layers = (16 // (ranks * virtual),) * (ranks * virtual)
    plan = plan_of(
        pp=ranks, accumulation=many, schedule=schedule, virtual_stages=virtual, stage_layers=layers
    )
    job = Job(gpt(16, 256, 4), 2048, many, stack=stack)
    head = 2 * 4 * 256 * 2048  # the last stage's hidden states, their norm, and both gradients
    layer = 2048 * (2 * 16 * 256 + 4 * 4)
    for rank, curve in enumerate(memory_timeline(job, plan, step_of(plan))):
        held = max(size for _, size in curve) - curve[0][1]
        expected = most(ranks, many, rank, virtual) * 4 * layer
        last = ranks - 1 if schedule != "zbv" else 0
        if rank == last:
            assert expected < held <= expected + many * head
        else:
            assert held == pytest.approx(expected)


def test_a_network_without_a_gate_has_the_papers_parameters_and_flops() -> None:
    """Narayanan et al. 2021, equations 2 and 3: 12 L h^2 and 24 s L h^2 but for small terms."""
    layers, hidden, vocabulary, length = 48, 6144, 51200, 2048
    config = replace(
        gpt(layers, hidden, 64, vocabulary), qkv_bias=True, output_bias=True, mlp_bias=True
    )
    # Its norms have biases, 2h a layer and h behind the last, and its positions are learned.
    biases = 13 * layers * hidden - 2 * layers * hidden + hidden
    assert parameter_count(config) == 12 * layers * hidden**2 + biases + vocabulary * hidden
    weights = [weight for layer in range(layers) for weight in block_weights(config, layer)]
    assert sum(map(math.prod, (weight.shape for weight in weights))) == (
        parameter_count(config) - hidden - vocabulary * hidden
    )
    # Attention's whole square is counted there, half of it here.
    matrices, attention, head = 24 * layers * hidden**2, 2 * length * layers * hidden, 2 * hidden
    assert flops_per_token(config, length) == matrices + attention + head * vocabulary


def test_the_head_holds_its_logits_from_the_end_of_its_forward_pass() -> None:
    stack = replace(stacks.MEGATRON_CORE, holes=0.0)
    job = Job(gpt(16, 256, 4, vocabulary=2048), 2048, 16, stack=stack)
    plan = plan_of(pp=4, accumulation=16, stage_layers=(4,) * 4)
    rank = rank_memory(job, plan, 3)
    curve = memory_timeline(job, plan, step_of(plan))[3]
    assert rank.logits == 2048 * 4 * 2048
    rises = [size - curve[0][1] for _, size in curve[:4]]
    assert rises == pytest.approx(
        [0, rank.working, rank.kept[3] + rank.logits + rank.working, rank.kept[3]]
    )


def test_an_allocator_gives_back_half_its_holes_before_memory_is_out() -> None:
    stack = replace(stacks.MEGATRON_CORE, holes=0.2, memory_bytes=GIB)
    job, plan = Job(gpt(16, 1024, 8), 2048, 8, stack=stack), plan_of(micro_batch=8)
    counted = predict_memory(job, plan, cluster_of(1, gib=1000)).total.value - GIB
    counted /= 1.2 * GIB
    roomy = predict_memory(job, plan, cluster_of(1, gib=1 + 1.21 * counted))
    tight = predict_memory(job, plan, cluster_of(1, gib=1 + 1.15 * counted))
    short = predict_memory(job, plan, cluster_of(1, gib=1 + 1.05 * counted))
    assert roomy.fits and roomy.total.value == pytest.approx((1 + 1.2 * counted) * GIB)
    assert tight.fits and tight.total.value == pytest.approx(tight.limit)
    assert not short.fits and short.total.value == pytest.approx((1 + 1.1 * counted) * GIB)


def test_the_device_with_the_least_left_is_told() -> None:
    big = cluster_of(2, gib=80).pools[0]
    small = replace(cluster_of(2, gib=8).pools[0], name="small")
    job = Job(gpt(16, 256, 4), 2048, 16, stack=stacks.MEGATRON_CORE)
    plan = plan_of(pp=2, dp_shard=2, zero=1, accumulation=4, stage_layers=(8, 8))
    assert predict_memory(job, plan, Cluster("both", (big, small))).pp_rank == 1
    assert predict_memory(job, plan, Cluster("both", (small, big))).pp_rank == 0
    with pytest.raises(IndexError):
        predict_memory(job, plan, Cluster("one", (small,)))

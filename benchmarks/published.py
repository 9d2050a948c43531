"""Published runs, read from a table into what the planner takes: a job, a plan, and what was seen.

A row that says too little is kept, with its `problem`, and left out of every prediction. What a row
leaves open but its software is known to do is filled in, and named in `assumed`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.published_models import UnknownRunError, model_config
from trainwright.models.families import DecoderConfig
from trainwright.planner import stacks
from trainwright.planner.job import Job
from trainwright.planner.plan import Plan, Precision, Recompute, ScheduleName

GIB = 1 << 30
_MEMORY = {"H200": 141, "B200": 180, "GB200": 186, "B300": 270, "GB300": 279}
_PRECISIONS: dict[str, Precision] = {
    "fp8": "float8",
    "fp4": "float4",
    "bf16": "bf16",
    "fp16": "fp16",
}
_POLICIES: tuple[Recompute, ...] = ("selective", "full", "none")
Row = Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """One row: `row` counts from 1, without the header; None stands for what it does not say.

    `job` and `plan` are None where there is a `problem`.
    """

    source: str
    row: int
    job: Job | None
    plan: Plan | None
    gpu: str  # "A100-80G": the device and its gigabytes, where several are sold
    gpus: int
    step_seconds: float | None
    memory_bytes: float | None
    out_of_memory: bool
    problem: str | None = None
    model: str = ""
    assumed: tuple[str, ...] = ()

    @property
    def ran(self) -> bool:
        """Whether the run is known to have had enough memory."""
        return self.step_seconds is not None and not self.out_of_memory

    @property
    def gpu_memory_bytes(self) -> float:
        """What a device has; makers' gigabytes of it are binary ones."""
        name, _, size = self.gpu.partition("-")
        return GIB * float(size.rstrip("G") or _MEMORY[name])


def read_runs(path: Path | str) -> list[Run]:
    """The runs of a CSV with the columns of `published_runs.csv`, in its order.

    Raises OSError where there is no such file, KeyError where a column is missing.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        return [_run(number, row) for number, row in enumerate(csv.DictReader(file), 1)]


def _run(number: int, row: Row) -> Run:
    seen = {
        "source": row["src"],
        "row": number,
        "gpu": _gpu(row),
        "gpus": _number(row, "n_gpus") or 0,
        "out_of_memory": "OOM" in row["mem_gib"] + row["notes"],
        "memory_bytes": _times(_measured(row, "mem_gib"), GIB),
        "model": row["model"],
    }
    try:
        config = model_config(row)
        job, plan, assumed = _job_and_plan(row, config)
        seconds = _step_seconds(row, job)
        if seconds is None and seen["memory_bytes"] is None and not seen["out_of_memory"]:
            raise UnknownRunError("nothing was measured")
    except UnknownRunError as unknown:
        empty = {"job": None, "plan": None, "step_seconds": None}
        return Run(**seen, **empty, problem=str(unknown))  # type: ignore[arg-type]
    return Run(**seen, job=job, plan=plan, step_seconds=seconds, assumed=assumed)  # type: ignore[arg-type]


def _measured(row: Row, column: str) -> float | None:
    """A figure; None where there is none, or a word in its place."""
    try:
        return float(row[column])
    except ValueError:
        return None


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _number(row: Row, column: str) -> int | None:
    text = row[column].strip()
    return int(float(text)) if re.fullmatch(r"\d+(\.0*)?", text) else None


def _needed(row: Row, column: str) -> int:
    value = _number(row, column)
    if value is None:
        raise UnknownRunError(
            f"{column} is {row[column]!r}" if row[column] else f"{column} is not given"
        )
    return value


def _gpu(row: Row) -> str:
    """The device, as every source may write it: h100_80gb, DGX-H100, H100-96G-HBM2e-500W."""
    name = re.search(r"(GB|[ABH])\d{2,3}", row["gpu"].upper())
    if name is None:
        return row["gpu"]
    memory = _number(row, "gpu_mem_gb") or {"A100": 80, "H100": 80}.get(name[0])
    return f"{name[0]}-{memory}G" if memory else name[0]


def _job_and_plan(row: Row, config: DecoderConfig) -> tuple[Job, Plan, tuple[str, ...]]:
    assumed = []
    gpus, batch, sequence = _needed(row, "n_gpus"), _needed(row, "gbs"), _needed(row, "seq")
    tp, pp = _needed(row, "tp"), _needed(row, "pp")
    cp = _number(row, "cp") or 1
    data, over = divmod(gpus, tp * pp * cp)
    if over or data != (_number(row, "dp") or data):
        raise UnknownRunError(f"tp {tp} x pp {pp} x cp {cp} x dp {row['dp']} are not {gpus} GPUs")
    virtual = _number(row, "vpp") or 1
    if row["vpp"] == "?":
        virtual = 2
        assumed.append("2 virtual stages")
    micro_batch = _number(row, "mbs")
    if micro_batch is None:
        micro_batch = 1
        assumed.append("micro-batch 1")
    stack = _stack(row)
    accumulation, over = divmod(batch, data * micro_batch)
    if stack.whole_in_pipeline and pp > 1:
        # Its batch size is a rank's for the whole step; the pipeline cuts it into as many
        # micro-batches as there are stages (torchtitan's pipelining, where it is not told).
        rows, accumulation = micro_batch * accumulation, pp * virtual
        micro_batch, over = divmod(rows, accumulation)
    if over or not accumulation:
        raise UnknownRunError(
            f"dp {data} x micro-batch {micro_batch} does not divide the batch of {batch}"
        )
    recompute, told = _recompute(row["recompute"])
    if not told:
        assumed.append(f"recompute {recompute}")
    if not row["heads"] and row["hidden"]:
        assumed.append(f"{config.num_heads} heads")
    zero = _zero(row["zero"])
    sharded = zero > 0 and data * cp > 1
    experts = (_number(row, "ep") or 1) if config.experts else 1
    if experts > 1:
        # Megatron deals experts out over tp too, whole; in a plan, tp cuts each of them.
        experts = max(1, experts // tp)
    schedule: ScheduleName = "interleaved" if virtual > 1 and pp > 1 else "1f1b"
    plan = Plan(
        world_size=gpus,
        dp_replicate=1 if sharded else data,
        dp_shard=data if sharded else 1,
        micro_batch=micro_batch,
        accumulation=accumulation,
        threads=1,
        precision=_precision(row["precision"]),
        recompute=recompute,
        compile=stack is stacks.TORCHTITAN,
        device="cuda",
        sequence_length=sequence,
        optimizer="adamw",
        pp=pp,
        cp=cp,
        tp=tp,
        ep=experts if sharded else 1,
        zero=zero if sharded else 0,
        schedule=schedule,
        virtual_stages=virtual if pp > 1 else 1,
        stage_layers=stage_layers(config.num_layers, pp * virtual) if pp > 1 else (),
    )
    if stack.name.startswith("megatron"):  # pads, so that each of tp's parts is a multiple of 128
        unit = 128 * tp
        config = replace(config, vocab_size=-(-config.vocab_size // unit) * unit)
    # Megatron-Bridge measures with tokens dealt out evenly.
    imbalance = 1.0 if stack is stacks.MEGATRON_CORE else 1.1
    job = Job(config, sequence, batch, imbalance=imbalance, stack=_variant(stack, row))
    return job, plan, tuple(assumed)


def stage_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage, as Megatron, DeepSpeed and torchtitan divide them.

    Evenly; or so that embedding and head count as a layer each; or else as many as the fullest
    needs to have in each stage until none are left.
    """
    most = -(-layers // stages)
    if layers % stages and (layers + 2) % stages == 0:
        even = (layers + 2) // stages
        return (even - 1, *[even] * (stages - 2), even - 1)
    return tuple(max(0, min(most, layers - most * stage)) for stage in range(stages))


def _variant(stack: stacks.Stack, row: Row) -> stacks.Stack:
    """The software as this run had it: its release, and settings that cost or save time."""
    container = re.search(r"\[(\d\d)\.(\d\d)[\d.]* ", row["ref"])  # "[26.04.01 NeMo Container]"
    if container:
        stack = replace(stack, version=int(container[1]) - 26 + int(container[2]) / 12)
    if "AsyncTP" in row["notes"]:
        stack = replace(stack, overlaps_tensor=0.7)
    if "rowwise" in row["precision"]:
        stack = replace(stack, float8_rate=0.5)  # eager kernels of the scales, and slower products
    return stack


def _stack(row: Row) -> stacks.Stack:
    source, precision = row["src"].lower(), row["precision"]
    if "bigscience" in source:
        fp32_sums = "fp32 grad" in precision
        return stacks.MEGATRON_DEEPSPEED_BF16 if fp32_sums else stacks.MEGATRON_DEEPSPEED
    if "korthikanti" in source or "narayanan" in source:
        sequence_parallel = "SP" in row["recompute"]
        return stacks.MEGATRON_SEQUENCE if sequence_parallel else stacks.MEGATRON
    if "torchtitan" in source:
        return stacks.TORCHTITAN_EAGER if "eager" in row["notes"] else stacks.TORCHTITAN
    if "llm-foundry" in source:
        return stacks.COMPOSER if precision.startswith("amp") else stacks.COMPOSER_PURE
    if "megatron-bridge" in source or "megatron-core" in source:
        return stacks.MEGATRON_CORE
    raise UnknownRunError(f"the software of {row['src']} is not known")


def _precision(word: str) -> Precision:
    """amp_bf16, fp8-rowwise, FP8-CS (FP8-MX), NVFP4: the type of matrix products."""
    for sign, precision in {
        "fp8": "float8",
        "fp4": "float4",
        "bf16": "bf16",
        "fp16": "fp16",
    }.items():
        if sign in word.lower():
            return precision  # type: ignore[return-value]
    raise UnknownRunError(f"precision is {word!r}")


def _recompute(word: str) -> tuple[Recompute, bool]:
    """The policy, and whether the source says it."""
    for policy in _POLICIES:
        if word.startswith(str(policy)):
            return policy, True
    if word in ("", "unspecified"):
        return "none", False
    raise UnknownRunError(f"recompute is {word!r}")


def _zero(word: str) -> int:
    if word.startswith("fsdp"):
        return 3
    return int(word) if word.isdigit() else 0


def _step_seconds(row: Row, job: Job) -> float | None:
    """Seconds of a step: as measured, by tokens a second, or by FLOP/s as the source counts."""
    gpus = _needed(row, "n_gpus")
    if seconds := _measured(row, "step_s"):
        return seconds
    if tokens := _measured(row, "tok_s_gpu"):
        return job.batch_tokens / (tokens * gpus)
    if teraflops := _measured(row, "tflops_gpu"):
        return source_flops(row, job) / (teraflops * 1e12 * gpus)
    return None


def source_flops(row: Row, job: Job) -> float:
    """FLOPs of a step as the sources count them that publish nothing but FLOP/s.

    Narayanan et al. 2021, equation 3, and Megatron-LM up to 2024: attention's whole square, the
    logits three times, all layers three times, or four where recomputing them is counted.
    """
    config, tokens = job.config, job.batch_tokens
    heads, hidden = config.num_heads * config.head_dim, config.hidden_size
    keys = config.num_kv_heads * config.head_dim
    matrices = 2 * hidden * (2 * heads + 2 * keys) + 4 * hidden * config.intermediate_size
    matrices += 2 * hidden * config.intermediate_size * config.gated
    layers = config.num_layers * (matrices + 4 * job.sequence_length * heads)
    times = 4 if row["flops_kind"].startswith("hardware") else 3
    return tokens * (times * layers + 3 * 2 * hidden * config.vocab_size)

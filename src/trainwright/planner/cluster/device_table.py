"""Common devices by their data sheets: rates without sparsity, with fp32 sums. No torch.

fp32 is the rate of ordinary arithmetic and not TF32's: training here never rounds fp32 products,
unless torch is told to. What a maker gives with sparsity alone is halved. Idle power stands on no
data sheet: it is taken as an eighth of the greatest. Prices are what renting one for an hour cost
without a contract, rounded, and only meant to put devices in order.
"""

from __future__ import annotations

from trainwright.planner.cluster.describe import DeviceKind, Kind

_IDLE_SHARE = 1 / 8


def _kind(
    name: str,
    kind: Kind,
    memory: float,
    bandwidth: float,
    watts: float,
    units: int,
    source: str,
    **teraflops: float,
) -> DeviceKind:
    """`memory` in GiB, which makers call GB, `bandwidth` in GB/s, rates in TFLOP/s."""
    return DeviceKind(
        name=name,
        kind=kind,
        memory_bytes=memory * (1 << 30),
        peak_flops={precision: rate * 1e12 for precision, rate in teraflops.items()},
        memory_bandwidth=bandwidth * 1e9,
        watts=watts,
        idle_watts=watts * _IDLE_SHARE,
        units=units,
        source=source,
    )


_A100 = "NVIDIA A100 data sheet, 2021"
_H100 = "NVIDIA H100 data sheet, 2024"
_H200 = "NVIDIA H200 data sheet, 2024"
_GH200 = "NVIDIA GH200 data sheet, 2023"
_HGX = "NVIDIA HGX platform data sheet, 2025, an eighth of the board"
_GB200 = "NVIDIA GB200 NVL72 data sheet, 2024, a 72nd of the rack"
_GB300 = "NVIDIA GB300 NVL72 data sheet, 2025, a 72nd of the rack"
_ADA = "NVIDIA Ada GPU architecture white paper, 2023"
_RTX50 = "NVIDIA RTX Blackwell GPU architecture white paper, 2025"
_TPU = "Google Cloud, TPU v5p, 2024; power assumed; fp32 products as six of bf16"
_CPU = "8 cores at 3 GHz with two 256-bit FMAs and two channels of DDR4-3200"

_a100 = {"fp32": 19.5, "bf16": 312, "fp16": 312}
_sxm = {"fp32": 67, "bf16": 989, "fp16": 989, "float8": 1979}
_nvl = {"fp32": 60, "bf16": 835, "fp16": 835, "float8": 1671}
_b = {"fp32": 75, "bf16": 2250, "fp16": 2250, "float8": 4500}
_gb = {"fp32": 80, "bf16": 2500, "fp16": 2500, "float8": 5000}

DEVICES: tuple[DeviceKind, ...] = (
    _kind("A100-40G-SXM", "cuda", 40, 1555, 400, 108, _A100, **_a100),
    _kind("A100-40G-PCIe", "cuda", 40, 1555, 250, 108, _A100, **_a100),
    _kind("A100-80G-SXM", "cuda", 80, 2039, 400, 108, _A100, **_a100),
    _kind("A100-80G-PCIe", "cuda", 80, 1935, 300, 108, _A100, **_a100),
    _kind("H100-SXM", "cuda", 80, 3350, 700, 132, _H100, **_sxm),
    _kind(
        "H100-PCIe",
        "cuda",
        80,
        2000,
        350,
        114,
        "NVIDIA H100 PCIe product brief, 2022",
        fp32=51,
        bf16=756,
        fp16=756,
        float8=1513,
    ),
    _kind("H100-NVL", "cuda", 94, 3900, 400, 132, _H100, **_nvl),
    _kind("GH200", "cuda", 96, 4000, 1000, 132, _GH200, **_sxm),
    _kind("H200-SXM", "cuda", 141, 4800, 700, 132, _H200, **_sxm),
    _kind("H200-NVL", "cuda", 141, 4800, 600, 132, _H200, **_nvl),
    _kind("B200", "cuda", 180, 7700, 1000, 148, _HGX, **_b, float4=9000),
    _kind("GB200", "cuda", 186, 8000, 1200, 148, _GB200, **_gb, float4=10000),
    _kind("B300", "cuda", 270, 7700, 1100, 160, _HGX, **_b, float4=13500),
    _kind("GB300", "cuda", 279, 8000, 1400, 160, _GB300, **_gb, float4=15000),
    _kind(
        "MI300X",
        "rocm",
        192,
        5300,
        750,
        304,
        "AMD Instinct MI300X data sheet, 2023",
        fp32=163.4,
        bf16=1307,
        fp16=1307,
        float8=2615,
    ),
    _kind("TPU-v5p", "tpu", 95, 2765, 500, 8, _TPU, fp32=76.5, bf16=459),
    _kind(
        "RTX-4090",
        "cuda",
        24,
        1008,
        450,
        128,
        _ADA,
        fp32=82.6,
        bf16=165.2,
        fp16=165.2,
        float8=330.3,
    ),
    _kind(
        "RTX-5090",
        "cuda",
        32,
        1792,
        575,
        170,
        _RTX50,
        fp32=104.8,
        bf16=209.5,
        fp16=209.5,
        float8=419,
        float4=1676,
    ),
    _kind("L40S", "cuda", 48, 864, 350, 142, _ADA, fp32=91.6, bf16=362, fp16=362, float8=733),
    _kind("L4", "cuda", 24, 300, 72, 58, _ADA, fp32=30.3, bf16=121, fp16=121, float8=242.5),
    _kind("CPU", "cpu", 16, 51.2, 65, 8, _CPU, fp32=0.77, bf16=0.77, fp16=0.77),
)

# What the driver calls it; the first that matches is it. "D" and "Laptop GPU" variants are slower.
DRIVER_NAMES: tuple[tuple[str, str], ...] = (
    (r"\bGB300\b", "GB300"),
    (r"\bB300\b", "B300"),
    (r"\bGB200\b", "GB200"),
    (r"\bB200\b", "B200"),
    (r"\bH200 NVL\b", "H200-NVL"),
    (r"\bGH200\b", "GH200"),
    (r"\bH200\b", "H200-SXM"),
    (r"\bH100 PCIe\b", "H100-PCIe"),
    (r"\bH100 NVL\b", "H100-NVL"),
    (r"\bH100\b", "H100-SXM"),  # it calls itself "NVIDIA H100 80GB HBM3"
    (r"\bA100-PCIE-40GB\b", "A100-40G-PCIe"),
    (r"\bA100 80GB PCIe\b", "A100-80G-PCIe"),
    (r"\bA100-SXM4-40GB\b", "A100-40G-SXM"),
    (r"\bA100\b", "A100-80G-SXM"),
    (r"\bL40S\b", "L40S"),
    (r"\bL4\b", "L4"),
    (r"\bRTX 5090$", "RTX-5090"),
    (r"\bRTX 4090$", "RTX-4090"),
    (r"\bMI300X\b", "MI300X"),
)

PRICES_FROM = "list prices of RunPod, Lambda and Google Cloud, 2025 and 2026"
DOLLARS_PER_HOUR: dict[str, float] = {
    "A100-40G-SXM": 1.3,
    "A100-80G-PCIe": 1.6,
    "A100-80G-SXM": 1.8,
    "H100-PCIe": 2.4,
    "H100-SXM": 3.0,
    "H200-SXM": 3.8,
    "B200": 5.5,
    "MI300X": 2.5,
    "TPU-v5p": 4.2,
    "RTX-4090": 0.6,
    "RTX-5090": 0.9,
    "L40S": 0.9,
    "L4": 0.5,
}

"""What has been measured on a machine, kept by a fingerprint of its hardware and software.

`trainwright doctor --calibrate` measures (`training.calibration`), `planner.cost.measured` reads it
between the points. Runs add how far predictions were off (`planner.cost.refine`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trainwright.errors import Mistake, UserError
from trainwright.files import write_json
from trainwright.planner.cluster.describe import Observation
from trainwright.planner.plan import Machine

_FORMAT = 2

# What the numbers of a sample's shape are, by kernel. Bytes of a gather are of what it makes, of
# the others of what a worker gives.
KERNELS: Mapping[str, tuple[str, ...]] = {
    "product": ("rows", "columns", "inner"),
    "attention": ("heads", "tokens", "width"),  # heads of all rows, causal, forward
    "attention_backward": ("heads", "tokens", "width"),
    "packed_attention": ("heads", "tokens", "width"),  # of rows with two documents, see PACKED
    "packed_attention_backward": ("heads", "tokens", "width"),
    # Of half of the queries, as one of two workers has them that share rows.
    "slotted_attention": ("heads", "tokens", "width"),
    "slotted_attention_backward": ("heads", "tokens", "width"),
    # A decoder layer of Llama's kind without compiling, of rows of `tokens`, forward; and back.
    "layer": ("rows", "tokens", "hidden", "inner", "heads", "kv_heads"),
    "layer_backward": ("rows", "tokens", "hidden", "inner", "heads", "kv_heads"),
    "elements": ("bytes",),  # read and written by a kernel that computes next to nothing
    "all_reduce": ("workers", "bytes"),
    "all_gather": ("workers", "bytes"),  # the backend's own, as FSDP2 calls it
    "reduce_scatter": ("workers", "bytes"),
    "gather": ("workers", "bytes"),  # `comm.collectives`', as tensor parallelism calls it
    "scatter_sum": ("workers", "bytes"),
    "all_to_all": ("workers", "bytes"),
    "send": ("workers", "bytes"),  # to the next of a ring, while receiving from the one before
}

# Documents of a packed row: in turns one and two thirds of it come first. They see so much of the
# causal square.
PACKED_VISIBLE = (1 / 3) ** 2 + (2 / 3) ** 2


@dataclass(frozen=True)
class Sample:
    """Seconds that a kernel takes at a shape (`KERNELS` says of what); `precision` of products."""

    kernel: str
    precision: str
    shape: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Probe:
    """A whole step of a small model under a plan (as JSON): its seconds, beside its parts'.

    `log_ratio` is the logarithm of measured over foretold seconds, `features` are the plan's.
    `holes` is what the process held beyond what is counted, as a share of it; None where that was
    not measured.
    """

    plan: str
    seconds: float
    holes: float | None = None
    features: tuple[float, ...] = ()
    log_ratio: float = 0.0


@dataclass(frozen=True, eq=False)  # a thousand numbers: the same object, or another one
class Crowd:
    """What was measured while `workers` processes did the same at once, each on `threads`.

    `hidden_share` of a collective's time passes unnoticed while products are computed beside it.
    """

    workers: int
    threads: int
    samples: tuple[Sample, ...] = ()
    hidden_share: float = 0.0
    probes: tuple[Probe, ...] = ()

    @property
    def step_factor(self) -> float:
        """What a step takes over the sum of its parts: the probes' geometric mean."""
        return math.exp(statistics.fmean(p.log_ratio for p in self.probes)) if self.probes else 1.0

    @property
    def lessons(self) -> Iterator[Observation]:
        """What the probes say of one plan rather than another, beyond the factor of all."""
        mean = math.log(self.step_factor)
        for probe in self.probes:
            yield Observation(probe.features, probe.log_ratio - mean)


@dataclass(frozen=True)
class MemoryConstants:
    """Bytes of a worker that no formula counts.

    Of a process that has imported all it needs, and of having joined the others.
    """

    process_bytes: float = 0.0
    group_bytes: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """All that has been measured on one machine. `facts` tell it apart; `time` is ISO 8601."""

    facts: Mapping[str, str | int]
    time: str = ""
    crowds: tuple[Crowd, ...] = ()
    memory: MemoryConstants = field(default_factory=MemoryConstants)
    observed: tuple[Observation, ...] = ()  # runs, the oldest first

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the facts."""
        canonical = json.dumps(dict(self.facts), sort_keys=True).encode()
        return hashlib.blake2b(canonical, digest_size=8).hexdigest()

    @property
    def lessons(self) -> tuple[Observation, ...]:
        """All that whole steps have taught: the probes first, then runs."""
        return (*(each for crowd in self.crowds for each in crowd.lessons), *self.observed)

    @property
    def holes(self) -> float:
        """What an allocator holds beside, as a share of what is counted."""
        found = [p.holes for crowd in self.crowds for p in crowd.probes if p.holes is not None]
        return statistics.fmean(found) if found else 0.0

    def crowd(self, workers: int) -> Crowd | None:
        """What was measured with so many workers, or with the nearest number of them."""
        if not self.crowds:
            return None
        return min(self.crowds, key=lambda crowd: abs(math.log2(crowd.workers / workers)))

    def scale(self, crowd: Crowd, workers: int, threads: int) -> float:
        """What a crowd's kernels' seconds are times, for so many workers with so many threads.

        On a CPU workers share the cores: twice as many have half of them each.
        """
        if self.facts["device"] != "cpu":
            return 1.0
        cores = int(self.facts["cores"])
        return min(crowd.threads, cores / crowd.workers) / min(threads, cores / workers)

    def added(self, crowd: Crowd) -> Calibration:
        """With a crowd's samples in place of older ones of the same kernels and shapes."""
        before = next((c for c in self.crowds if c.workers == crowd.workers), None)
        if before is not None:
            samples = {(s.kernel, s.precision, s.shape): s for s in before.samples}
            samples |= {(s.kernel, s.precision, s.shape): s for s in crowd.samples}
            hidden = crowd.hidden_share or before.hidden_share
            probes = crowd.probes or before.probes
            crowd = replace(
                crowd, samples=tuple(samples.values()), hidden_share=hidden, probes=probes
            )
        others = (c for c in self.crowds if c.workers != crowd.workers)
        return replace(self, crowds=tuple(sorted((*others, crowd), key=lambda c: c.workers)))


def machine_facts(machine: Machine) -> dict[str, str | int]:
    """What measurements depend on: the hardware, and the software that runs on it."""
    return {
        "device": machine.device_kind,
        "name": machine.device_name,
        "devices": machine.devices,
        "cores": machine.cores,
        "memory_gb": round(machine.memory_bytes / 1e9),
        "system": f"{platform.system()} {platform.machine()}",
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": importlib.metadata.version("torch"),
    }


def calibration_folder() -> Path:
    """Where calibrations are kept: `trainwright/calibration` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "trainwright" / "calibration"


def read_calibration(machine: Machine, folder: Path | None = None) -> Calibration | None:
    """What has been measured on `machine` with the software that is here; None where nothing has.

    Raises UserError for a file that is damaged.
    """
    expected = Calibration(machine_facts(machine))
    path = _path(expected, folder)
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    try:
        document = json.loads(text)
        if document["format"] < _FORMAT:
            return None  # an older release's, which measured less
        found = _from_json(document)
        if found.fingerprint != expected.fingerprint:
            raise ValueError("it is of another machine")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            Mistake(
                f"the calibration in {path} cannot be read: {error}",
                "delete the file, or measure again with `trainwright doctor --calibrate`",
            )
        ) from None
    return found


def write_calibration(calibration: Calibration, folder: Path | None = None) -> Path:
    """Keep it, in place of what was kept of the same machine and software."""
    path = _path(calibration, folder)
    write_json(path, {"format": _FORMAT, **asdict(calibration)})
    return path


def _path(calibration: Calibration, folder: Path | None) -> Path:
    return (folder or calibration_folder()) / f"{calibration.fingerprint}.json"


def _from_json(document: dict[str, Any]) -> Calibration:
    if document.pop("format") != _FORMAT:
        raise ValueError("it is of another version")
    crowds = []
    for crowd in document.pop("crowds"):
        samples = tuple(
            Sample(s["kernel"], s["precision"], tuple(s["shape"]), float(s["seconds"]))
            for s in crowd.pop("samples")
        )
        for sample in samples:
            if len(sample.shape) != len(KERNELS[sample.kernel]) or not 0 < sample.seconds < 1e6:
                raise ValueError(f"{sample} cannot be")
        probes = tuple(
            Probe(**{**probe, "features": tuple(probe["features"])})
            for probe in crowd.pop("probes")
        )
        crowds.append(Crowd(**crowd, samples=samples, probes=probes))
    return Calibration(
        crowds=tuple(crowds),
        memory=MemoryConstants(**document.pop("memory")),
        observed=tuple(
            Observation(tuple(entry["features"]), float(entry["log_ratio"]))
            for entry in document.pop("observed")
        ),
        **document,
    )

"""DeepSpeed's and FSDP's settings as the recipe's `parallel` section."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from trainwright.errors import UserError
from trainwright.recipe.importers.job import (
    Job,
    Table,
    each,
    ignored,
    is_off,
    names,
)
from trainwright.recipe.importers.rules import recompute
from trainwright.recipe.yaml_text import parse

_STAGE = re.compile(r"(?:zero|stage|ds_z|z)[_-]?([0-3])", re.IGNORECASE)
_OWN_WRAPPING = "blocks are sharded one by one, as FSDP2 does it"
_BY_NAME = "read off the file's name, since the file is not here"
_OWN_SAVING = "checkpoints are sharded, and exported whole"


def deepspeed(job: Job, key: str, value: Any) -> None:
    """A DeepSpeed configuration, written out or as the path of a file.

    A file that is not there is judged by its name, such as `zero3_bf16.json`.
    """
    settings = value if isinstance(value, dict) else _settings(job, str(value))
    zero = settings.get("zero_optimization") if settings else None
    if isinstance(zero, dict):
        stage = zero.get("stage", 0)
        seen = "" if isinstance(value, dict) else "read from the file"
        offload = {name: _offloads(zero, f"offload_{name}") for name in ("param", "optimizer")}
    else:
        match = _STAGE.search(Path(str(value)).stem)
        stage = int(match[1]) if match else None
        seen = _BY_NAME
        low = str(value).lower()
        offload = {"optimizer": "offload" in low or "cpu" in low, "param": "params" in low}
    if stage not in (0, 1, 2, 3):
        job.unsupported(key, "its ZeRO stage cannot be found out; write `parallel.zero` yourself")
        return
    if offload["param"] or offload["optimizer"]:
        target = "parameters" if offload["param"] and stage == 3 else "optimizer"
        job.put("parallel.offload", target)
    if stage == 0:
        job.ignored(key, "ZeRO stage 0 is plain data parallelism, which needs no key")
    elif isinstance(value, dict) or seen != _BY_NAME:
        job.translated(key, "parallel.zero", stage, seen)
    else:
        job.approximated(key, "parallel.zero", stage, seen)


def _offloads(zero: dict[str, Any], name: str) -> bool:
    device = zero.get(name)
    return isinstance(device, dict) and device.get("device", "none") != "none"


def _settings(job: Job, text: str) -> dict[str, Any] | None:
    for path in (Path(text), Path(job.name).parent / text):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return None


def fsdp(job: Job, key: str, value: Any) -> None:
    """FSDP's options: a list such as [full_shard, auto_wrap], or text with spaces between."""
    options = names(value.replace(" ", ",") if isinstance(value, str) else value)
    _shard(job, key, next((each for each in options if "shard" in each), "full_shard"))
    if "offload" in options:
        job.put("parallel.offload", "parameters")


def _shard(job: Job, key: str, value: Any) -> None:
    kind = str(value).lower()
    if kind in ("hybrid_shard", "hybrid_shard_zero2"):
        reason = "give `parallel.dp_replicate`, the number of groups that each hold whole weights"
        job.approximated(key, "parallel.zero", 2 if kind.endswith("2") else 3, reason)
    elif kind == "shard_grad_op":
        job.translated(key, "parallel.zero", 2)
    elif kind == "no_shard":
        job.ignored(key, "plain data parallelism needs no key")
    else:
        job.translated(key, "parallel.zero", 3)


def _resharding(job: Job, key: str, value: Any) -> None:
    """FSDP2's switch: true is ZeRO 3, false 2; FSDP1's names of strategies are read as well."""
    if isinstance(value, bool):
        job.translated(key, "parallel.zero", 3 if value else 2)
    else:
        _shard(job, key, value)


def _offload(job: Job, key: str, value: Any) -> None:
    if is_off(value):
        job.ignored(key, "switched off")
    else:
        job.translated(key, "parallel.offload", "parameters")


def _activations(job: Job, key: str, value: Any) -> None:
    if is_off(value):
        job.ignored(key, "switched off")
    else:
        recompute(job, key, value)


# Keys of `fsdp_config`, in both generations' spelling without the `fsdp_` before them.
_FSDP: Table = {
    "offload_params": _offload,
    "cpu_offload": _offload,
    "sharding_strategy": _shard,
    "reshard_after_forward": _resharding,
    "activation_checkpointing": _activations,
    "version": ignored("it is FSDP2 here"),
    **each(
        "auto_wrap_policy transformer_layer_cls_to_wrap min_num_params use_orig_params "
        "limit_all_gathers backward_prefetch forward_prefetch sync_module_states "
        "cpu_ram_efficient_loading backward_prefetch_policy xla xla_fsdp_v2",
        ignored(_OWN_WRAPPING),
    ),
    **each("state_dict_type final_state_dict_type save_ignored_modules", ignored(_OWN_SAVING)),
    "mixed_precision_policy": ignored("`training.precision` says it"),
}


def fsdp_config(job: Job, key: str, value: Any) -> None:
    """`fsdp_config`: a section in either generation's spelling, or the path of a file."""
    if not isinstance(value, dict):
        job.unsupported(key, "write the file's keys into the configuration and import it again")
        return
    table = {name: _FSDP.get(name.removeprefix("fsdp_")) for name in value}
    job.run({name: rule for name, rule in table.items() if rule is not None}, key)
    # FSDP2's section stands alone, without the list `fsdp`.
    if job.given("parallel.zero") is None and not job.has("fsdp"):
        job.put("parallel.zero", 3)


def accelerate(job: Job, key: str, value: Any) -> None:
    """An accelerate configuration named on a command line; judged by its name if it is not here."""
    found = _accelerate_file(job, str(value))
    text = Path(str(value)).stem.lower()
    match = _STAGE.search(text)
    if found is not None:
        _from_accelerate(job, key, found)
    elif match and match[1] in "123":
        job.approximated(key, "parallel.zero", int(match[1]), _BY_NAME)
    elif "fsdp" in text:
        job.approximated(key, "parallel.zero", 3, _BY_NAME)
    elif "single" in text or "multi_gpu" in text:
        job.ignored(key, "workers are as many as there are devices")
    else:
        job.unsupported(key, "how the work is spread stands in `parallel`")


def _accelerate_file(job: Job, text: str) -> dict[str, Any] | None:
    for path in (Path(text), Path(job.name).parent / text):
        try:
            found = parse(path.read_text(encoding="utf-8"), str(path)).value
        except (OSError, ValueError, UserError):
            continue
        if isinstance(found, dict):
            return found
    return None


def _from_accelerate(job: Job, key: str, found: dict[str, Any]) -> None:
    """ZeRO's stage from `distributed_type` and the section that goes with it."""
    kind = str(found.get("distributed_type", "NO")).upper()
    inner = found.get("deepspeed_config" if kind == "DEEPSPEED" else "fsdp_config")
    inner = inner if isinstance(inner, dict) else {}
    seen = "read from the file"
    if kind == "DEEPSPEED" and inner.get("zero_stage") in (1, 2, 3):
        job.translated(key, "parallel.zero", inner["zero_stage"], seen)
        devices = [inner.get(f"offload_{name}_device", "none") for name in ("param", "optimizer")]
        if set(devices) - {"none"}:
            whole = devices[0] != "none"
            job.put("parallel.offload", "parameters" if whole else "optimizer")
    elif kind == "FSDP":
        partly = inner.get("fsdp_reshard_after_forward") in (False, "SHARD_GRAD_OP")
        job.translated(key, "parallel.zero", 2 if partly else 3, seen)
        if inner.get("fsdp_offload_params") is True:
            job.put("parallel.offload", "parameters")
    else:
        job.ignored(key, "workers are as many as there are devices")


# Degrees that Axolotl and others name in the same way.
PARALLEL: dict[str, str] = {
    "dp_shard_size": "parallel.dp_shard",
    "dp_replicate_size": "parallel.dp_replicate",
    "tensor_parallel_size": "parallel.tp",
    "context_parallel_size": "parallel.cp",
    "sequence_parallel_degree": "parallel.cp",
    "expert_parallel_size": "parallel.ep",
}

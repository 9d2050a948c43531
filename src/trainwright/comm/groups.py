"""Process groups by name: what a collective's traffic is booked under ("tp", "fsdp", …)."""

from __future__ import annotations

import torch.distributed as dist

_names: dict[str, str] = {}


def name_group(group: dist.ProcessGroup, name: str) -> None:
    """Book the traffic of `group` under `name` from now on; a later name takes its place."""
    _names[group.group_name] = name


def group_name(group: dist.ProcessGroup | None) -> str:
    """The name given to `group`; "world" for all workers (None), "other" where none was given."""
    if group is None or group is dist.group.WORLD:
        return "world"
    return _names.get(group.group_name, "other")

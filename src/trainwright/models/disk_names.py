"""What tensors are called in a model's files, where that is not their name in memory. Torch-free.

Published mixtures of experts have a tensor for every matrix of every expert; in memory the experts
of a layer are stacked, and a stacked matrix is named after what it is made of.
"""

from __future__ import annotations

import re

from trainwright.models.families import DecoderConfig
from trainwright.models.sparse_spec import STACKED

_SPARSE = re.compile(rf"(model\.layers\.(\d+)\.)mlp\.(experts\.({'|'.join(STACKED)})$|.*)")
_BEYOND = re.compile(r"model\.layers\.(\d+)\.")


def is_stacked(name: str) -> bool:
    """Whether the tensor of that name in memory has its experts along the first dimension."""
    return bool((found := _SPARSE.fullmatch(name)) and found[4])


def names_on_disk(config: DecoderConfig, name: str) -> list[str]:
    """What a tensor is called in files: one name, or one for every expert of a stacked tensor."""
    found, experts = _SPARSE.fullmatch(name), config.experts
    if found is None or experts is None or not config.is_sparse(int(found[2])):
        return [name]
    module = f"{found[1]}{experts.module_on_disk}"
    if found[4] is None:
        return [f"{module}.{found[3]}"]
    matrix = experts.names_on_disk[STACKED.index(found[4])]
    return [f"{module}.experts.{expert}.{matrix}.weight" for expert in range(experts.count)]


def is_beyond(config: DecoderConfig, name: str) -> bool:
    """Whether a tensor in a file belongs to a layer past the last one.

    DeepSeek V3's checkpoints hold layers that predict further tokens there.
    """
    found = _BEYOND.match(name)
    return found is not None and int(found[1]) >= config.num_layers

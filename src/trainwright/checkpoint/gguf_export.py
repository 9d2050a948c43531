"""GGUF files for llama.cpp and what is built on it, from a run's weights or any exported model.

From `gguf_model` (what the model is), `gguf_tensors` (its weights), `gguf_vocabulary` (its
tokenizer), written by `gguf_file`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trainwright.checkpoint.gguf_file import require_gguf, write_gguf
from trainwright.checkpoint.gguf_model import (
    Architecture,
    architecture,
    check_model,
    model_values,
)
from trainwright.checkpoint.gguf_tensors import gguf_tensors
from trainwright.checkpoint.gguf_vocabulary import vocabulary
from trainwright.checkpoint.storage import Entry
from trainwright.models.directory import read_decoder_config, read_hf_config
from trainwright.models.disk_names import is_stacked
from trainwright.models.families import DecoderConfig
from trainwright.models.safetensors_files import find_tensors
from trainwright.models.weights import (
    beyond_the_model,
    model_names_on_disk,
    named_tensors,
    new_model,
)
from trainwright.recipe.schema import GgufType

_BLOCKS_VERSION = 2  # of how quantised blocks are laid out


def write_gguf_files(
    directory: Path,
    name: str,
    kinds: Sequence[GgufType],
    entries: Sequence[Entry],
    *,
    hf_config: Mapping[str, Any],
    tokenizer: Path,
    turn_end: int | None = None,
) -> list[str]:
    """Write `directory`/`name`-Q8_0.gguf and so on, one file for each of `kinds`.

    `entries` are the model's weights under Hugging Face's names for files, `hf_config` its
    config.json, `tokenizer` the directory of its tokenizer, `turn_end` the token that ends an
    answer. No more than one weight is in memory. Returns notes on what llama.cpp will do otherwise
    than transformers. Raises UserError where the package `gguf` is missing, and for models and
    tokenizers that llama.cpp would compute wrongly.
    """
    config, arch = check_gguf(hf_config, directory)
    about, notes = model_values(config, arch)
    words, more = vocabulary(tokenizer, config.vocab_size, turn_end)
    notes += more
    for kind in kinds:
        tensors, more = gguf_tensors(entries, config, arch, kind)
        notes += [note for note in more if note not in notes]
        general = {
            "general.architecture": arch.name,
            "general.type": "model",
            "general.name": name,
            "general.file_type": _file_type(kind),
            "general.quantization_version": _BLOCKS_VERSION,
        }
        path = directory / f"{name}-{kind.upper()}.gguf"
        write_gguf(path, {**general, **about, **words}, tensors)
    return notes


def check_gguf(hf_config: Mapping[str, Any], directory: Path) -> tuple[DecoderConfig, Architecture]:
    """The model of a config.json, and what llama.cpp makes of it.

    Raises UserError as `write_gguf_files` does, but before any weights are read; `directory` is
    where the config stands.
    """
    require_gguf()
    arch = architecture(hf_config)
    config = read_decoder_config(hf_config, directory)
    check_model(config, arch)
    return config, arch


def directory_entries(directory: Path) -> list[Entry]:
    """The weights of a Hugging Face directory, each read when asked for.

    Raises UserError for a config or weights that do not belong together.
    """
    config = read_decoder_config(read_hf_config(directory), directory)
    model = new_model(config, device="meta")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in named_tensors(model):
        shape = tuple(tensor.shape[1:] if is_stacked(name) else tensor.shape)
        shapes |= dict.fromkeys(model_names_on_disk(model, name), shape)
    files = find_tensors(directory, shapes, beyond_the_model(model))
    places = {name: file for file, names in files.items() for name in names}
    reader = _Files(places)
    return [reader.entry(name, shape) for name, shape in shapes.items()]


class _Files:
    """Reads tensors by name; one file is open at a time."""

    def __init__(self, places: Mapping[str, Path]) -> None:
        self.places = places
        self.path: Path | None = None

    def entry(self, name: str, shape: tuple[int, ...]) -> Entry:
        return Entry(name, torch.float32, shape, lambda: self.read(name))

    def read(self, name: str) -> Tensor:
        if self.path != self.places[name]:
            self.path = self.places[name]
            self.handle = safe_open(self.path, framework="pt")
        return self.handle.get_tensor(name)


def _file_type(kind: GgufType) -> int:
    import gguf

    member = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    return int(gguf.LlamaFileType[member])

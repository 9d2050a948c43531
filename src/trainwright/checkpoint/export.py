"""A checkpoint's weights as a Hugging Face directory that transformers loads.

Reads any checkpoint in one process, however many workers saved it, a tensor at a time.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainwright.checkpoint import integrity
from trainwright.checkpoint.commit import size_text, step_directory
from trainwright.checkpoint.manifest import Manifest, StoredFile, StoredTensor
from trainwright.checkpoint.storage import Entry, read_tensor, write_file
from trainwright.errors import Mistake, UserError
from trainwright.files import sync_directory, write_atomically, write_json
from trainwright.models.disk_names import is_stacked, names_on_disk
from trainwright.models.families import FAMILIES, decoder_config
from trainwright.models.safetensors_files import INDEX, SINGLE
from trainwright.models.scoring import gives_scores

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MARKER = "trainwright.json"  # says that a directory is an export, and of what
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


def export_checkpoint(
    checkpoints: Path | str,
    step: int,
    destination: Path | str,
    *,
    hf_config: Mapping[str, Any],
    tokenizer_directory: Path | str | None = None,
    dtype: str = "fp32",
    shard_bytes: int = 5_000_000_000,
    generation_config: Mapping[str, Any] | None = None,
    card: str,
) -> Path:
    """Write the model in `checkpoints/step-…` to `destination`; returns it.

    Config, safetensors shards of at most `shard_bytes`, tokenizer, generation config and model
    card. It is built beside and renamed into place; an earlier export there is replaced. Floating
    point tensors are converted to `dtype` (fp32, bf16 or fp16). Raises UserError when the
    checkpoint is damaged, when `destination` holds something else, and when the disk is full.
    """
    root, destination = Path(checkpoints), Path(destination).absolute()
    if dtype not in DTYPES:
        raise UserError(f"there is no dtype {dtype}", fix=f"choose one of {', '.join(DTYPES)}")
    entries = model_entries(root, step, hf_config, DTYPES[dtype])
    needed = sum(entry.bytes for entry in entries)
    with new_export(destination, {"step": step, "dtype": dtype}, needed=needed) as beside:
        _write_weights(beside, entries, shard_bytes)
        write_companions(beside, hf_config, dtype, generation_config)
        if tokenizer_directory is not None:
            copy_tokenizer(Path(tokenizer_directory), beside)
        write_atomically(beside / "README.md", card)
    return destination


@contextmanager
def new_export(
    destination: Path | str, about: Mapping[str, Any], *, needed: int | None = None
) -> Iterator[Path]:
    """A folder to write an export into, renamed to `destination` when all of it is there.

    An earlier export there is replaced; `about` says what it is, `needed` how many bytes, if known.
    Raises UserError where `destination` holds something else, and when the disk is full.
    """
    destination = Path(destination).absolute()
    _refuse_to_replace(destination)
    beside = destination.with_name(f".{destination.name}.tmp")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        written = sorted(path.name for path in beside.iterdir())
        write_json(beside / MARKER, {**about, "files": [*written, MARKER]})
        _move_into_place(beside, destination)
    except OSError as error:
        free = shutil.disk_usage(_nearest_directory(destination)).free
        size = "" if needed is None else f"it needs {size_text(needed)}, "
        raise UserError(
            f"the export could not be written to {destination}: {error.strerror or error} "
            f"({size}{size_text(free)} are free)",
            fix="free space there, or choose another destination",
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_companions(
    directory: Path,
    hf_config: Mapping[str, Any],
    dtype: str,
    generation_config: Mapping[str, Any] | None,
) -> None:
    """config.json of a model in `dtype`, and generation_config.json of one that writes."""
    write_json(directory / "config.json", _config(hf_config, DTYPES[dtype]))
    if gives_scores(hf_config):
        return
    write_json(directory / "generation_config.json", _generation(hf_config, generation_config))


def model_entries(
    checkpoints: Path | str, step: int, hf_config: Mapping[str, Any], dtype: torch.dtype
) -> list[Entry]:
    """A saved model's weights in `dtype` under the names that they have in Hugging Face's files,
    each read when asked for. UserError where the checkpoint is damaged."""
    root = Path(checkpoints)
    manifest = integrity.open_manifest(root, step)
    damaged = integrity.verify_files(root, step, _model_files(manifest))
    if damaged:
        raise UserError(damaged)
    return _entries(step_directory(root, step), manifest, hf_config, dtype)


def read_model_tensors(checkpoints: Path | str, step: int) -> dict[str, Tensor]:
    """What a checkpoint holds of its model, whole, by name. UserError where it is damaged."""
    root = Path(checkpoints)
    manifest = integrity.open_manifest(root, step)
    damaged = integrity.verify_files(root, step, _model_files(manifest))
    if damaged:
        raise UserError(damaged)
    directory = step_directory(root, step)
    return {
        name: read_tensor(directory, tensor) for name, tensor in _model_tensors(manifest).items()
    }


def _model_tensors(manifest: Manifest) -> dict[str, StoredTensor]:
    """The model's tensors, under their own names."""
    prefix = "model."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in manifest.tensors.items()
        if name.startswith(prefix)
    }


def _model_files(manifest: Manifest) -> list[StoredFile]:
    chunks = (chunk for tensor in _model_tensors(manifest).values() for chunk in tensor.chunks)
    names = {chunk.file for chunk in chunks}
    return [file for file in manifest.files if file.name in names]


def _entries(
    directory: Path, manifest: Manifest, hf_config: Mapping[str, Any], dtype: torch.dtype
) -> list[Entry]:
    """What the shards hold: all of the model. A tied head was saved as the embedding alone."""
    known = hf_config.get("model_type") in FAMILIES
    config = decoder_config(hf_config) if known else None
    entries = []
    for name, tensor in _model_tensors(manifest).items():
        read = _Reader(directory, tensor, _dtype_on_disk(name, tensor, dtype))
        if config is not None and is_stacked(name):
            for expert, on_disk in enumerate(names_on_disk(config, name)):
                entries.append(
                    Entry(on_disk, read.dtype, tensor.shape[1:], partial(read.expert, expert))
                )
        else:
            on_disk = name if config is None else names_on_disk(config, name)[0]
            entries.append(Entry(on_disk, read.dtype, tensor.shape, read.whole))
    # Elements of one size lie together, so that each tensor is aligned in its file.
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def _dtype_on_disk(name: str, tensor: StoredTensor, dtype: torch.dtype) -> torch.dtype:
    # Routers' biases are moved in steps that a narrow type would swallow; transformers keeps them.
    fixed = name.endswith("e_score_correction_bias") or not tensor.dtype.is_floating_point
    return tensor.dtype if fixed else dtype


class _Reader:
    """A stored tensor, whole or an expert at a time; its experts follow each other in a file."""

    def __init__(self, directory: Path, tensor: StoredTensor, dtype: torch.dtype) -> None:
        self.directory, self.tensor, self.dtype = directory, tensor, dtype
        self._experts: list[Tensor] = []

    def whole(self) -> Tensor:
        return read_tensor(self.directory, self.tensor).to(self.dtype)

    def expert(self, number: int) -> Tensor:
        if not self._experts:
            self._experts = list(self.whole().unbind())
        expert = self._experts[number]
        if number == len(self._experts) - 1:
            self._experts = []
        return expert


def _write_weights(directory: Path, entries: list[Entry], shard_bytes: int) -> None:
    """One file, or shards and the index that names them."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.bytes
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        write_file(directory / name, shard, {"format": "pt"})
    if count > 1:
        weight_map = {
            entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard
        }
        total = sum(entry.bytes for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX, index)


def _config(hf_config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    kept = {key: value for key, value in hf_config.items() if key != "torch_dtype"}
    return {
        **kept,
        "dtype": str(dtype).removeprefix("torch."),
        "transformers_version": importlib.metadata.version("transformers"),
    }


def _generation(
    hf_config: Mapping[str, Any], generation_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The special tokens of the model, and whatever the caller adds."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {key: hf_config[key] for key in keys if hf_config.get(key) is not None}
    return {
        **tokens,
        "do_sample": True,
        **(generation_config or {}),
        "transformers_version": importlib.metadata.version("transformers"),
    }


def copy_tokenizer(source: Path, target: Path) -> None:
    """A run's or model's tokenizer, its chat template too. UserError where there is none."""
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise UserError(Mistake("there is no tokenizer to export", "restore it", where=str(source)))
    for file in found:
        shutil.copyfile(file, target / file.name)


def _refuse_to_replace(destination: Path) -> None:
    """Only an export of ours may be replaced, and only while nothing was added to it."""
    if not destination.exists():
        return
    if not destination.is_dir():
        what = f"{destination} is a file"
    else:
        marker = destination / MARKER
        ours = set(json.loads(marker.read_text())["files"]) if marker.is_file() else set()
        strange = sorted(path.name for path in destination.iterdir() if path.name not in ours)
        if not strange:
            return
        what = f"{destination} holds files that no export wrote: {', '.join(strange[:6])}"
    raise UserError(what, fix="choose another destination, or move what is there")


def _move_into_place(beside: Path, destination: Path) -> None:
    """Make `beside` the destination; what stood there goes once the new one is in its place."""
    sync_directory(beside)
    former = destination.with_name(f".{destination.name}.former.tmp")
    shutil.rmtree(former, ignore_errors=True)
    if destination.exists():
        destination.rename(former)
    try:
        beside.rename(destination)
    except OSError:
        if former.exists():
            former.rename(destination)
        raise
    sync_directory(destination.parent)
    shutil.rmtree(former, ignore_errors=True)


def _nearest_directory(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.is_dir())

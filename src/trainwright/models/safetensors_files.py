"""Safetensors in Hugging Face's layout: one file, or shards named by an index."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainwright.errors import Mistake, UserError
from trainwright.files import sync_directory, write_json
from trainwright.models.directory import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(directory: Path) -> list[Path]:
    """The directory's safetensors files; UserError where one is missing, or all are pickles."""
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(
                Mistake("has no `weight_map`", "restore it", where=str(directory / INDEX))
            )
        files = [directory / name for name in sorted(set(weight_map.values()))]
        missing = [file for file in files if not file.is_file()]
        if missing:
            fix = "copy or download the whole model again"
            raise UserError(
                Mistake(f"{INDEX} names {file.name}, which is missing", fix, where=str(directory))
                for file in missing
            )
        return files
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise UserError(
            Mistake(
                "the weights are Python pickles, which can run code when they are read",
                "convert them where you trust them: `AutoModelForCausalLM.from_pretrained(DIR)"
                ".save_pretrained(NEW_DIR)` in transformers writes safetensors",
                where=str(directory),
            )
        )
    fix = f"it must hold {SINGLE}, or {INDEX} and the shards that it names"
    raise UserError(Mistake("there are no weights", fix, where=str(directory)))


def find_tensors(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    ignore: Callable[[str], bool] = lambda name: False,
) -> dict[Path, list[str]]:
    """The directory's files, and the names of the tensors to read from each.

    The files must hold exactly the tensors in `shapes`, besides those to `ignore`; UserError with
    every mistake found.
    """
    by_file: dict[Path, list[str]] = {}
    found: dict[str, tuple[int, ...]] = {}
    mistakes = []
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as handle:
                by_file[file] = [name for name in handle.keys() if not ignore(name)]  # noqa: SIM118
                for name in by_file[file]:
                    found[name] = tuple(handle.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            fix = "copy or download it again"
            mistakes.append(Mistake(f"cannot be read: {error}", fix, where=str(file)))
    mistakes = mistakes or _differences(directory, shapes, found)
    if mistakes:
        raise UserError(mistakes)
    return by_file


def _differences(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[Mistake]:
    """What stands between the tensors that a model needs and those that the files hold."""
    where, fix = str(directory), "do the weights belong to this config.json?"
    sets = {
        "missing from the files": sorted(shapes.keys() - found.keys()),
        "in the files but not in the model": sorted(found.keys() - shapes.keys()),
    }
    mistakes = [
        Mistake(f"{len(names)} tensors are {what}: {_listed(names)}", fix, where=where)
        for what, names in sets.items()
        if names
    ]
    for name in sorted(shapes.keys() & found.keys()):
        if shapes[name] != found[name]:
            what = f"{name} is {list(found[name])} in the files, {list(shapes[name])} in the model"
            mistakes.append(Mistake(what, fix, where=where))
    return mistakes


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def save_weights(
    tensors: Mapping[str, Tensor], directory: str | Path, *, shard_bytes: int = 5_000_000_000
) -> list[Path]:
    """Write `tensors` as safetensors under their names, in files of at most `shard_bytes`.

    One file is called model.safetensors; several get an index, written last. Each file appears
    whole or not at all, and what an earlier save left over is removed. Returns the files. Raises
    UserError where the disk is full.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes

    count = len(shards)
    names = [SINGLE]
    if count > 1:
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_tensors(shard, directory / name)
    if count > 1:
        weight_map = {
            key: name for name, shard in zip(names, shards, strict=True) for key in sorted(shard)
        }
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX, index)
    else:
        (directory / INDEX).unlink(missing_ok=True)
    for file in directory.glob("model*.safetensors"):
        if file.name not in names:
            file.unlink()
    return [directory / name for name in names]


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """One safetensors file: written beside, flushed to disk, renamed into place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, beside, metadata={"format": "pt"})
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except (SafetensorError, OSError) as error:
        if "os error 28" in str(error) or "No space left" in str(error):
            need = sum(tensor.nbytes for tensor in whole.values())
            fix = f"free at least {need / 1e9:.1f} GB there, or write to another disk"
            raise UserError(Mistake("the disk is full", fix, where=str(path.parent))) from error
        raise
    finally:
        beside.unlink(missing_ok=True)
    sync_directory(path.parent)

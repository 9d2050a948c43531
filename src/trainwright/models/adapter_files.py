"""Adapters in PEFT's directories: adapter_config.json and adapter_model.safetensors.

A tensor has its name in memory, without its adapter's name, after "base_model.model.".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.errors import Mistake, UserError
from trainwright.files import write_json
from trainwright.models.adapted import Adapted
from trainwright.models.adapter_config import config_of, spec_of
from trainwright.models.adapter_init import Read, fill_originals, principal_factors
from trainwright.models.adapter_spec import (
    ALL_LINEAR,
    BESIDE,
    TRAINED,
    AdapterSpec,
    is_adapter_tensor,
)
from trainwright.models.adapters import (
    Model,
    Places,
    add_adapter,
    attach,
    find_places,
    specs,
    whole_structure,
)
from trainwright.models.decoder import Decoder
from trainwright.models.directory import read_json
from trainwright.models.fallback import FallbackModel
from trainwright.models.pieces import Piece
from trainwright.models.quantised import QuantisedLinear
from trainwright.models.safetensors_files import save_tensors
from trainwright.models.weights import write_part

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head."
_BASE = ".base_layer.weight"  # how PEFT calls an embedding that it saves beside its adapter


def save_adapter(
    model: Model,
    directory: str | Path,
    *,
    name: str = TRAINED,
    base_model: str | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter as PEFT reads it; the config, written last, says that it is all there.

    `base_model` is the path or hub id of the base. `tensors` are whole tensors by their names in
    memory, of the whole model; where it is not spread over workers they are the model's own. What
    PiSSA started is written as a plain adapter of twice the rank, which fits the base as it is on
    disk: s (B A - B₀ A₀) = s [B, -B₀] [A; A₀]. Raises UserError where the disk is full.
    """
    spec = specs(model)[name]
    places = find_places(model, replace(spec, dropout=0.0), strict=False)
    tensors = model.state_dict() if tensors is None else tensors
    own = {key: tensor for n, tensor in tensors.items() if (key := _key(n, name, places))}
    if spec.init == "pissa":
        starts = {
            path: (tensors[f"{path}.start_A.weight"], tensors[f"{path}.start_B.weight"])
            for path in places.layers
            if f"{path}.start_A.weight" in tensors
        }
        own, spec = _plain(own, starts), spec.doubled()
    targets: str | tuple[str, ...] = spec.targets
    if targets == ALL_LINEAR:
        targets = _endings(model, places.layers, ".")
    saved = _endings(model, places.saved, "")
    tied = isinstance(model, Decoder) and model.config.tied_embeddings
    if tied and spec.ties and _EMBEDDING in own:
        own[_HEAD + "weight"] = own[_EMBEDDING].clone()  # PEFT wants both names of it
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors({_PREFIX + key: own[key] for key in sorted(own)}, directory / WEIGHTS)
    task = "SEQ_CLS" if isinstance(model, Decoder) and model.config.scores else "CAUSAL_LM"
    config = config_of(spec, targets, saved, base_model=base_model, tied=tied, task=task)
    write_json(directory / CONFIG, dict(sorted(config.items())))


def read_adapter_spec(directory: str | Path) -> AdapterSpec:
    """The spec by which a PEFT directory's adapter is put on a model.

    Raises UserError where the directory has none, or one that is not known here.
    """
    spec = _read_config(Path(directory))
    return spec.doubled() if spec.init == "pissa" else spec


def load_adapter(
    model: Model, directory: str | Path, *, name: str = TRAINED, read: Read | None = None
) -> None:
    """Put a PEFT directory's adapter on a model that has its weights, active beside others.

    Under the name "default" it can be trained on, and everything else is frozen; under another
    it is only used. Raises UserError with all that does not fit, before anything changes. An
    adapter that PiSSA started and PEFT left so needs the base's whole weights: the model's, or
    what `read` gives (`adapter_init.saved_weights`).
    """
    spec = read_adapter_spec(directory)
    if name != TRAINED or isinstance(model, FallbackModel):
        spec = replace(spec, dropout=0.0)
    check_adapter(model, directory)
    if name == TRAINED:
        add_adapter(model, spec, keep_originals=True, strict=False)
    else:
        places = find_places(model, spec, strict=False)
        attach(model, name, spec, places, keep_originals=True)
    fill_adapter(model, directory, name=name, read=read)


def check_adapter(model: Model, directory: str | Path) -> None:
    """UserError with everything about a PEFT directory's adapter that does not fit `model`."""
    directory = Path(directory)
    spec = _read_config(directory)
    expected = _shapes(model, spec)
    found = {key: tuple(tensor.shape) for key, tensor in _tensors(directory).items()}
    if spec.ties and isinstance(model, Decoder) and model.config.tied_embeddings:
        found = {key: shape for key, shape in found.items() if not key.startswith(_HEAD)}
    fix = f"is it an adapter of this model, and does {CONFIG} belong to it?"
    where, mistakes = str(directory / WEIGHTS), []
    for what, keys in (
        ("missing from the file", expected.keys() - found.keys()),
        ("in the file, and nowhere in the model", found.keys() - expected.keys()),
    ):
        keys = {key for key in keys if not key.endswith(_BASE)}
        if keys:
            some = ", ".join(sorted(keys)[:4]) + (", …" if len(keys) > 4 else "")
            mistakes.append(Mistake(f"{len(keys)} tensors are {what}: {some}", fix, where=where))
    for key in sorted(expected.keys() & found.keys()):
        if expected[key] != found[key]:
            what = f"{key} is {list(found[key])} in the file, {list(expected[key])} in the model"
            mistakes.append(Mistake(what, fix, where=where))
    if mistakes:
        raise UserError(mistakes)


@torch.no_grad()
def fill_adapter(
    model: Model, directory: str | Path, *, name: str = TRAINED, read: Read | None = None
) -> None:
    """Fill an adapter that was put on by `read_adapter_spec`, each worker its part.

    The file fits the model: `check_adapter` has said so, before anything was spread.
    Fills the base's copies of `modules_to_save` too, which the model must hold by then. `read` is
    as in `load_adapter`. Raises UserError where the adapter was trained over other embeddings.
    """
    directory = Path(directory)
    spec, tensors = _read_config(directory), _tensors(directory)
    places = find_places(model, replace(spec, dropout=0.0), strict=False)
    pieces: dict[str, Piece] = getattr(model, "pieces", {})
    parameters = dict(model.named_parameters())
    for key in [key for key in tensors if key.endswith(_BASE)]:
        base = f"{key.removesuffix(_BASE)}.weight"
        tensor = tensors.pop(key)
        if base in parameters and _differs(parameters[base], tensor, pieces.get(base)):
            what = f"was trained over another {base} than the model's"
            fix = "merge it into its own model with PEFT"
            raise UserError(Mistake(what, fix, where=str(directory)))
    if spec.init == "pissa":
        starts = {}
        for path, layer in places.layers.items():
            if f"{path}.lora_A.weight" in tensors:
                whole = _base_weight(model, path) if read is None else read(f"{path}.weight")
                starts[path] = principal_factors(whole, layer.rank, layer.scale)
        tensors = _plain(tensors, starts)
    if name == TRAINED:
        fill_originals(model)
    for memory, parameter in parameters.items():
        if (stored := _key(memory, name, places)) is not None:
            write_part(parameter, tensors[stored].__getitem__, pieces.get(memory))


def _read_config(directory: Path) -> AdapterSpec:
    path = directory / CONFIG
    if not path.is_file():
        fix = "it must hold a PEFT adapter: adapter_config.json and adapter_model.safetensors"
        raise UserError(Mistake(f"there is no {CONFIG}", fix, where=str(directory)))
    spec = spec_of(read_json(path), str(path))
    # PEFT takes every module whose name ends so, be it in the midst of a word.
    return replace(spec, modules_to_save=_saved_paths(directory, spec.modules_to_save))


def _tensors(directory: Path) -> dict[str, Tensor]:
    """The file's tensors on the CPU, without PEFT's prefix; UserError where they cannot be had."""
    path = directory / WEIGHTS
    if not path.is_file():
        what, fix = f"there is no {WEIGHTS}", "save the adapter again, as safetensors"
        if any(directory.glob("adapter_model.*")):
            what += ", only Python pickles, which can run code when they are read"
        raise UserError(Mistake(what, fix, where=str(directory)))
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        fix = "copy or download it again"
        raise UserError(Mistake(f"cannot be read: {error}", fix, where=str(path))) from error
    return {key.removeprefix(_PREFIX): tensor for key, tensor in found.items()}


def _key(memory: str, name: str, places: Places) -> str | None:
    """What a tensor of that name in memory is called in an adapter's file; None if it is not in it.

    The base's own versions of whole modules, and what PiSSA started from, are not.
    """
    beside = f".{BESIDE}."
    if name != TRAINED:
        if f"{beside}{name}." not in memory:
            return None
        memory = memory.replace(f"{beside}{name}.", ".")
    if beside in memory or ".start_" in memory:
        return None
    saved = any(memory.startswith(f"{path}.") for path in places.saved)
    return memory if saved or is_adapter_tensor(memory) else None


def _shapes(model: Model, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """What an adapter's file must hold for all of the model, by the file's names."""
    whole, shapes = whole_structure(model), dict[str, tuple[int, ...]]()
    places = find_places(model, replace(spec, dropout=0.0), strict=False)
    for path, layer in places.layers.items():
        module: Any = whole.get_submodule(path)
        embeds = isinstance(module, nn.Embedding)
        outputs = module.embedding_dim if embeds else module.out_features
        inputs = module.num_embeddings if embeds else module.in_features
        names = (
            ("lora_embedding_A", "lora_embedding_B")
            if embeds
            else ("lora_A.weight", "lora_B.weight")
        )
        shapes[f"{path}.{names[0]}"] = (layer.rank, inputs)
        shapes[f"{path}.{names[1]}"] = (outputs, layer.rank)
        if layer.dora:
            shapes[f"{path}.lora_magnitude_vector"] = (outputs,)
    for path in places.saved:
        for own, parameter in whole.get_submodule(path).named_parameters():
            if not is_adapter_tensor(f"{path}.{own}"):
                shapes[f"{path}.{own}"] = tuple(parameter.shape)
    return shapes


def _plain(
    tensors: Mapping[str, Tensor], starts: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of an adapter of twice the rank that adds s (B A - B₀ A₀) to the base.

    `starts` are A₀ and B₀ by the layers' names; layers without, embeddings, get zeros.
    """
    result = {}
    for key, tensor in tensors.items():
        path, _, own = key.removesuffix(".weight").rpartition(".")
        if own in ("lora_A", "lora_embedding_A"):
            A = starts[path][0] if path in starts else torch.zeros_like(tensor)
            tensor = torch.cat([tensor, A.to(tensor)])
        elif own in ("lora_B", "lora_embedding_B"):
            B = starts[path][1] if path in starts else torch.zeros_like(tensor)
            tensor = torch.cat([tensor, -B.to(tensor)], dim=1)
        result[key] = tensor
    return result


def _base_weight(model: Model, path: str) -> Tensor:
    """A layer's whole weight as its base model has it."""
    module = model.get_submodule(path)
    if isinstance(module, QuantisedLinear) or getattr(model, "pieces", {}):
        raise ValueError(f"{path} is quantised or in parts: pass `read`, which gives it as it was")
    if isinstance(module, Adapted):
        return module.updated(module.base_weight(), ())
    weight: Tensor = module.get_parameter("weight")
    return weight


def _differs(parameter: Tensor, tensor: Tensor, piece: Piece | None) -> bool:
    """Whether this worker's part of a parameter is other than that of a whole tensor.

    Beyond what rounding to 16 bits does: adapters are saved from models loaded in any type.
    """
    whole = piece.whole if piece else tuple(parameter.shape)
    if tuple(tensor.shape) != whole:
        return True
    other = torch.empty_like(parameter)
    write_part(other, tensor.__getitem__, piece)
    ours, theirs = (t.to_local() if isinstance(t, DTensor) else t for t in (parameter, other))
    return not torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-6)


def _endings(model: Model, paths: Iterable[str], before: str) -> tuple[str, ...]:
    """Names by which PEFT finds these modules and no others: last parts where those will do.

    It finds what ends in such a name, for targets after a dot: `before`.
    """
    paths = set(paths)
    last = {path.rpartition(".")[2] for path in paths}
    modules = [f".{name}" for name, _ in whole_structure(model).named_modules() if name]
    meant = {name[1:] for name in modules if any(name.endswith(before + end) for end in last)}
    return tuple(sorted(last if meant == paths else paths))


def _saved_paths(directory: Path, endings: tuple[str, ...]) -> tuple[str, ...]:
    """The modules that PEFT saved whole for these endings, by the tensors that the file has."""
    paths = set()
    for key in _tensors(directory):
        parts = key.split(".")
        prefixes = [".".join(parts[:end]) for end in range(1, len(parts))]
        if not is_adapter_tensor(key) and not key.endswith(_BASE):
            paths |= {next((p for p in prefixes if p.endswith(endings)), "")} - {""}
    return tuple(sorted(paths))

"""Weights: made anew, streamed in from Hugging Face's layout, and written back to it.

Every function also takes parameters that are spread over workers (DTensor): each worker makes or
reads its own part alone, and the whole is the same on any layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from trainwright.files import write_json
from trainwright.models.decoder import Decoder, Span
from trainwright.models.directory import (
    read_decoder_config,
    read_hf_config,
    resolve_model_directory,
    stop_token_ids,
)
from trainwright.models.fallback import FallbackModel, load_fallback
from trainwright.models.families import FAMILIES, DecoderConfig
from trainwright.models.norm import RMSNorm
from trainwright.models.pieces import Piece
from trainwright.models.safetensors_files import find_tensors, save_weights

Slices = tuple[slice, ...]


def new_model(
    config: DecoderConfig, *, device: str | torch.device = "cpu", span: Span | None = None
) -> Decoder:
    """A decoder in fp32, or a stage of one, without values: then `initialise` or `load_weights`.

    On "meta" it takes no memory; spread it, `to_empty` it, then fill it.
    """
    with torch.device("meta"):
        model = Decoder(config, span)
    model.stop_token_ids = stop_token_ids(config.hf)
    return model if torch.device(device).type == "meta" else model.to_empty(device=device)


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Fill every parameter of a new model as its family does (transformers' `_init_weights`).

    Matrices and embeddings are normal with std `initializer_range`, a padding token's embedding
    and biases are 0, norms leave their input as it is. Each parameter has a generator of its own,
    seeded by (seed, name): the values depend neither on the layout nor on the device.
    """
    for name, parameter, rule in _rules(model):
        piece = model.pieces.get(name)
        whole = torch.empty(piece.whole if piece else parameter.shape, dtype=torch.float32)
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
        rule(whole, generator)
        _write(parameter, whole.__getitem__, piece)


def load_weights(model: nn.Module, directory: str | Path) -> None:
    """Fill `model`'s parameters from the directory's safetensors, one slice at a time.

    Each worker reads only its own part of each tensor; values are converted to the parameters'
    dtype. Raises one UserError naming every file that is missing or broken and every tensor that
    is missing, unexpected or of another shape.
    """
    parameters = dict(model.named_parameters())
    pieces: dict[str, Piece] = getattr(model, "pieces", {})
    shapes = {
        name: pieces[name].whole if name in pieces else tuple(parameter.shape)
        for name, parameter in parameters.items()
    }
    # A file is closed before the next is opened, so that no more than one is in memory.
    for file, names in find_tensors(Path(directory), shapes, _ignored(model)).items():
        with safe_open(file, framework="pt") as handle, torch.no_grad():
            for name in names:
                _write(parameters[name], handle.get_slice(name).__getitem__, pieces.get(name))


def load_model(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Decoder | FallbackModel:
    """A pretrained model from a directory or hub id, without holding its weights twice.

    Families in `families.FAMILIES` become a `Decoder`; any other `model_type` becomes a
    `FallbackModel` around transformers' own class. Raises UserError for whatever is missing or
    broken; pickled weights (`pytorch_model.bin`) are refused.
    """
    directory = resolve_model_directory(path_or_id, trust_remote_code=trust_remote_code)
    hf = read_hf_config(directory)
    model: Decoder | FallbackModel
    if hf.get("model_type") in FAMILIES:
        model = new_model(read_decoder_config(hf, directory), device="meta").to(dtype)
        model.to_empty(device=device)
        load_weights(model, directory)
    else:
        model = load_fallback(directory, dtype, trust_remote_code=trust_remote_code)
        model.to(device)
    model.stop_token_ids = stop_token_ids(hf, directory)
    return model.eval()


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What an export holds of `model`, by Hugging Face's names, each tensor once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def save_model(
    model: Decoder | FallbackModel, directory: str | Path, *, shard_bytes: int = 5_000_000_000
) -> list[Path]:
    """Write `model` as `load_model` and transformers read it: config.json and safetensors.

    Weights keep their dtype: load → save → load changes no bit. Returns the weight files. Raises
    UserError where the disk is full. A run's export has tokenizer and model card besides.
    """
    hf = dict(model.config.hf if isinstance(model, Decoder) else model.hf)
    dtype = next(model.parameters()).dtype
    hf["dtype"] = str(dtype).removeprefix("torch.")
    files = save_weights(model_tensors(model), directory, shard_bytes=shard_bytes)
    write_json(Path(directory) / "config.json", hf)
    return files


def _ignored(model: nn.Module) -> Callable[[str], bool]:
    """Tensors that some directories hold beyond the parameters, rightly."""
    tied = isinstance(model, Decoder) and model.config.tied_embeddings
    elsewhere: set[str] = set()
    if isinstance(model, Decoder) and model.span != Span(0, model.config.num_layers):
        with torch.device("meta"):  # a stage's directory holds the other stages' weights too
            elsewhere = {name for name, _ in Decoder(model.config).named_parameters()}

    def ignored(name: str) -> bool:
        return (
            name.endswith("rotary_emb.inv_freq")
            or (tied and name == "lm_head.weight")
            or name in elsewhere
        )

    return ignored


def _rules(model: Decoder) -> Iterator[tuple[str, nn.Parameter, Callable[..., object]]]:
    """Each parameter's name, and what fills a tensor like it from a generator."""
    std = model.config.initializer_range
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}"
            if isinstance(module, RMSNorm):
                yield full_name, parameter, _constant(1.0 - module.offset)
            elif isinstance(module, nn.Embedding):
                yield full_name, parameter, _normal(std, module.padding_idx)
            elif name == "bias":
                yield full_name, parameter, _constant(0.0)
            else:
                yield full_name, parameter, _normal(std)


def _constant(value: float) -> Callable[[Tensor, torch.Generator], object]:
    return lambda tensor, generator: tensor.fill_(value)


def _normal(std: float, zero_row: int | None = None) -> Callable[[Tensor, torch.Generator], object]:
    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0.0, std, generator=generator)
        if zero_row is not None:
            tensor[zero_row] = 0.0

    return fill


def _write(parameter: Tensor, read: Callable[[Slices], Tensor], piece: Piece | None = None) -> None:
    """Copy into `parameter`, or this worker's part of it, what `read` gives for those slices."""
    offsets = piece.offsets if piece is not None else (0,) * parameter.ndim

    def read_local(slices: Slices) -> Tensor:
        return read(
            tuple(
                slice(part.start + offset, part.stop + offset)
                for part, offset in zip(slices, offsets, strict=True)
            )
        )

    whole = tuple(slice(0, size) for size in parameter.shape)
    if not isinstance(parameter, DTensor):
        parameter.copy_(read_local(whole))
        return
    local, slices = parameter.to_local(), _local_slices(parameter)
    if slices is not None:
        if local.numel():
            local.copy_(read_local(slices))
        return
    spread = distribute_tensor(
        read_local(whole).to(local.device),
        parameter.device_mesh,
        parameter.placements,
        src_data_rank=None,  # every worker has the whole at hand: nothing is sent
    )
    local.copy_(spread.to_local())


def _local_slices(parameter: DTensor) -> Slices | None:
    """Where this worker's part lies in the whole; None where it is not one block of it."""
    bounds = [(0, size) for size in parameter.shape]
    mesh = parameter.device_mesh
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Replicate):
            continue
        if type(placement) is not Shard:
            return None
        start, stop = bounds[placement.dim]
        chunk = -(-(stop - start) // mesh.size(axis))  # torch.chunk's: ceilings, then what is left
        first = min(start + chunk * mesh.get_local_rank(axis), stop)
        bounds[placement.dim] = (first, min(first + chunk, stop))
    return tuple(slice(start, stop) for start, stop in bounds)

"""Weights: made anew, streamed in from Hugging Face's layout, and written back to it.

Every function also takes parameters that are spread over workers (DTensor): each worker makes or
reads its own part alone, and the whole is the same on any layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from trainwright.errors import Mistake, UserError
from trainwright.files import write_json
from trainwright.models.adapter_spec import is_adapter_tensor
from trainwright.models.decoder import Decoder, Span
from trainwright.models.directory import (
    has_new_head,
    read_decoder_config,
    read_hf_config,
    resolve_model_directory,
    stop_token_ids,
)
from trainwright.models.disk_names import is_beyond, is_stacked, names_on_disk
from trainwright.models.fallback import FallbackModel, load_fallback
from trainwright.models.families import FAMILIES, DecoderConfig
from trainwright.models.norm import RMSNorm
from trainwright.models.pieces import Piece
from trainwright.models.safetensors_files import find_tensors, save_weights
from trainwright.models.scoring import CLASSIFIERS, HEAD, gives_scores

Slices = tuple[slice, ...]
Rule = Callable[[Tensor, torch.Generator], object]  # fills a tensor


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
def initialise(model: Decoder, seed: int, only: Collection[str] | None = None) -> None:
    """Fill the parameters of a new model, all or `only` some, as transformers' `_init_weights`.

    Matrices and embeddings are normal with std `initializer_range`, a padding token's embedding
    and biases are 0, norms leave their input as it is. Each parameter, and each expert of stacked
    ones, has a generator of its own, seeded by (seed, name): the values depend neither on the
    layout nor on the device.
    """
    for name, tensor, rule in initial_values(model):
        if only is not None and name not in only:
            continue
        piece = model.pieces.get(name)
        shape = piece.whole if piece else tuple(tensor.shape)
        if not is_stacked(name):
            write_part(tensor, drawn(f"{seed}:{name}", shape, rule), piece)
            continue
        for expert in range(shape[0]):
            values = drawn(f"{seed}:{name}:{expert}", shape[1:], rule)
            write_part(tensor, values, piece, expert)


def drawn(key: str, shape: tuple[int, ...], rule: Rule) -> Callable[[Slices], Tensor]:
    """Slices of a tensor that `rule` fills, when asked, from a generator that `key` seeds."""

    def draw(slices: Slices) -> Tensor:
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        tensor = torch.empty(shape, dtype=torch.float32)
        rule(tensor, torch.Generator().manual_seed(int.from_bytes(digest) >> 1))
        return tensor[slices]

    return draw


def load_weights(model: nn.Module, directory: str | Path, seed: int = 0) -> None:
    """Fill `model`'s parameters from the directory's safetensors, one slice at a time.

    Each worker reads only its own part of each tensor; values are converted to the parameters'
    dtype. A reward model's head that a language model's directory has not is drawn from `seed`, as
    by `initialise`. Raises one UserError naming every file that is missing or broken and every
    tensor that is missing, unexpected or of another shape.
    """
    new = fill_new_head(model, directory, seed)
    tensors = {name: tensor for name, tensor in named_tensors(model) if name not in new}
    pieces: dict[str, Piece] = getattr(model, "pieces", {})
    places: dict[str, tuple[str, int | None]] = {}  # of a tensor in a file
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        whole = pieces[name].whole if name in pieces else tuple(tensor.shape)
        for number, on_disk in enumerate(model_names_on_disk(model, name)):
            stacked = is_stacked(name)
            places[on_disk] = name, number if stacked else None
            shapes[on_disk] = whole[1:] if stacked else whole
    # A file is closed before the next is opened, so that no more than one is in memory.
    for file, names in find_tensors(Path(directory), shapes, beyond_the_model(model)).items():
        with safe_open(file, framework="pt") as handle, torch.no_grad():
            for on_disk in names:
                name, expert = places[on_disk]
                read = handle.get_slice(on_disk).__getitem__
                write_part(tensors[name], read, pieces.get(name), expert)


def fill_new_head(model: nn.Module, directory: str | Path, seed: int) -> set[str]:
    """Draw what a reward model has that the language model in the directory has not; its names."""
    if not isinstance(model, Decoder) or not has_new_head(model.config, Path(directory)):
        return set()
    new = {name for name, _ in named_tensors(model) if name == f"{HEAD}.weight"}
    initialise(model, seed, new)
    return new


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
        model = new_model(read_decoder_config(hf, directory), device="meta")
        for parameter in model.parameters():  # and no buffers: a router's biases stay fp32
            parameter.data = parameter.data.to(dtype)
        model.to_empty(device=device)
        load_weights(model, directory)
    else:
        if gives_scores(hf):
            what = f"reward models of the family {hf.get('model_type')} are not known"
            raise UserError(Mistake(what, f"there are {', '.join(CLASSIFIERS)}", str(path_or_id)))
        model = load_fallback(directory, dtype, trust_remote_code=trust_remote_code)
        model.to(device)
    model.stop_token_ids = stop_token_ids(hf, directory)
    return model.eval()


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What an export holds of `model`, by the names that it has in files, each tensor once."""
    result: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model):
        parts = tensor.detach().unbind() if is_stacked(name) else [tensor.detach()]
        result.update(zip(model_names_on_disk(model, name), parts, strict=True))
    return result


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


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and persistent buffers of `model` by name, each once; no adapter's."""
    for name, parameter in model.named_parameters():
        if not is_adapter_tensor(name):
            yield name, parameter
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in persistent and not is_adapter_tensor(name):
            yield name, buffer


def model_names_on_disk(model: nn.Module, name: str) -> list[str]:
    return names_on_disk(model.config, name) if isinstance(model, Decoder) else [name]


def beyond_the_model(model: nn.Module) -> Callable[[str], bool]:
    """Tensors that some directories hold beyond the parameters, rightly."""
    if not isinstance(model, Decoder):
        return lambda name: name.endswith("rotary_emb.inv_freq")
    config, elsewhere = model.config, set[str]()
    if model.span != Span(0, config.num_layers):
        own = {name for name, _ in named_tensors(model)}
        with torch.device("meta"):  # a stage's directory holds the other stages' weights too
            others = [name for name, _ in named_tensors(Decoder(config)) if name not in own]
        elsewhere = {on_disk for name in others for on_disk in names_on_disk(config, name)}

    def ignored(name: str) -> bool:
        return (
            name.endswith("rotary_emb.inv_freq")
            or ((config.tied_embeddings or config.scores) and name == "lm_head.weight")
            or is_beyond(config, name)
            or name in elsewhere
        )

    return ignored


def initial_values(model: Decoder) -> Iterator[tuple[str, Tensor, Rule]]:
    """Each parameter's or buffer's name, and what fills a tensor like it from a generator."""
    std = model.config.initializer_range
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            yield f"{prefix}.{name}", buffer, constant(0.0)
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}"
            if is_adapter_tensor(full_name):
                continue
            if isinstance(module, RMSNorm):
                yield full_name, parameter, constant(1.0 - module.offset)
            elif isinstance(module, nn.Embedding):
                yield full_name, parameter, normal(std, module.padding_idx)
            elif name == "bias":
                yield full_name, parameter, constant(0.0)
            else:
                yield full_name, parameter, normal(std)


def constant(value: float) -> Rule:
    return lambda tensor, generator: tensor.fill_(value)


def normal(std: float, zero_row: int | None = None) -> Rule:
    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0.0, std, generator=generator)
        if zero_row is not None:
            tensor[zero_row] = 0.0

    return fill


def write_part(
    parameter: Tensor,
    read: Callable[[Slices], Tensor],
    piece: Piece | None = None,
    expert: int | None = None,
) -> None:
    """Copy into `parameter`, or this worker's part of it, what `read` gives for those slices.

    With `expert`, `read` is of that expert alone and fills its place in a stacked parameter; it is
    not asked for what this worker does not have.
    """
    local, bounds = parameter, [(0, size) for size in parameter.shape]
    if isinstance(parameter, DTensor):
        local, bounds = parameter.to_local(), _local_bounds(parameter)
    if local.numel() == 0:
        return
    offsets = piece.offsets if piece is not None else (0,) * parameter.ndim
    slices = tuple(
        slice(start + offset, stop + offset)
        for (start, stop), offset in zip(bounds, offsets, strict=True)
    )
    if expert is None:
        local.copy_(read(slices))
    elif slices[0].start <= expert < slices[0].stop:
        local[expert - slices[0].start].copy_(read(slices[1:]))


def _local_bounds(parameter: DTensor) -> list[tuple[int, int]]:
    """Where this worker's part begins and ends in the whole, along each dimension."""
    bounds = [(0, size) for size in parameter.shape]
    mesh = parameter.device_mesh
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Replicate):
            continue
        if type(placement) is not Shard:
            raise TypeError(f"a worker's part under {placement} is not one block of the whole")
        start, stop = bounds[placement.dim]
        chunk = -(-(stop - start) // mesh.size(axis))  # torch.chunk's: ceilings, then what is left
        first = min(start + chunk * mesh.get_local_rank(axis), stop)
        bounds[placement.dim] = (first, min(first + chunk, stop))
    return bounds

"""A model's tensors as llama.cpp names, orders and types them, each made when its turn comes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from trainwright.checkpoint.gguf_file import PackedTensor
from trainwright.checkpoint.gguf_model import Architecture, rope_tensors
from trainwright.checkpoint.storage import Entry
from trainwright.errors import UserError
from trainwright.models.families import DecoderConfig
from trainwright.recipe.schema import GgufType

EMBEDDINGS, OUTPUT = "token_embd.weight", "output.weight"
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")
_CORRECTION = "e_score_correction"  # a bias whose name lacks the dot that names are cut at


@dataclass(frozen=True)
class _Named:
    """A tensor under llama.cpp's name, not typed yet."""

    name: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]


def gguf_tensors(
    entries: Sequence[Entry], config: DecoderConfig, arch: Architecture, kind: GgufType
) -> tuple[list[PackedTensor], list[str]]:
    """The tensors of a GGUF file of type `kind`, and notes on those that it cannot hold so.

    `entries` are the model's tensors under the names that they have in Hugging Face's files. As in
    llama.cpp, vectors, norms and routers stay in f32, and the output matrix (or the embeddings that
    stand for it) has 8 bits where others have fewer. Raises UserError for names that llama.cpp's
    architecture does not have.
    """
    named = _named(entries, config, arch)
    tied = all(tensor.name != OUTPUT for tensor in named)
    if tied and arch.needs_output:
        embeddings = next(tensor for tensor in named if tensor.name == EMBEDDINGS)
        named.append(replace(embeddings, name=OUTPUT))
        tied = False
    packed, odd = [], []
    for tensor in named:
        type_ = _type(tensor, kind, EMBEDDINGS if tied else OUTPUT)
        if type_.startswith("q") and tensor.shape[-1] % 32:
            type_ = "f16"
            odd.append(tensor.name)
        packed.append(PackedTensor(tensor.name, tensor.shape, _number(type_), tensor.parts))
    notes = []
    if odd:
        shown = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        notes.append(f"stored as f16, since their rows are no multiple of 32 long: {shown}")
    return packed, notes


def _named(entries: Sequence[Entry], config: DecoderConfig, arch: Architecture) -> list[_Named]:
    import gguf

    known = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name),
        config.num_layers,
    )
    named: list[_Named] = []
    strange: list[str] = []
    stacks: dict[str, list[Entry]] = {}

    def add(source: str, shape: tuple[int, ...], parts: Callable[[], Iterator[Tensor]]) -> None:
        name = known.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            strange.append(source)
        else:
            named.append(_Named(name, shape, parts))

    for entry in entries:
        found = _EXPERT.fullmatch(entry.name)
        if found is not None:
            stack = stacks.setdefault(f"{found[1]}.{found[3]}.weight", [])
            stack.append(entry)
            assert int(found[2]) == len(stack) - 1, f"{entry.name} is out of order"
        elif entry.name.endswith("kv_b_proj.weight") and config.latent is not None:
            for part, shape, cut in _cut_latent(entry, config):
                add(entry.name.replace("kv_b_proj", part), shape, cut)
        else:
            shape = entry.shape
            if entry.name.endswith("shared_expert_gate.weight"):
                shape = entry.shape[1:]  # one row, which is a vector there
            source = entry.name.replace(f"{_CORRECTION}_bias", f"{_CORRECTION}.bias")
            add(source, shape, partial(_whole, entry, config, arch, shape))
    for source, stack in stacks.items():
        shape = (len(stack), *stack[0].shape)
        add(source, shape, partial(_each, stack))
    if strange:
        listed = ", ".join(strange[:4])
        what = f"llama.cpp's {arch.name} has no tensors for {listed}"
        raise UserError(what, "export without gguf")
    for name, factors in rope_tensors(config).items():
        named.append(_Named(name, tuple(factors.shape), partial(_made, factors)))
    # Layer after layer, so that the same model is the same file wherever its weights came from.
    return sorted(named, key=lambda tensor: _place(tensor.name))


def _place(name: str) -> tuple[int, str]:
    found = _LAYER.match(name)
    return (int(found[1]) if found else -1, name)


def _type(tensor: _Named, kind: GgufType, output: str) -> GgufType:
    """The type of a tensor's data: `kind`, or f32 where llama.cpp computes with nothing else."""
    plain = (
        len(tensor.shape) == 1
        or not tensor.name.endswith(".weight")
        or tensor.name.endswith(("_norm.weight", "ffn_gate_inp.weight"))
    )
    if plain:
        return "f32"
    few_bits = kind.startswith(("q4", "q5"))
    return "q8_0" if few_bits and tensor.name == output else kind


def _number(kind: str) -> int:
    import gguf

    return int(gguf.GGMLQuantizationType[kind.upper()])


def _whole(
    entry: Entry, config: DecoderConfig, arch: Architecture, shape: tuple[int, ...]
) -> Iterator[Tensor]:
    values = entry.make()
    if config.norm_offset and entry.name.endswith("norm.weight"):
        values = values.float() + config.norm_offset
    if arch.turns_neighbours and ".self_attn.q_proj." in entry.name:
        values = _neighbours(values, config.num_heads)
    if arch.turns_neighbours and ".self_attn.k_proj." in entry.name:
        values = _neighbours(values, config.num_kv_heads)
    yield values.reshape(shape)


def _neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads × head_dim, …] of which channel i of a head turned with i + head_dim/2, put side
    by side with it."""
    halves = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _cut_latent(
    entry: Entry, config: DecoderConfig
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Iterator[Tensor]]]]:
    """The matrix that makes keys and values from latent vectors, as llama.cpp has it: in two.

    That of keys is multiplied with queries, so it is transposed: [heads, rank, plain_dim]; that of
    values is [heads, value_dim, rank].
    """
    latent, heads = config.latent, config.num_heads
    assert latent is not None
    sizes = (latent.plain_dim, latent.value_dim)

    def keys() -> Iterator[Tensor]:
        yield entry.make().unflatten(0, (heads, -1)).split(sizes, 1)[0].transpose(1, 2)

    def values() -> Iterator[Tensor]:
        yield entry.make().unflatten(0, (heads, -1)).split(sizes, 1)[1]

    yield "k_b_proj", (heads, latent.rank, latent.plain_dim), keys
    yield "v_b_proj", (heads, latent.value_dim, latent.rank), values


def _each(stack: Sequence[Entry]) -> Iterator[Tensor]:
    for entry in stack:
        yield entry.make()


def _made(values: Tensor) -> Iterator[Tensor]:
    yield values.to(torch.float32)

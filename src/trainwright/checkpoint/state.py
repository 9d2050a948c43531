"""What a checkpoint holds: the model, its optimizers' states, and each rank's random numbers.

Names do not depend on how the work is spread, so a run goes on with any number of workers:
`model.<name>`, `optimizer.<parameter>.<key>`, `rng_<rank>.<generator>`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trainwright.checkpoint.parts import Part
from trainwright.checkpoint.rng import restore_rng, rng_state, seed_everything
from trainwright.checkpoint.store import CheckpointStore
from trainwright.comm.local import local
from trainwright.errors import Mistake, UserError
from trainwright.models.adapter_spec import BESIDE, is_adapter_tensor
from trainwright.models.pieces import Piece
from trainwright.models.whole_copies import ORIGINAL

State = dict[str, Tensor | Part]
Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer]
Modules = nn.Module | Sequence[nn.Module]
NO_PIECES: Mapping[str, Piece] = {}

# Prefixes that wrapping a module adds to its parameters' names.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def training_tensors(
    model: Modules, optimizers: Optimizers, pieces: Mapping[str, Piece] = NO_PIECES
) -> State:
    """All that a run needs to go on bit for bit, by name, sharing memory with the live tensors.

    `model` is a module, or all the parts of one that this worker has; `pieces` says which of its
    parameters are parts of larger ones. Tied parameters appear once, under their first name. The
    optimizers' hyperparameters are not in it: they follow from the recipe and the step.
    """
    generators = {f"{_rng_group()}.{name}": state for name, state in rng_state().items()}
    return {
        **model_state(model, pieces),
        **optimizer_state(model, optimizers, pieces),
        **generators,
    }


def load_training_state(
    store: CheckpointStore,
    step: int,
    model: Modules,
    optimizers: Optimizers,
    pieces: Mapping[str, Piece] = NO_PIECES,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Put `model`, `optimizers` and the random numbers back as they were at `step`; its meta.

    Any number of workers may load. A rank that the saved run did not have seeds its generators
    from (seed, rank, step). Collective. Raises UserError when names, shapes or dtypes differ or a
    file is damaged; the model is not to be used then.
    """
    saved = store.metadata(step)
    _create_optimizer_state(model, optimizers, saved)
    generators = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype)
        for name, tensor in saved.items()
        if name.startswith(f"{_rng_group()}.")
    }
    state: State = {
        **model_state(model, pieces),
        **optimizer_state(model, optimizers, pieces),
        **generators,
    }
    try:
        meta = store.load(step, state)
    except UserError as error:
        raise UserError([*error.mistakes, *_quantised_otherwise(error, saved)]) from error
    _settle_copies(model, optimizers)
    # Seeded first: a generator that was not saved (another kind of device) is still determined.
    seed_everything(_seed(seed, step))
    restore_rng({name.rpartition(".")[2]: tensor for name, tensor in generators.items()})
    return meta


def model_state(model: Modules, pieces: Mapping[str, Piece] = NO_PIECES) -> State:
    """`model.<name>` for every parameter and persistent buffer, tied ones once."""
    return {
        f"model.{name}": _placed(tensor, pieces.get(name)) for name, tensor in _named_tensors(model)
    }


def optimizer_state(
    model: Modules, optimizers: Optimizers, pieces: Mapping[str, Piece] = NO_PIECES
) -> State:
    """`optimizer.<parameter>.<key>` for every state of every parameter.

    A state that is itself made of tensors, such as an 8-bit moment, is taken apart:
    `optimizer.<parameter>.<key>.<inner>`. Raises TypeError for a state that is no tensor.
    """
    names = {id(tensor): name for name, tensor in _named_tensors(model)}
    state: State = {}
    for optimizer in _as_list(optimizers):
        for parameter, values in optimizer.state.items():
            if id(parameter) not in names:  # the copy of a tied weight: saved with its original
                continue
            parameter_name = names[id(parameter)]
            piece = pieces.get(parameter_name)
            for key, value in values.items():
                name = f"optimizer.{parameter_name}.{key}"
                if not isinstance(value, Tensor):
                    raise TypeError(f"{name} is no tensor but {type(value).__name__}")
                if piece is not None and value.shape == parameter.shape:
                    state[name] = _placed(value, piece)
                else:
                    state.update(_taken_apart(name, value))
    return state


def _placed(tensor: Tensor, piece: Piece | None) -> Tensor | Part:
    """A parameter, or a state of its shape, as the part that it is of the whole model's."""
    if piece is None:
        return tensor
    tensor, offsets = tensor.detach(), piece.offsets
    if isinstance(tensor, DTensor):
        (chunk,) = tensor.__create_chunk_list__()
        offsets = tuple(a + b for a, b in zip(offsets, chunk.offsets, strict=True))
    return Part(piece.whole, offsets, local(tensor))


_BASE_COPY = f".{BESIDE}.{ORIGINAL}."  # what the base had where a layer is trained whole


def _named_tensors(model: Modules) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and persistent buffer by its name, the first of those that share one.

    Of a model with an adapter only what is trained, and the adapter: its base stays where it is.
    """
    seen: set[int | str] = set()
    modules = [model] if isinstance(model, nn.Module) else list(model)
    adapted = any(is_adapter_tensor(n) for module in modules for n, _ in module.named_parameters())
    for module in modules:
        # FSDP's `state_dict` gives shards also of weights that a forward pass has left whole.
        for name, tensor in module.state_dict(keep_vars=True).items():
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            own = is_adapter_tensor(name) and _BASE_COPY not in name
            if adapted and not (tensor.requires_grad or own):
                continue
            if isinstance(tensor, Tensor) and seen.isdisjoint((id(tensor), name)):
                seen.update((id(tensor), name))
                yield name, tensor


def _copies(model: Modules) -> Iterator[tuple[Tensor, Tensor]]:
    """Copies of tied weights in later parts, each with its original."""
    originals: dict[str, Tensor] = {}
    for module in [model] if isinstance(model, nn.Module) else model:
        for name, tensor in module.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor):
                original = originals.setdefault(name, tensor)
                if original is not tensor:
                    yield original, tensor


@torch.no_grad()
def _settle_copies(model: Modules, optimizers: Optimizers) -> None:
    """Give copies of tied weights what was loaded for their originals."""
    for original, copy in _copies(model):
        local(copy).copy_(local(original))
        for optimizer in _as_list(optimizers):
            for key, value in optimizer.state.get(copy, {}).items():
                local(value).copy_(local(optimizer.state[original][key]))


def _as_list(optimizers: Optimizers) -> list[torch.optim.Optimizer]:
    return [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)


def _create_optimizer_state(
    model: Modules, optimizers: Optimizers, saved: Mapping[str, Any]
) -> None:
    """Let the optimizers make the states that are to be loaded: one step on zero gradients.

    Only they know the layout. What the step does to the parameters, the load undoes.
    """
    names = {id(tensor): name for name, tensor in _named_tensors(model)}
    names |= {id(copy): names[id(original)] for original, copy in _copies(model)}
    stateful = {
        name.removeprefix("optimizer.").rpartition(".")[0]
        for name in saved
        if name.startswith("optimizer.")
    }
    # An inner tensor's name has one more dot; no parameter is named like another's state.
    stateful |= {name.rpartition(".")[0] for name in stateful}
    for optimizer in _as_list(optimizers):
        gradients = []
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            gradients.append((parameter, parameter.grad))
            new = names[id(parameter)] in stateful and not optimizer.state.get(parameter)
            parameter.grad = torch.zeros_like(parameter) if new else None
        if any(parameter.grad is not None for parameter, _ in gradients):
            optimizer.step()
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _taken_apart(name: str, value: Tensor) -> State:
    """A state as plain tensors, DTensors and parts, each under a name of its own."""
    own = local(value)
    if not is_traceable_wrapper_subclass(own):
        return {name: value}
    inner_names, _ = own.__tensor_flatten__()
    inner = {key: getattr(own, key) for key in inner_names}
    if not isinstance(value, DTensor):
        return {f"{name}.{key}": tensor for key, tensor in inner.items()}
    return {f"{name}.{key}": _inner_part(name, key, tensor, value) for key, tensor in inner.items()}


def _inner_part(name: str, key: str, tensor: Tensor, whole: DTensor) -> Part:
    """Where the inner tensor of a sharded, block-wise quantised state belongs in the whole one.

    torchao quantises each rank's shard by itself, in blocks of its elements in row order. Blocks
    fit together over the ranks when shards are whole rows and begin where a block does.
    """
    (chunk,) = whole.__create_chunk_list__()
    if tensor.shape == chunk.sizes:
        return Part(tuple(whole.shape), tuple(chunk.offsets), tensor)
    if key == "qmap":  # the table from codes to values, the same for all blocks
        return Part(tuple(tensor.shape), (0,) * tensor.ndim, tensor)
    row = whole.shape[1:].numel()
    elements, first = chunk.sizes.numel(), chunk.offsets[0] * row
    per_entry, rest = divmod(elements, tensor.numel())
    if tensor.ndim != 1 or chunk.sizes[1:] != whole.shape[1:] or rest or first % per_entry:
        raise UserError(
            f"{name} is quantised in blocks that do not fit together over the workers",
            fix="choose `optimizer.name: adamw`, or shard over a number of workers that divides "
            f"{whole.shape[0]}",
        )
    return Part((whole.numel() // per_entry,), (first // per_entry,), tensor)


def _quantised_otherwise(refused: UserError, saved: Collection[str]) -> list[Mistake]:
    """A hint where a state is quantised on one side and plain on the other."""
    unknown = {mistake.what.partition(" ")[0] for mistake in refused.mistakes}
    plain_here = unknown & {_state_name(name) for name in saved}
    plain_there = {_state_name(name) for name in unknown} & set(saved)
    return [
        Mistake(
            f"{name} is quantised with one number of workers and not with the other, since small "
            "shards are not",
            fix="go on with the number of workers that saved the checkpoint",
        )
        for name in sorted(plain_here | plain_there)[:1]
    ]


def _state_name(inner: str) -> str:
    return inner.rpartition(".")[0]


def _rng_group() -> str:
    return f"rng_{dist.get_rank() if dist.is_initialized() else 0}"


def _seed(seed: int, step: int) -> int:
    digest = blake2b(f"{seed} {_rng_group()} {step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

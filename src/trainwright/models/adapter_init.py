"""The values that an adapter starts from, alike on any layout, and what PiSSA takes from the base.

Each matrix is drawn from a generator of its own, seeded by (seed, parameter name), and every worker
keeps its part, as `models.weights.initialise` does with a model's weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.models.adapted import Adapted
from trainwright.models.adapted_linear import AdaptedEmbedding
from trainwright.models.adapter_spec import TRAINED, LayerAdapter
from trainwright.models.adapters import Model, specs
from trainwright.models.decoder import Decoder
from trainwright.models.disk_names import names_on_disk
from trainwright.models.pieces import Piece
from trainwright.models.quantised import QuantisedLinear
from trainwright.models.safetensors_files import weight_files
from trainwright.models.weights import Rule, constant, drawn, initial_values, normal, write_part
from trainwright.models.whole_copies import ORIGINAL, Copies

Read = Callable[[str], Tensor]  # a whole tensor of the base model by its name in memory
_OVERSAMPLING = 8  # columns beyond the rank, in subspace iteration


@torch.no_grad()
def initialise_adapter(model: Model, seed: int, read: Read | None = None) -> None:
    """Fill the trained adapter of a model that has its base's weights.

    The model computes afterwards what its base does. DoRA and PiSSA need whole weights: those of
    the model, or where it is spread over workers, what `read` gives (`saved_weights`,
    `drawn_weights`). PiSSA over a quantised base needs `read` too, for the weights as they were.
    Raises ValueError where it is missing.
    """
    pieces: dict[str, Piece] = getattr(model, "pieces", {})
    iterations = specs(model)[TRAINED].pissa_iterations
    fill_originals(model)
    for path, module in model.named_modules():
        if not isinstance(module, Adapted) or TRAINED not in module.adapters:
            continue
        adapter = module.adapters[TRAINED]
        if adapter.dora:
            lengths = _lengths(module, f"{path}.weight", read, pieces)
            name = f"{path}.lora_magnitude_vector"
            write_part(
                module.get_parameter(name[len(path) + 1 :]), lengths.__getitem__, pieces.get(name)
            )
        if adapter.init == "pissa":
            whole = _whole_weight(module, f"{path}.weight", read, pieces)
            A, B = principal_factors(
                whole, adapter.rank, adapter.scale, iterations, f"{seed}:{path}"
            )
            for kind in ("lora", "start"):
                for letter, factor in (("A", A), ("B", B)):
                    name = f"{kind}_{letter}.weight"
                    piece = pieces.get(f"{path}.{name}")
                    write_part(module.get_parameter(name), factor.__getitem__, piece)
            _take_out(module, whole, adapter.scale * (B @ A), pieces.get(f"{path}.weight"))
            continue
        for own_name, rule in _adapter_rules(module, adapter).items():
            name, parameter = f"{path}.{own_name}", module.get_parameter(own_name)
            piece = pieces.get(name)
            shape = piece.whole if piece else tuple(parameter.shape)
            write_part(parameter, drawn(f"{seed}:{name}", shape, rule), piece)


@torch.no_grad()
def fill_originals(model: nn.Module) -> None:
    """Copy the base's `modules_to_save`, which the model holds, to where they are kept."""
    for path, module in model.named_modules():
        if isinstance(module, Copies) and ORIGINAL in module:
            owner, kept = model.get_submodule(path.rpartition(".")[0]), module[ORIGINAL]
            for name, parameter in kept.named_parameters():
                parameter.copy_(owner.get_parameter(name))
            for name, buffer in kept.named_buffers():
                buffer.copy_(owner.get_buffer(name))


def principal_factors(
    weight: Tensor, rank: int, scale: float, iterations: int | None = None, key: str = ""
) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank], fp32, with scale · B A the weight's best of that rank.

    From its largest singular values, √(σ/scale) to each factor (equations 2 and 3 of
    arXiv:2404.02948): exactly, or by so many rounds of subspace iteration from a start that `key`
    seeds (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4), which is faster for large matrices.
    """
    weight = weight.float()
    if iterations is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1
        columns = min(rank + _OVERSAMPLING, *weight.shape)
        start = torch.randn(weight.shape[1], columns, generator=torch.Generator().manual_seed(seed))
        basis = torch.linalg.qr(weight @ start.to(weight.device))[0]
        for _ in range(iterations):
            basis = torch.linalg.qr(weight.t() @ basis)[0]
            basis = torch.linalg.qr(weight @ basis)[0]
        small, values, right = torch.linalg.svd(basis.t() @ weight, full_matrices=False)
        left = basis @ small
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    # A pair of vectors may come with either sign; workers that disagreed would hold parts that do
    # not belong together.
    signs = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()
    root = (values / scale).sqrt()
    return signs * root.unsqueeze(1) * right, left * root * signs.t()


def saved_weights(model: Model, directory: str | Path) -> Read:
    """Reads whole tensors of the base model from its directory, by their names in memory.

    Not those of stacked experts. Raises UserError where the directory has no weights.
    """
    files: dict[str, Path] = {}
    for file in weight_files(Path(directory)):
        with safe_open(file, framework="pt") as handle:
            files.update(dict.fromkeys(handle.keys(), file))

    def read(name: str) -> Tensor:
        on_disk = names_on_disk(model.config, name)[0] if isinstance(model, Decoder) else name
        with safe_open(files[on_disk], framework="pt") as handle:
            return handle.get_tensor(on_disk)

    return read


def drawn_weights(model: Decoder, seed: int) -> Read:
    """Draws whole tensors of a base model that `models.weights.initialise` filled from `seed`."""
    values: dict[str, Callable[[tuple[slice, ...]], Tensor]] = {}
    for name, tensor, rule in initial_values(model):
        piece, owner = model.pieces.get(name), model.get_submodule(name.rpartition(".")[0])
        shape = piece.whole if piece else tuple(tensor.shape)
        if isinstance(owner, QuantisedLinear) and name.endswith(".weight"):
            shape = owner.whole  # what is here is packed
        values[name] = drawn(f"{seed}:{name}", shape, rule)
    return lambda name: values[name](())


def _adapter_rules(module: Adapted, adapter: LayerAdapter) -> dict[str, Rule]:
    """What fills an adapter's matrices that owe nothing to the weight, by their names."""
    if isinstance(module, AdaptedEmbedding):
        return {"lora_embedding_A": constant(0.0), "lora_embedding_B": normal(1.0)}
    first = _uniform if adapter.init == "default" else normal(1 / adapter.rank)
    return {"lora_A.weight": first, "lora_B.weight": constant(0.0)}


def _uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """As PyTorch's linear layer: He et al.'s bound with a = √5, which is 1 / √in."""
    bound = tensor.shape[1] ** -0.5
    tensor.uniform_(-bound, bound, generator=generator)


def _whole_weight(
    module: Adapted, name: str, read: Read | None, pieces: dict[str, Piece]
) -> Tensor:
    """The layer's whole weight in the base model, as it was before any quantisation."""
    if read is not None:
        return read(name)
    if isinstance(module, QuantisedLinear):
        raise ValueError(f"{name} is quantised: pass `read`, which gives it as it was")
    weight = module.base_weight()
    piece = pieces.get(name)
    if isinstance(weight, DTensor) or (piece and piece.whole != tuple(weight.shape)):
        raise ValueError(f"{name} is spread over workers: pass `read`, which gives it whole")
    return weight


def _lengths(module: Adapted, name: str, read: Read | None, pieces: dict[str, Piece]) -> Tensor:
    """‖W‖ of each output of the whole layer, for the weight that it multiplies by."""
    if not isinstance(module, QuantisedLinear):
        weight = _whole_weight(module, name, read, pieces)
    elif module.shape == module.whole:
        weight = module.dequantised()
    else:
        outputs, inputs = module.whole
        twin = QuantisedLinear(inputs, outputs, kind=module.kind, double_quant=module.double_quant)
        twin.take(_whole_weight(module, name, read, pieces))
        weight = twin.dequantised()
    wide = torch.promote_types(weight.dtype, torch.float32)
    dim = 0 if isinstance(module, AdaptedEmbedding) else 1
    return torch.linalg.vector_norm(weight, dim=dim, dtype=wide)


def _take_out(module: Adapted, whole: Tensor, product: Tensor, piece: Piece | None) -> None:
    """Leave in the base what the principal part leaves of the whole weight."""
    rest = whole.to(torch.promote_types(whole.dtype, product.dtype)) - product
    if isinstance(module, QuantisedLinear):
        module.take(rest)
    else:
        write_part(module.base_weight(), rest.__getitem__, piece)

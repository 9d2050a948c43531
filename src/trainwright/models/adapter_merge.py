"""Adapters added to the weights, for inference and export, and taken out again."""

from __future__ import annotations

import torch
from torch import nn

from trainwright.errors import UserError
from trainwright.models.adapted import Adapted
from trainwright.models.adapted_linear import AdaptedEmbedding
from trainwright.models.adapter_spec import BESIDE, is_adapter_tensor
from trainwright.models.adapters import KINDS, Model, specs
from trainwright.models.decoder import Decoder
from trainwright.models.quantised import QuantisedLinear
from trainwright.models.whole_copies import Copies, bring_here


@torch.no_grad()
def merge(model: Model) -> None:
    """Add the active adapters to the weights of a model that is whole here.

    Sums are made in fp32 or wider and rounded once. Names stay, so that the model is exported as
    its base would be (`weights.model_tensors`, which leaves adapters out). A quantised layer
    becomes a plain one; then there is no way back, and no adapter left on the model. Raises
    UserError where a head that shares its embedding's matrix does not follow the embedding.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}
    copies = {name: m for name, m in model.named_modules() if isinstance(m, Copies)}
    _require_ties(model, layers, copies)
    for module in layers.values():
        if isinstance(module, QuantisedLinear) or module.merged is not None:
            continue
        weight = module.base_weight()
        wide = torch.promote_types(weight.dtype, torch.float32)
        updates = module.updates()
        weight.copy_(module.updated(weight.to(wide)))
        module.merged = [
            update._replace(A=update.A.clone(), B=update.B.clone()) for update in updates
        ]
    for name, found in copies.items():
        bring_here(model.get_submodule(name.rpartition(".")[0]), found.used)
    if any(isinstance(module, QuantisedLinear) for module in layers.values()):
        names = model.named_parameters()
        kept = [
            p.dtype for name, p in names if p.is_floating_point() and not is_adapter_tensor(name)
        ]
        for module in layers.values():
            _make_plain(module, kept[0])
        for name in copies:
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.__delattr__(BESIDE)
            del owner.forward
        specs(model).clear()


@torch.no_grad()
def unmerge(model: Model) -> None:
    """Take merged adapters out of the weights again, exact but for rounding.

    Raises ValueError where nothing is merged, or it was over a quantised base, which is gone.
    """
    layers = [m for m in model.modules() if isinstance(m, Adapted) and m.merged is not None]
    if not layers:
        raise ValueError("there are no merged adapters on this model")
    for module in layers:
        assert module.merged is not None
        weight = module.base_weight()
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_(module.reverted(weight.to(wide), module.merged))
        module.merged = None


def _require_ties(model: Model, layers: dict[str, Adapted], copies: dict[str, Copies]) -> None:
    if not isinstance(model, Decoder) or not model.config.tied_embeddings:
        return
    path = "model.embed_tokens"
    embedding, copy = layers.get(path), copies.get(f"{path}.{BESIDE}")
    loose = set[str]()
    if isinstance(embedding, AdaptedEmbedding):
        loose = {name for name in embedding.active if not embedding.adapters[name].ties}
    elif copy is not None and copy.has(copy.used) and copy.used in specs(model):
        loose = {copy.used} - copy.ties
    if loose:
        what = (
            f"{', '.join(sorted(loose))}: the output head is the embedding's matrix, and does not"
        )
        fix = "use the adapter without merging it, or train one with `ensure_weight_tying`"
        raise UserError(f"{what} follow the adapter of the embedding", fix)


def _make_plain(module: Adapted, dtype: torch.dtype) -> None:
    """Return a layer to what it was before adapters; a quantised one to an `nn.Linear`."""
    base: type[nn.Module] = next(base for base, kind in KINDS.items() if isinstance(module, kind))
    if isinstance(module, QuantisedLinear):
        wide = torch.promote_types(dtype, torch.float32)
        weight = module.updated(module.dequantised(wide)).to(dtype)
        for name in list(module._buffers):
            delattr(module, name)
        module.weight = nn.Parameter(weight, requires_grad=False)
        base = nn.Linear
    for name, _ in list(module.named_children()):
        delattr(module, name)
    for name, _ in list(module.named_parameters(recurse=False)):
        if is_adapter_tensor(name):
            delattr(module, name)
    for name in ("adapters", "active", "merged", "place", "sum_squares"):
        vars(module).pop(name, None)
    object.__setattr__(module, "__class__", base)

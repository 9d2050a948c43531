"""Adapters on a model: put on, chosen among, switched off.

They go on first, on "meta" or not: what cuts, shards or recomputes a model comes after and finds
their tensors as ordinary parameters (`adapter_init` then fills them, `adapter_files` loads and
saves them, `adapter_merge` adds them to the weights).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from trainwright.errors import Mistake, UserError
from trainwright.models.adapted import Adapted, Factor, become
from trainwright.models.adapted_linear import AdaptedEmbedding, AdaptedLinear
from trainwright.models.adapted_quantised import AdaptedQuantised
from trainwright.models.adapter_spec import ALL_LINEAR, BESIDE, TRAINED, AdapterSpec, LayerAdapter
from trainwright.models.decoder import Decoder
from trainwright.models.disk_names import is_stacked
from trainwright.models.fallback import FallbackModel
from trainwright.models.quantised import QuantisedLinear
from trainwright.models.whole_copies import ORIGINAL, Copies, add_copy, version

Model = Decoder | FallbackModel
# What can be adapted, and what it becomes. Other subclasses compute what they like: not they.
KINDS: dict[type[nn.Module], type[Adapted]] = {
    nn.Linear: AdaptedLinear,
    nn.Embedding: AdaptedEmbedding,
    QuantisedLinear: AdaptedQuantised,
}
_FIRST_PLACE = 2  # a block's own dropout has places 0 and 1
_EMBEDDING_RATE = 1e-6  # LoRA+'s, for adapters of embeddings


def add_adapter(
    model: Model, spec: AdapterSpec, *, keep_originals: bool = False, strict: bool = True
) -> None:
    """Put the adapter that is trained on `model`, without values, and freeze everything else.

    `initialise_adapter` or `load_adapter` fills it once the model has its weights. With
    `keep_originals` the base's `modules_to_save` are kept too, for `adapters_off`. A stage of a
    pipeline gets what falls to it. Raises UserError naming all that cannot be; see `find_places`.
    """
    places = find_places(model, spec, strict=strict)
    model.requires_grad_(False)
    attach(model, TRAINED, spec, places, keep_originals=keep_originals)


@dataclass
class Places:
    """Where a spec's adapters stand in the whole model, by the names of modules."""

    layers: dict[str, LayerAdapter] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)


def find_places(model: Model, spec: AdapterSpec, *, strict: bool = True) -> Places:
    """What `spec` means for `model`, or for all of the model that it is a stage of.

    Raises UserError where a target is no layer that can be adapted, or nothing is found at all;
    if `strict`, also for each name that means nothing here or means stacked experts, and for
    dropout in a model that has none.
    """
    whole = whole_structure(model)
    inside = {id(module) for block in whole.blocks for module in block.modules()}
    places, mistakes, names = Places(), list[Mistake](), list[str]()
    for name, module in whole.named_modules():
        if not name or isinstance(module, Factor | Copies) or BESIDE in name.split("."):
            continue
        names.append(name)
        kind = _kind(module)
        in_block = id(module) in inside and kind not in (None, AdaptedEmbedding)
        if spec.saved(name):
            places.saved.append(name)
            mistakes += _refused_copy(whole, name, module)
        elif spec.targeted(name, linear_in_block=in_block):
            mistakes += _refused(whole, name, module)
            layer = spec.layer(name)
            if kind is AdaptedEmbedding:  # PiSSA is for products
                layer = replace(layer, init="default")
            if not in_block:
                layer = replace(layer, dropout=0.0)
            places.layers[name] = layer
    if strict:
        stacks = [name for name, _ in whole.named_parameters() if is_stacked(name)]
        mistakes += _in_vain(spec, names + stacks)
        mistakes += _stacked(spec, stacks)
        if isinstance(model, FallbackModel) and spec.dropout:
            what = f"transformers' {model.hf.get('model_type')} model is trained without dropout"
            mistakes.append(Mistake(what, "dropout: 0", "adapter.dropout"))
    if not mistakes and not places.layers and not places.saved:
        what = f"no layer of this model is meant by {spec.targets!r}"
        mistakes.append(Mistake(what, "write `all-linear`, or names of layers", "adapter.targets"))
    if mistakes:
        raise UserError(mistakes)
    return places


def attach(
    model: Model, name: str, spec: AdapterSpec, places: Places, *, keep_originals: bool
) -> None:
    """Make room for an adapter's tensors at `places`, as far as they are in `model`.

    It is active from now on. Raises UserError for a name that is taken or cannot be one.
    """
    found = specs(model)
    if name in found or name == ORIGINAL or not name.isidentifier() or hasattr(Copies, name):
        what = f"an adapter cannot be called {name!r}" + (" again" if name in found else "")
        raise UserError(what, "give it another name, of letters, digits and underscores")
    trained = found.get(TRAINED)
    if trained is not None and trained.init == "pissa" and spec.dora:
        what = f"{name}: DoRA measures weights, and those here lack what PiSSA took out"
        raise UserError(what, "merge or save the PiSSA adapter first, and load it again")
    numbers = _numbers(model)
    modules = dict(model.named_modules())
    for path, layer in places.layers.items():
        if (module := modules.get(path)) is None:
            continue
        if not isinstance(module, Adapted):
            kind = _kind(module)
            assert kind is not None
            module = become(module, kind, numbers.get(id(module), _FIRST_PLACE))
        module.add(name, layer)
    for path in places.saved:
        if (module := modules.get(path)) is not None:
            add_copy(module, name, ties=spec.ties, keep_original=keep_originals)
    found[name] = spec


def specs(model: nn.Module) -> dict[str, AdapterSpec]:
    """The adapters of a model by name, as they were put on."""
    return vars(model).setdefault("adapter_specs", {})


def set_active(model: nn.Module, names: Iterable[str]) -> None:
    """Let these adapters compute, their updates added up; none of them is the base model.

    Raises UserError for unknown names and where two of them replace the same module, ValueError
    where adapters are merged or the base's copy of a module was not kept.
    """
    names = tuple(names)
    known = specs(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        there = ", ".join(known) or "none"
        raise UserError(f"there is no adapter {', '.join(unknown)}", f"there are: {there}")
    chosen: list[tuple[Copies, str]] = []
    for path, module in model.named_modules():
        if isinstance(module, Copies):
            owner = path.rpartition(".")[0]
            own = [name for name in names if module.has(name)] or [ORIGINAL]
            if len(own) > 1:
                what = f"{' and '.join(own)} each have a {owner} of their own"
                raise UserError(what, "choose one of them")
            version(model.get_submodule(owner), own[0])
            chosen.append((module, own[0]))
        elif isinstance(module, Adapted) and module.merged is not None:
            raise ValueError("merged adapters cannot be chosen among: unmerge them first")
    for copies, name in chosen:
        copies.used = name
    for module in model.modules():
        if isinstance(module, Adapted):
            module.active = tuple(name for name in names if name in module.adapters)


def active(model: nn.Module) -> tuple[str, ...]:
    """The adapters that compute, in the order in which they were put on."""
    used = {name for m in model.modules() if isinstance(m, Adapted) for name in m.active}
    used |= {m.used for m in model.modules() if isinstance(m, Copies)}
    return tuple(name for name in specs(model) if name in used)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within, `model` computes what its base does; as for reference log-probabilities.

    Raises ValueError where it cannot: see `set_active`.
    """
    before = active(model)
    set_active(model, ())
    try:
        yield
    finally:
        set_active(model, before)


def learning_rate_factors(model: nn.Module, ratio: float, learning_rate: float) -> dict[str, float]:
    """What each trained parameter's learning rate is multiplied by under LoRA+, by its name.

    `ratio` for B and vectors, 1 for A and whole modules (Hayou et al. 2024, arXiv:2402.12354);
    both matrices of an embedding get a rate of 1e-6, whatever `learning_rate` is, as in PEFT.
    """
    factors = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_embedding_" in name:
            factors[name] = _EMBEDDING_RATE / learning_rate
        else:
            fast = parameter.ndim == 1 or name.endswith("lora_B.weight")
            factors[name] = ratio if fast else 1.0
    return factors


def _kind(module: nn.Module) -> type[Adapted] | None:
    if isinstance(module, Adapted):
        return next(kind for kind in KINDS.values() if isinstance(module, kind))
    return KINDS.get(type(module))


def whole_structure(model: Model) -> Model:
    """The whole model without values, whatever part of it is here: its modules' names and shapes.

    A model that is not ours is never cut, and is its own.
    """
    if not isinstance(model, Decoder):
        return model
    with torch.device("meta"):
        return Decoder(model.config)


def _numbers(model: Model) -> dict[int, int]:
    """A number for each layer within its block, the same in all blocks and on any layout."""
    numbers = {}
    for block in model.blocks:
        layers = [module for module in block.modules() if _kind(module) is not None]
        numbers.update({id(layer): _FIRST_PLACE + i for i, layer in enumerate(layers)})
    return numbers


def _refused(model: Model, name: str, module: nn.Module) -> list[Mistake]:
    """Why a targeted module cannot have an adapter."""
    key = "adapter.targets"
    if _kind(module) is None:
        what = (
            f"{name} is a {type(module).__name__}: adapters stand on linear layers and embeddings"
        )
        return [Mistake(what, "give names that mean layers only, if need be longer ones", key)]
    return _refused_copy(model, name, module, key)


def _refused_copy(
    model: Model, name: str, module: nn.Module, key: str = "adapter.train_also"
) -> list[Mistake]:
    """Why a module cannot be changed: two parts of a model that we did not build share it."""
    if isinstance(model, Decoder) or not model.hf.get("tie_word_embeddings"):
        return []
    ends = (model._inner[0].get_input_embeddings(), model._inner[0].get_output_embeddings())
    if module not in ends:
        return []
    what = f"{name} shares its matrix in transformers' {model.hf.get('model_type')} model"
    return [Mistake(what, "leave embeddings and output head as they are", key)]


def _in_vain(spec: AdapterSpec, names: list[str]) -> list[Mistake]:
    """Names in a spec that no module ends in."""
    mistakes = []
    targets = () if isinstance(spec.targets, str) else spec.targets
    last = sorted({name.rpartition(".")[2] for name in names})
    for key, wanted in (("targets", targets), ("train_also", spec.modules_to_save)):
        for ending in wanted:
            if any(f".{name}".endswith(f".{ending}") for name in names):
                continue
            near = difflib.get_close_matches(ending, last, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(last)}"
            mistakes.append(Mistake(f"there is no layer {ending!r}", fix, f"adapter.{key}"))
    return mistakes


def _stacked(spec: AdapterSpec, stacks: list[str]) -> list[Mistake]:
    """Experts that are targeted by name: their matrices are stacked, and no layers."""
    hit = [name for name in stacks if spec.targets != ALL_LINEAR and spec.targeted(name)]
    if not hit:
        return []
    what = f"{hit[0]} is the matrices of many experts in one: adapters stand on single layers"
    fix = "target other layers, by longer names such as self_attn.q_proj or shared_expert.up_proj"
    return [Mistake(what, fix, "adapter.targets")]

"""The recipe's `adapter` on a model: put on before it is spread, filled when it has its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from trainwright.errors import Mistake, UserError
from trainwright.models.adapted import Adapted
from trainwright.models.adapted_linear import AdaptedEmbedding
from trainwright.models.adapter_files import fill_adapter, read_adapter_spec
from trainwright.models.adapter_init import drawn_weights, initialise_adapter, saved_weights
from trainwright.models.adapter_spec import AdapterSpec, is_adapter_tensor
from trainwright.models.adapters import adapters_off, add_adapter, learning_rate_factors
from trainwright.models.decoder import Decoder
from trainwright.models.quantised import quantise_model
from trainwright.models.quantised_files import initialise_quantised, load_quantised
from trainwright.models.quantised_spec import QuantisedSpec
from trainwright.models.scoring import HEAD
from trainwright.models.weights import initialise, load_weights
from trainwright.parallel.spread import Model, SpreadModel
from trainwright.recipe.schema import Adapter


def adapter_spec(section: Adapter) -> AdapterSpec:
    """What the recipe asks for, or what the adapter that it goes on from is."""
    if section.path is not None:
        return read_adapter_spec(section.path)
    targets = section.targets
    return AdapterSpec(
        rank=section.rank,
        alpha=section.scale_alpha,
        dropout=section.dropout,
        targets=targets if isinstance(targets, str) else tuple(targets),
        rslora=section.rslora,
        dora=section.dora,
        init=section.init,
        modules_to_save=tuple(section.train_also),
    )


def adapt(model: Model, section: Adapter | None, *, keep_originals: bool = False) -> None:
    """Put the adapter on a model that has no values yet, its base quantised if it is to be.

    With `keep_originals` the model can later be used as it was, without the adapter.
    """
    if section is None:
        return
    if section.quantise != "none":
        quantise_model(model, QuantisedSpec(section.quantise))
    spec = adapter_spec(section)
    if isinstance(model, Decoder) and model.config.scores:
        spec = _with_score(spec, section)
    add_adapter(model, spec, keep_originals=keep_originals, strict=section.path is None)
    if spec.dropout and isinstance(model, Decoder):
        model.drop_adapter_inputs()


def narrow_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold matrices that are not trained in the type that products read them in anyway.

    For models whose frozen weights are never saved. No bit of a product changes: left as they are
    are weights that DoRA reads the lengths of, and embeddings to which an adapter adds in fp32.
    Before the model has values.
    """
    exact = {
        f"{path}.weight"
        for path, layer in model.named_modules()
        if isinstance(layer, AdaptedEmbedding)
        or (isinstance(layer, Adapted) and any(each.dora for each in layer.adapters.values()))
    }
    for name, parameter in model.named_parameters():
        frozen = not parameter.requires_grad and not is_adapter_tensor(name)
        matrix = parameter.ndim > 1 and parameter.is_floating_point()  # packed ones are not
        if frozen and matrix and name not in exact:
            parameter.data = parameter.data.to(dtype)


def _with_score(spec: AdapterSpec, section: Adapter) -> AdapterSpec:
    """The spec with the score head trained whole beside the adapter, as PEFT has it."""
    if spec.saved(HEAD):
        return spec
    if section.path is not None:
        fix = "merge it into its model (`trainwright export --merge`), and begin with that"
        raise UserError(
            Mistake(f"the adapter in {section.path} has no score head", fix, key="adapter.path")
        )
    return replace(spec, modules_to_save=(*spec.modules_to_save, HEAD))


def fill(model: Model, section: Adapter | None, directory: Path | None, seed: int) -> None:
    """Write a model's values: the base's from `directory` or drawn from `seed`, the adapter's.

    Where the model is spread, each worker writes its own part.
    """
    quantised = section is not None and section.quantise != "none"
    if directory is not None:
        (load_quantised if quantised else load_weights)(model, directory, seed)
    else:
        assert isinstance(model, Decoder)
        (initialise_quantised if quantised else initialise)(model, seed)
    if section is not None:
        fill_adapter_alone(model, section, directory, seed)


def fill_adapter_alone(model: Model, section: Adapter, directory: Path | None, seed: int) -> None:
    """Write the adapter's values, where the base has its own."""
    if directory is not None:
        read = saved_weights(model, directory)
    else:
        assert isinstance(model, Decoder)
        read = drawn_weights(model, seed)
    if section.path is not None:
        fill_adapter(model, section.path, read=read)
    else:
        initialise_adapter(model, seed, read)


@contextmanager
def without_adapters(parts: Sequence[Model]) -> Iterator[None]:
    """Within, the parts of a model compute what they did before it had an adapter."""
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(adapters_off(part))
        yield


def rate_factors(
    spread: SpreadModel, section: Adapter | None, learning_rate: float
) -> dict[nn.Parameter, float]:
    """What LoRA+ multiplies the learning rates of an adapter's parameters by; none without it."""
    if section is None or section.plus_ratio == 1.0:
        return {}
    factors = {}
    for part in spread.parts:
        found = learning_rate_factors(part, section.plus_ratio, learning_rate)
        factors.update({part.get_parameter(name): factor for name, factor in found.items()})
    return factors

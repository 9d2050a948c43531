"""Models with adapters that have learnt something, for the tests of adapters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.cases import hf_config, randomise
from trainwright.models.adapter_init import initialise_adapter
from trainwright.models.adapter_spec import AdapterSpec
from trainwright.models.adapters import add_adapter
from trainwright.models.decoder import Decoder
from trainwright.models.families import decoder_config
from trainwright.models.output_head import OutputHead
from trainwright.models.weights import new_model
from trainwright.models.whole_copies import head_weight


def base(case: str = "llama-biases") -> Decoder:
    """A random model of a case."""
    model = new_model(decoder_config(hf_config(case)))
    randomise(model)
    return model.eval()


def adapted(model: Decoder, *, learnt: bool = True, **spec: Any) -> Decoder:
    """The model with an adapter, which has moved from its start if `learnt`."""
    add_adapter(model, AdapterSpec(**{"rank": 4, "alpha": 6.0, **spec}), keep_originals=True)
    initialise_adapter(model, 3)
    if learnt:
        move(model)
    return model


def move(model: nn.Module, seed: int = 5) -> None:
    """A step of training, as it were: noise on everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.05


def logits(model: Decoder, ids: Tensor) -> Tensor:
    """The model's logits, its head being what adapters make of it."""
    matrix = model.model.embed_tokens if model.config.tied_embeddings else model.lm_head

    def head(hidden: Tensor, output: OutputHead) -> Tensor:
        return replace(output, weight=head_weight(matrix)).logits(hidden)

    return model(ids, head=head)

"""Small models and steps of made gradients for the optimizers' tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.optim.optimizers import build_optimizers, set_learning_rate
from trainwright.recipe.schema import Optimizer

EXPERTS = 4


class Layer(nn.Module):
    """A matrix, its bias, and a stack of experts, as a decoder's blocks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.experts = nn.Module()
        self.experts.down = nn.Parameter(torch.empty(EXPERTS, 24, 40))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->bo", self.up(x), self.experts.down)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 24, bias=False)
        self.layers = nn.ModuleList([Layer(), Layer()])
        for index, parameter in enumerate(self.parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter.data.normal_(generator=generator)


def build(model: Model, name: str, **options) -> list[torch.optim.Optimizer]:
    section = Optimizer(name=name, learning_rate=1e-2, weight_decay=0.1)
    blocks = [p for layer in model.layers for p in layer.parameters()]
    return build_optimizers(
        model.parameters(), section, in_blocks=blocks, muon_dtype=torch.float32, **options
    )


def gradient(index: int, step: int, shape: torch.Size) -> Tensor:
    """The gradient of the model's `index`-th parameter in a step, whole."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + index))


def step(model: Model, optimizers: list[torch.optim.Optimizer], number: int) -> None:
    """One step on `gradient`s, with a learning rate of its own."""
    for index, parameter in enumerate(model.parameters()):
        whole = gradient(index, number, parameter.shape)
        parameter.grad = whole
        if isinstance(parameter, DTensor):
            (chunk,) = parameter.__create_chunk_list__()
            box = zip(chunk.offsets, chunk.sizes, strict=True)
            local = whole[tuple(slice(a, a + size) for a, size in box)].contiguous()
            parameter.grad = DTensor.from_local(
                local,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
    set_learning_rate(optimizers, 1e-2 / (number + 1))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def weights(model: Model) -> dict[str, Tensor]:
    """Every parameter, whole."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }

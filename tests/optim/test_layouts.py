"""Optimizers over parameters of different layouts at once, against one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.optim.models import EXPERTS, Model, build, gradient, step, weights
from tests.workers import run_on
from trainwright.optim.muon import Muon, Shards
from trainwright.optim.optimizers import set_learning_rate

NAMES = ["adamw", "muon"]


def trained(name: str) -> dict[str, torch.Tensor]:
    model = Model()
    optimizers = build(model, name)
    for number in range(3):
        step(model, optimizers, number)
    return weights(model)


def mixed_meshes(name: str) -> dict:
    """Experts over a mesh of their own, the first layer over both workers, the rest plain."""
    model = Model()
    meshes = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ep", "expert_fsdp"))
    fully_shard(model.layers[0].experts, mesh=meshes["expert_fsdp"])
    fully_shard(model.layers[0], mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",)))
    optimizers = build(model, name)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            kinds = {p.device_mesh if isinstance(p, DTensor) else None for p in group["params"]}
            # Muon works on one parameter at a time, and needs no groups.
            assert len(kinds) == 1 or isinstance(optimizer, Muon)
    for number in range(3):
        step(model, optimizers, number)
    return {key: value.numpy() for key, value in weights(model).items()}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_several_meshes_and_plain_ones(name):
    expected = trained(name)
    for result in run_on(2, mixed_meshes, name):
        for key, value in expected.items():
            torch.testing.assert_close(torch.from_numpy(result[key]), value, msg=key)


def test_a_stack_of_experts_is_updated_one_by_one():
    generator = torch.Generator().manual_seed(1)
    stack = torch.nn.Parameter(torch.randn(EXPERTS, 6, 9, generator=generator))
    singles = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    optimizers = [Muon(p, lr=0.1, dtype=torch.float32) for p in ([stack], singles)]
    for number in range(2):
        stack.grad = gradient(0, number, stack.shape)
        for single, part in zip(singles, stack.grad, strict=True):
            single.grad = part
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack([s.detach() for s in singles]))


class Rows(Shards):
    """Every parameter of Muon's is half of a larger one: the matrices' rows are cut in two."""

    def shape(self, parameter):
        shape = list(super().shape(parameter))
        shape[-2] *= 2
        return torch.Size(shape)

    def whole(self, parameter, tensor):
        part = super().whole(parameter, tensor)
        parts = [torch.empty_like(part) for _ in range(2)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, -2)

    def own(self, parameter, whole):
        return super().own(parameter, whole.chunk(2, -2)[dist.get_rank()])


def cut_rows(offload: bool) -> dict:
    """Layers whose matrices are cut by rows over the workers, as tensor parallelism does."""
    whole, rank = Model(), dist.get_rank()
    matrices = [p for layer in whole.layers for p in layer.parameters() if p.ndim > 1]
    for parameter in matrices:
        parameter.data = parameter.data.chunk(2, -2)[rank].clone()
    optimizers = build(whole, "muon", whole=Rows(), offload=offload)
    cut = {id(parameter) for parameter in matrices}
    for number in range(3):
        for index, parameter in enumerate(whole.parameters()):
            shape = list(parameter.shape)
            if id(parameter) in cut:
                shape[-2] *= 2
                parameter.grad = gradient(index, number, shape).chunk(2, -2)[rank].clone()
            else:
                parameter.grad = gradient(index, number, shape)
        set_learning_rate(optimizers, 1e-2 / (number + 1))
        for optimizer in optimizers:
            optimizer.step()
    return {key: value.numpy() for key, value in weights(whole).items()}


@pytest.mark.parametrize("offload", [False, True])
def test_muon_makes_cut_matrices_whole(offload):
    expected = trained("muon")
    for rank, result in enumerate(run_on(2, cut_rows, offload)):
        for key, value in expected.items():
            if value.ndim > 1 and "layers" in key:
                value = value.chunk(2, -2)[rank]
            torch.testing.assert_close(torch.from_numpy(result[key]), value, msg=key)


def shared_out(dtype: torch.dtype) -> list[bool]:
    """Two replicas that share the orthogonalising out, against each one doing all of it."""
    results = []
    for replicas in (dist.group.WORLD, None):
        model = Model()
        matrices = [p for layer in model.layers for p in layer.parameters() if p.ndim > 1]
        optimizer = Muon(matrices, dtype=dtype, replicas=replicas)
        for number in range(2):
            step(model, [optimizer], number)
        results.append(weights(model))
    return [torch.equal(results[0][name], results[1][name]) for name in results[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replicas_share_the_work_bit_for_bit(dtype):
    for answers in run_on(2, shared_out, dtype):
        assert all(answers)

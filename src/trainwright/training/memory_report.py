"""After a run that ran out of memory: where it went, planned and measured, and what would help."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from trainwright.errors import UserError
from trainwright.models.adapter_spec import is_adapter_tensor
from trainwright.models.families import FAMILIES, decoder_config
from trainwright.planner.budget import memory_budget
from trainwright.planner.explain import advice_lines, memory_lines
from trainwright.planner.make import memory_advice
from trainwright.resilience.out_of_memory import peak_bytes, spare_bytes, wanted_bytes
from trainwright.resilience.reports import OutOfMemory, WorkerFailed
from trainwright.training.machine import detect_machine, free_memory
from trainwright.training.run_directory import RunDirectory, may_change

if TYPE_CHECKING:
    from torch import Tensor

    from trainwright.training.step import TrainStep


def measured(error: Exception, device: str, step: TrainStep | None = None) -> OutOfMemory:
    """The failure of this worker for lack of memory, with what it has held; of it, `step`'s."""
    peak, wanted = peak_bytes(device), wanted_bytes(error)
    spare = spare_bytes(device, free_memory())
    text = f"ran out of memory: it held {_gib(peak)}, {_gib(spare)} were left"
    if wanted:
        text += f", and it asked for {_gib(wanted)}"
    return OutOfMemory(text, peak, wanted, spare, {} if step is None else held_memory(step))


def held_memory(step: TrainStep) -> dict[str, int]:
    """Bytes of this worker's states, by the names of `planner.budget`."""
    held: Counter[str] = Counter()
    names = (name for part in step.spread.parts for name, _ in part.named_parameters())
    adapted, device = any(map(is_adapter_tensor, names)), step.world.device.type
    for part in step.spread.parts:
        for tensor in (*part.parameters(), *part.buffers()):
            name = "adapters" if adapted and tensor.requires_grad else "weights"
            held[name] += _bytes([tensor], device)
            if tensor.grad is not None:
                held["gradients"] += _bytes([tensor.grad], device)
    for optimizer in step.optimizers:
        for state in optimizer.state.values():
            held["optimizer"] += _bytes(state.values(), device)
    return dict(held)


def _bytes(tensors: Iterable[Tensor], device: str) -> int:
    return sum(each.nbytes for each in _plain(tensors) if each.device.type == device)


def _plain(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """This worker's own parts; of those that are made of others, such as 8-bit states, these."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    from trainwright.comm.local import local

    for own in map(local, tensors):
        if is_traceable_wrapper_subclass(own):
            yield from _plain(getattr(own, name) for name in own.__tensor_flatten__()[0])
        else:
            yield own


def explained(run: RunDirectory, failure: Exception) -> Exception:
    """The failure; of memory, with a table of where it went and the changes that save enough."""
    if not isinstance(failure, OutOfMemory):
        return failure
    try:
        lines = _table_and_advice(run, failure)
    except (UserError, OSError, ValueError):  # the run was not even prepared
        return failure
    logs = f"What is saved stays. The logs are in {run.logs}"
    return WorkerFailed("\n".join([str(failure), "", *lines, "", logs]))


def _table_and_advice(run: RunDirectory, failure: OutOfMemory) -> list[str]:
    recipe, plan, hf_config = run.read_recipe(), run.read_plan(), run.read_model_config()
    if hf_config["model_type"] not in FAMILIES:
        return [f"At most {_gib(failure.peak)} were held by a worker."]
    config, machine = decoder_config(hf_config), detect_machine()
    budget = memory_budget(recipe, plan, config, machine)
    there = failure.peak + failure.spare
    table = memory_lines(budget, {**failure.held, "sum": failure.peak, "limit": there})
    # What was held or wanted beyond the plan will be again.
    limit = there - max(0.0, failure.peak + failure.wanted - budget.total)
    found = memory_advice(recipe, plan, machine, config, limit=limit)
    lines = [*table, "", *advice_lines(found)]
    anew = {key for advice in found for key in advice.change.values if not may_change(key)}
    if anew:
        keys = " or ".join(f"`{key}`" for key in sorted(anew))
        lines.append(f"With another {keys} it is another run, with another `run_directory`.")
    return lines


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"

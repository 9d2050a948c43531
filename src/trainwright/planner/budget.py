"""Where a worker's memory goes, line by line, against what it has. No torch.

Fine-tuners' oldest question is what to change when memory runs out; `planner.advice` answers it by
these numbers, before a run, and after one that has failed of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainwright.models.families import DecoderConfig
from trainwright.planner import memory
from trainwright.planner.beside import Beside, beside_of, plan_beside
from trainwright.planner.parameters import layers_of, stages_of
from trainwright.planner.plan import Machine, Plan
from trainwright.recipe.schema import Adapter, Recipe

# Beside tensors: the interpreter and its libraries, or a CUDA context. Measured: 0.33 GB and more
# with a process group; NVIDIA's own take about half a gigabyte.
LIBRARIES = {"cpu": 0.4 * (1 << 30), "cuda": 0.6 * (1 << 30)}
_MARGIN = 1.05  # the formulas hold to 5 %
_STATES = ("weights", "adapters", "reference", "teacher", "copies", "gradients", "optimizer")


@dataclass(frozen=True)
class Budget:
    """Bytes of the fullest worker by what they are for, and the bytes that it has.

    `lines` are weights, adapters, reference or teacher, copies (in the type of products, or
    gathered), gradients, optimizer, activations, logits and libraries, where there are any.
    `host` lies in the host's memory instead of the GPU's.
    """

    lines: dict[str, float]
    limit: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.lines.values())

    @property
    def states(self) -> float:
        """What is held from step to step, however small the micro-batches are."""
        return sum(self.lines.get(name, 0.0) for name in _STATES)

    def fits(self, limit: float | None = None) -> bool:
        """Whether it is within `limit`, or its own, as far as the formulas can say."""
        return _MARGIN * self.total <= (self.limit if limit is None else limit)


def memory_budget(
    recipe: Recipe,
    plan: Plan,
    config: DecoderConfig,
    machine: Machine,
    beside: Beside | None = None,
) -> Budget:
    """The budget of `plan`, a plan of `recipe` on `machine`.

    `beside` is the reference or teacher where the caller knows it better than the recipe tells.
    """
    adapted = recipe.adapter is not None
    if beside is None:
        beside = beside_of(recipe.objective, adapted=adapted, model=config, native=True)
    elif recipe.objective.cache_reference:
        beside = replace(beside, stays=False)
    every = (
        worker_lines(config, plan, pp_rank, recipe.adapter, beside) for pp_rank in range(plan.pp)
    )
    lines, host = max(every, key=lambda each: sum(each[0].values()))
    limit = machine.free_bytes or machine.memory_bytes
    if plan.device == "cpu":
        limit //= plan.world_size
    return Budget(lines, limit, host)


def worker_lines(
    config: DecoderConfig,
    plan: Plan,
    pp_rank: int,
    adapter: Adapter | None = None,
    beside: Beside | None = None,
) -> tuple[dict[str, float], float]:
    """The lines of a `Budget`, of a worker of `pp_rank`, and its bytes in the host's memory."""
    adapted = adapter is not None
    if adapter is not None:
        states = memory.adapted_state_bytes(config, plan, adapter, pp_rank)
    else:
        states = memory.state_bytes(config, plan, pp_rank)
    gradients = (states.whole_gradients or states.gradients) + states.reducing
    own = {"weights": states.parameters, "gradients": gradients, "optimizer": states.optimizer}
    if states.host:
        moved = tuple(own) if plan.offload == "parameters" else ("optimizer",)
        own |= dict.fromkeys(moved, 0.0)
    has_head = plan.stages - 1 in stages_of(plan, pp_rank)
    lines = {
        "weights": states.frozen if adapted else own["weights"],
        "adapters": own["weights"] if adapted else 0.0,
        **_beside_bytes(plan, beside),
        "copies": states.gathered + states.narrow,
        "gradients": own["gradients"],
        "optimizer": own["optimizer"],
        "activations": plan.micro_batch * _activation_bytes(config, plan, pp_rank),
        "logits": memory.head_bytes(config, plan, trained=_trains_head(adapter)) * has_head,
        "libraries": LIBRARIES[plan.device],
    }
    return {name: size for name, size in lines.items() if size}, states.host


def _trains_head(adapter: Adapter | None) -> bool:
    """Whether the head's own weight gets a gradient."""
    if adapter is None:
        return True
    named = [*([] if isinstance(adapter.targets, str) else adapter.targets), *adapter.train_also]
    return any(name.endswith(("lm_head", "embed_tokens")) for name in named)


def _beside_bytes(plan: Plan, beside: Beside | None) -> dict[str, float]:
    if beside is None or beside.config is None or not beside.stays:
        return {}
    own = plan_beside(plan, beside.config)
    held = memory.reference_bytes(beside.config, own)
    if beside.key != "objective.teacher":
        return {"reference": held}
    rows = plan.micro_batch * plan.accumulation
    return {"teacher": held + memory.teacher_bytes(beside.config, own, rows)}


def _activation_bytes(config: DecoderConfig, plan: Plan, pp_rank: int) -> float:
    """Of a row of a micro-batch, on the device."""
    if plan.device == "cpu" or not plan.activation_offload:
        return memory.activation_bytes(config, plan, pp_rank)
    # On its way to the host, or back: a layer, and the next one that is computed meanwhile.
    layers = (
        memory.layer_bytes(config, plan, layer, "none")
        for stage in stages_of(plan, pp_rank)
        for layer in layers_of(config, plan, stage)
    )
    return 2 * max(layers, default=0.0) * plan.sequence_length / plan.cp

"""What `serve` serves: a run or a model's directory, and adapters beside it, by their names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from trainwright.errors import Mistake, UserError
from trainwright.models.adapter_files import load_adapter
from trainwright.models.adapters import specs
from trainwright.models.whole_copies import ORIGINAL, Copies
from trainwright.rollout.server import STACK, ServedModel
from trainwright.training.artifacts import open_model
from trainwright.training.run_directory import RunDirectory

BASE = "base"  # what a base model is called that has no directory of its own


def open_served(
    reference: str | Path,
    adapters: Mapping[str, Path] | None = None,
    *,
    step: int | None = None,
    device: str | torch.device | None = None,
) -> ServedModel:
    """The model at `reference`, as `open_model` takes it, with PEFT directories by their names.

    A directory or a run is served under the name of its folder. A run with an adapter of its own
    is that under the run's name, and its base under the base's. Raises UserError with all names
    that cannot be, and for adapters that do not fit.
    """
    adapters = dict(adapters or {})
    opened = open_model(reference, step=step, device=device)
    run = RunDirectory(Path(reference))
    own = tuple(specs(opened.model))
    name = run.path.name if Path(reference).is_dir() else str(reference)
    names: dict[str, tuple[str, ...]] = {name: own}
    kept = all(m.has(ORIGINAL) for m in opened.model.modules() if isinstance(m, Copies))
    if own and kept:
        names[_base_name(run, name)] = ()
    if adapters and not kept:
        what = f"{name} trained whole layers (`adapter.train_also`), so its base is not here whole"
        fix = "export it, and serve the base's directory with --adapter for each"
        raise UserError(what, fix)
    mistakes = [
        Mistake(f"an adapter cannot be served as {wrong!r}", "give it another name")
        for wrong in adapters
        if wrong in names or not wrong or STACK in wrong
    ]
    if mistakes:
        raise UserError(mistakes)
    for number, (name, directory) in enumerate(adapters.items()):
        inside = f"served_{number}"  # in the model, a name must be an identifier
        load_adapter(opened.model, directory, name=inside)
        names[name] = (inside,)
    opened.model.eval()
    return ServedModel(opened.model, opened.tokenizer, names)


def _base_name(run: RunDirectory, taken: str) -> str:
    path = run.read_recipe().model.path
    name = BASE if path is None else Path(path).name
    return name if name != taken else f"{name}-{BASE}"

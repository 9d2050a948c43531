"""What comes out of a run: a Hugging Face directory, an adapter, GGUF files, an upload to the hub.

`checkpoint.export`, `checkpoint.gguf_export` and `checkpoint.hub` do it; here is chosen of what.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainwright.checkpoint.export import (
    DTYPES,
    MARKER,
    copy_tokenizer,
    export_checkpoint,
    model_entries,
    new_export,
    read_model_tensors,
    write_companions,
)
from trainwright.checkpoint.gguf_export import check_gguf, directory_entries, write_gguf_files
from trainwright.checkpoint.gguf_vocabulary import vocabulary
from trainwright.checkpoint.hub import check_push, push
from trainwright.checkpoint.model_card import model_card
from trainwright.checkpoint.storage import Entry
from trainwright.data.tokenizers import load_tokenizer
from trainwright.errors import Mistake, UserError
from trainwright.files import write_atomically
from trainwright.models.adapter_files import save_adapter
from trainwright.models.adapter_merge import merge as merge_adapters
from trainwright.models.directory import read_hf_config, resolve_model_directory
from trainwright.models.weights import model_tensors, save_model
from trainwright.parallel.spread import Model
from trainwright.recipe.schema import GgufType, Recipe
from trainwright.training.artifacts import (
    complete_step,
    load_run_model,
    result_figures,
    turn_end,
    unfilled_model,
)
from trainwright.training.prepare import GENERATION, pretrained_directory
from trainwright.training.run_directory import RunDirectory, find_run

_PROBED, _SAME = 32, 1e-4  # tokens on which merged weights are tried, and how close they must be


@dataclass(frozen=True)
class GgufExport:
    """GGUF files in a folder, and what llama.cpp will do otherwise than transformers."""

    folder: Path
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def export_run(
    run: RunDirectory | str | Path,
    destination: str | Path | None = None,
    *,
    step: int | None = None,
    dtype: str | None = None,
    merge: bool | None = None,
) -> Path:
    """Write a run's weights at `step` (default: the newest) as a Hugging Face directory.

    `destination` defaults to the run's `export/`, `dtype` and `merge` to the recipe's. Of a run
    with an adapter that is the adapter in PEFT's layout, or with `merge` the whole model.
    """
    if not isinstance(run, RunDirectory):
        run = find_run(run)
    recipe = run.read_recipe()
    step = complete_step(run, step)
    destination = Path(destination) if destination is not None else run.export
    config, generation = _with_token_ids(run)
    dtype = dtype or recipe.export.dtype
    if recipe.adapter is not None:
        merge = recipe.export.merge if merge is None else merge
        with new_export(destination, {"step": step, "dtype": dtype}) as folder:
            if merge:
                merged = merged_model(run, step).to(DTYPES[dtype])
                save_model(merged, folder, shard_bytes=recipe.export.shard_bytes)
                write_companions(folder, config, dtype, generation)
            else:
                write_adapter(run, step, folder)
            copy_tokenizer(run.tokenizer, folder)
            card = _card(run, recipe, step, adapter=not merge)
            write_atomically(folder / "README.md", card)
        return destination
    if merge:
        raise UserError("this run has no adapter to merge", fix="leave out --merge")
    export_checkpoint(
        run.checkpoints,
        step,
        destination,
        hf_config=config,
        tokenizer_directory=run.tokenizer,
        dtype=dtype,
        shard_bytes=recipe.export.shard_bytes,
        generation_config=generation,
        card=_card(run, recipe, step),
    )
    return destination


def export_gguf(
    source: RunDirectory | str | Path,
    destination: str | Path | None = None,
    *,
    kinds: Sequence[GgufType],
    step: int | None = None,
) -> GgufExport:
    """Write GGUF files of types `kinds`, with a model card beside them.

    `source` is a run (at `step`, default the newest; an adapter is merged), or a Hugging Face
    directory or hub id. `destination` defaults to the run's `gguf/`, otherwise to `NAME-gguf` in
    the current folder. Raises UserError for what llama.cpp does not know.
    """
    run = source if isinstance(source, RunDirectory) else RunDirectory(Path(source))
    if run.exists:
        return _gguf_of_run(run, destination, kinds, step)
    if step is not None:
        raise UserError(f"{source} is no run, so it has no step {step}", fix="leave out --step")
    directory = resolve_model_directory(str(source))
    config, name = read_hf_config(directory), Path(str(source)).absolute().name
    check_gguf(config, directory)
    base_model = None if Path(str(source)).is_dir() else str(source)
    entries = directory_entries(directory)
    destination = Path(destination or f"{name}-gguf")
    card: dict[str, Any] = {"recipe_yaml": None, "metrics": {}, "base_model": base_model}
    return _write_gguf(destination, name, kinds, entries, config, directory, card, {})


def _gguf_of_run(
    run: RunDirectory, destination: str | Path | None, kinds: Sequence[GgufType], step: int | None
) -> GgufExport:
    recipe, step = run.read_recipe(), complete_step(run, step)
    config, _ = _with_token_ids(run)
    check_gguf(config, run.model_config.parent)
    if recipe.adapter is None:
        entries = model_entries(run.checkpoints, step, config, torch.float32)
    else:
        entries = _held(merged_model(run, step))
    destination = Path(destination) if destination is not None else run.path / "gguf"
    card = _facts(run, recipe, step)
    about = {"step": step}
    return _write_gguf(destination, recipe.name, kinds, entries, config, run.tokenizer, card, about)


def _write_gguf(
    destination: Path,
    name: str,
    kinds: Sequence[GgufType],
    entries: Sequence[Entry],
    hf_config: dict[str, Any],
    tokenizer: Path,
    card: dict[str, Any],
    about: dict[str, Any],
) -> GgufExport:
    with new_export(destination, {**about, "gguf": list(kinds)}) as folder:
        notes = write_gguf_files(
            folder,
            name,
            kinds,
            entries,
            hf_config=hf_config,
            tokenizer=tokenizer,
            turn_end=turn_end(tokenizer),
        )
        files = sorted(file.name for file in folder.glob("*.gguf"))
        text = model_card(name=name, gguf=files, notes=notes, **card)
        write_atomically(folder / "README.md", text)
    return GgufExport(destination, tuple(destination / file for file in files), tuple(notes))


def check_further(run: RunDirectory) -> None:
    """UserError, before a run begins, where it could not end with what `export_further` does."""
    wanted = run.read_recipe().export
    if wanted.gguf:
        config, _ = check_gguf(run.read_model_config(), run.model_config.parent)
        vocabulary(run.tokenizer, config.vocab_size)
    if wanted.push is not None:
        check_push(wanted.push)


def export_further(run: RunDirectory, exported: Path | None) -> None:
    """What a recipe asks for at the end beyond `exported`: GGUF files, and the upload of both.

    Raises UserError, which says that the run itself is done.
    """
    wanted = run.read_recipe().export
    folders = [exported] if exported is not None else []
    try:
        if wanted.gguf:
            folders.append(export_gguf(run, kinds=wanted.gguf).folder)
        if wanted.push is not None:
            push(folders, wanted.push, private=wanted.private, leave_out=[MARKER])
    except UserError as error:
        raise UserError(
            Mistake(f"the run is finished, but {m.what}", m.fix, m.key, m.where)
            for m in error.mistakes
        ) from error


def write_adapter(run: RunDirectory, step: int, folder: Path) -> None:
    """A run's adapter alone, as PEFT reads it."""
    recipe = run.read_recipe()
    base = None if pretrained_directory(recipe.model) is None else str(recipe.model.path)
    tensors = read_model_tensors(run.checkpoints, step)
    save_adapter(unfilled_model(run), folder, base_model=base, tensors=tensors)


def merged_model(run: RunDirectory, step: int) -> Model:
    """A run's whole model in fp32, its adapter added to the weights.

    Raises UserError where the merged weights give other logits than the adapter does.
    """
    model = load_run_model(run, step, dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.arange(3, 3 + _PROBED).unsqueeze(0) % model.vocab_size
    with torch.no_grad():
        before = model(ids)
        merge_adapters(model)
        after = model(ids)
    difference = float((after - before).abs().max() / before.abs().max())
    if not difference <= _SAME:
        raise UserError(
            f"the merged weights give other logits than the adapter, by {difference:.1e}",
            fix="export the adapter without --merge, and report this",
        )
    return model


def _held(model: Model) -> list[Entry]:
    """The weights of a model in memory under the names that they have in files."""
    return [
        Entry(name, tensor.dtype, tuple(tensor.shape), partial(_itself, tensor))
        for name, tensor in model_tensors(model).items()
    ]


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _card(run: RunDirectory, recipe: Recipe, step: int, *, adapter: bool = False) -> str:
    return model_card(name=recipe.name, adapter=adapter, **_facts(run, recipe, step))


def _facts(run: RunDirectory, recipe: Recipe, step: int) -> dict[str, Any]:
    """What a model card says of a run."""
    base, objective = recipe.model.path, recipe.objective
    local = base is not None and Path(base).expanduser().is_dir()
    facts = {
        "base model": base or f"none: new weights, {recipe.model.family}",
        "data": ", ".join(str(source.path or source.kind) for source in recipe.data.sources),
        "objective": objective.kind,
    }
    if objective.kind == "dpo":
        facts["objective"] += f" ({objective.loss})"
    tags: list[str] = [objective.kind]
    if recipe.adapter is not None:
        facts["adapter"] = f"rank {recipe.adapter.rank}"
        tags.append("lora")
    return {
        "recipe_yaml": (run.recipe if run.recipe.exists() else run.resolved).read_text(),
        "metrics": result_figures(run, step),
        "facts": facts,
        "tags": tags,
        "scores": objective.gives_scores,
        # The hub takes the ids of its own models alone.
        "base_model": None if local else base,
    }


def _with_token_ids(run: RunDirectory) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json: a pretrained model's own, the tokenizer's ids where
    they name none (a chat model may stop at several tokens, of which the tokenizer knows one).
    """
    config = run.read_model_config()
    beside = run.model_config.with_name(GENERATION)
    generation = json.loads(beside.read_text()) if beside.is_file() else {}
    tokenizer = load_tokenizer(run.tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own = getattr(tokenizer, name)
        if config.get(name) is None and own is not None:
            config[name] = own
        if generation.get(name) is None and config.get(name) is not None:
            generation[name] = config[name]
    end, known = turn_end(run.tokenizer), generation.get("eos_token_id")
    if run.read_recipe().learns_examples and end is not None and known is not None:
        ends = known if isinstance(known, list) else [known]
        generation["eos_token_id"] = ends if end in ends else [*ends, end]
    return config, generation

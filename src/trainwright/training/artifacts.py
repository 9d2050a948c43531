"""Opening what a user points at: a run, a Hugging Face directory, or a hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainwright.checkpoint.export import (
    DTYPES,
    copy_tokenizer,
    export_checkpoint,
    model_card,
    new_export,
    read_model_tensors,
    write_companions,
)
from trainwright.checkpoint.state import model_state
from trainwright.checkpoint.store import CheckpointStore
from trainwright.data.masks import Renderer
from trainwright.data.templates import find_template
from trainwright.data.tokenizers import load_tokenizer
from trainwright.errors import UserError
from trainwright.files import write_atomically
from trainwright.models.adapter_files import save_adapter
from trainwright.models.adapter_merge import merge as merge_adapters
from trainwright.models.decoder import Decoder
from trainwright.models.directory import resolve_model_directory, stop_token_ids
from trainwright.models.fallback import load_fallback
from trainwright.models.families import FAMILIES, decoder_config
from trainwright.models.weights import load_model as load_hugging_face
from trainwright.models.weights import new_model, save_model
from trainwright.parallel.spread import Model
from trainwright.recipe.schema import Recipe
from trainwright.training.adapting import adapt, fill, fill_adapter_alone
from trainwright.training.metrics import read_metrics
from trainwright.training.prepare import GENERATION, pretrained_directory
from trainwright.training.run_directory import RunDirectory, find_run

_PROBED, _SAME = 32, 1e-4  # tokens on which merged weights are tried, and how close they must be


@dataclass(frozen=True)
class OpenedModel:
    """A model ready for use, its tokenizer, and where it came from in words."""

    model: Model
    tokenizer: Any
    origin: str


def open_model(
    reference: str | Path, *, step: int | None = None, device: str | torch.device | None = None
) -> OpenedModel:
    """The model in fp32 and the tokenizer at `reference`: a run (its newest step, or `step`), a
    directory in Hugging Face's layout, or a hub id. `device` defaults to CUDA where there is one.
    """
    run = RunDirectory(Path(reference))
    if run.exists:
        step = complete_step(run, step)
        tokenizer, origin = run.tokenizer, f"{reference}, step {step}"
    else:
        tokenizer, origin = resolve_model_directory(reference), str(reference)
    model = load_model(reference, step=step, device=device)
    end = turn_end(Path(tokenizer))
    if end is not None and end not in model.stop_token_ids:
        model.stop_token_ids = (*model.stop_token_ids, end)
    return OpenedModel(model, load_tokenizer(tokenizer), origin)


def turn_end(tokenizer: Path) -> int | None:
    """The token at which the tokenizer's chat template ends an answer; it need not be the EOS.

    None without a template, and where it ends answers in plain text or not at all.
    """
    try:
        template = find_template(None, tokenizer)
        return None if template is None else Renderer(tokenizer, template).stop_id
    except UserError:  # a template that training would refuse may still serve to ask
        return None


def load_model(
    reference: str | Path,
    *,
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """The model at `reference` alone, ready for use; arguments as for `open_model`."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    run = RunDirectory(Path(reference))
    if run.exists:
        return load_run_model(run, complete_step(run, step), dtype=dtype, device=device)
    if step is not None:
        raise UserError(
            f"{reference} is not a run, so it has no step {step}", fix="leave out --step"
        )
    return load_hugging_face(
        reference, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )


def complete_step(run: RunDirectory, step: int | None = None) -> int:
    """`step` if it is saved whole, the newest one if None; UserError where there is none."""
    steps = CheckpointStore(run.checkpoints).steps()
    if not steps:
        raise UserError(
            f"{run.path} has no complete checkpoint yet", fix="let it train to its first checkpoint"
        )
    if step is not None and step not in steps:
        listed = ", ".join(str(complete) for complete in steps)
        raise UserError(f"{run.path} has no complete step {step}", fix=f"choose one of: {listed}")
    return steps[-1] if step is None else step


def load_run_model(
    run: RunDirectory, step: int, *, dtype: torch.dtype, device: torch.device
) -> Model:
    """The weights that a run saved at `step`, whole, in this one process."""
    hf_config, recipe = run.read_model_config(), run.read_recipe()
    directory = pretrained_directory(recipe.model)
    model: Model
    if hf_config["model_type"] in FAMILIES:
        model = new_model(decoder_config(hf_config), device="meta")
    else:
        assert directory is not None
        model = load_fallback(directory, trust_remote_code=recipe.model.trust_remote_code)
    if recipe.adapter is not None:
        adapt(model, recipe.adapter)
    if isinstance(model, Decoder):
        model.to_empty(device="cpu")
        if recipe.adapter is not None:
            fill(model, recipe.adapter, directory, recipe.seed)
    elif recipe.adapter is not None:
        fill_adapter_alone(model, recipe.adapter, directory, recipe.seed)
    CheckpointStore(run.checkpoints).load(step, model_state(model))
    model.stop_token_ids = stop_token_ids(hf_config, run.model_config.parent)
    return model.to(device=device, dtype=dtype).eval()


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
        with new_export(destination, {"step": step, "dtype": dtype}) as folder:
            if recipe.export.merge if merge is None else merge:
                write_merged(run, step, folder, DTYPES[dtype])
                write_companions(folder, config, dtype, generation)
            else:
                write_adapter(run, step, folder)
            copy_tokenizer(run.tokenizer, folder)
            card = _card(run, recipe, step)
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


def _card(run: RunDirectory, recipe: Recipe, step: int) -> str:
    return model_card(
        name=recipe.name,
        recipe_yaml=(run.recipe if run.recipe.exists() else run.resolved).read_text(),
        metrics=result_figures(run, step),
        base_model=recipe.model.path,
    )


def write_adapter(run: RunDirectory, step: int, folder: Path) -> None:
    """A run's adapter alone, as PEFT reads it."""
    recipe, hf_config = run.read_recipe(), run.read_model_config()
    directory = pretrained_directory(recipe.model)
    model: Model
    if hf_config["model_type"] in FAMILIES:
        model = new_model(decoder_config(hf_config), device="meta")
    else:
        assert directory is not None
        model = load_fallback(directory, trust_remote_code=recipe.model.trust_remote_code)
    adapt(model, recipe.adapter)
    tensors = read_model_tensors(run.checkpoints, step)
    base = None if directory is None else str(recipe.model.path)
    save_adapter(model, folder, base_model=base, tensors=tensors)


def write_merged(run: RunDirectory, step: int, folder: Path, dtype: torch.dtype) -> None:
    """A run's whole model, its adapter added to the weights.

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
    save_model(model.to(dtype), folder, shard_bytes=run.read_recipe().export.shard_bytes)


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


def result_figures(run: RunDirectory, step: int) -> dict[str, float | int | str]:
    """The numbers of a run that its model card and the screen show."""
    figures: dict[str, float | int | str] = {"step": step}
    for record in read_metrics(run.path):
        if record.get("step", 0) > step:
            break
        if record["kind"] == "step":
            figures["training loss"] = record["loss"]
            figures["tokens"] = record["tokens_total"]
        elif record["kind"] == "evaluation":
            figures[f"{record['name']} loss"] = record["loss"]
            if record.get("bits_per_byte") is not None:
                figures[f"{record['name']} bits per byte"] = record["bits_per_byte"]
    return figures

"""Opening what a user points at: a run, a Hugging Face directory, or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainwright.checkpoint.state import model_state
from trainwright.checkpoint.store import CheckpointStore
from trainwright.data.masks import Renderer
from trainwright.data.templates import find_template
from trainwright.data.tokenizers import load_tokenizer
from trainwright.errors import UserError
from trainwright.models.decoder import Decoder
from trainwright.models.directory import resolve_model_directory, stop_token_ids
from trainwright.models.fallback import load_fallback
from trainwright.models.families import FAMILIES, decoder_config
from trainwright.models.weights import load_model as load_hugging_face
from trainwright.models.weights import new_model
from trainwright.parallel.spread import Model
from trainwright.training.adapting import adapt, fill, fill_adapter_alone
from trainwright.training.metrics import read_metrics
from trainwright.training.prepare import pretrained_directory
from trainwright.training.run_directory import RunDirectory


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

    Raises UserError for a reward model, which writes nothing.
    """
    run = RunDirectory(Path(reference))
    if run.exists:
        step = complete_step(run, step)
        tokenizer, origin = run.tokenizer, f"{reference}, step {step}"
    else:
        tokenizer, origin = resolve_model_directory(reference), str(reference)
    model = load_model(reference, step=step, device=device)
    if isinstance(model, Decoder) and model.config.scores:
        fix = "see how it ranks pairs with `trainwright evaluate`, or name a language model"
        raise UserError(f"{reference} is a reward model: it scores texts and writes none", fix)
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


def unfilled_model(run: RunDirectory, *, keep_originals: bool = False) -> Model:
    """A run's model with its adapter, if any, on "meta" where it is one of our decoders."""
    hf_config, recipe = run.read_model_config(), run.read_recipe()
    model: Model
    if hf_config["model_type"] in FAMILIES:
        model = new_model(decoder_config(hf_config), device="meta")
    else:
        directory = pretrained_directory(recipe.model)
        assert directory is not None
        model = load_fallback(directory, trust_remote_code=recipe.model.trust_remote_code)
    if recipe.adapter is not None:
        adapt(model, recipe.adapter, keep_originals=keep_originals)
    return model


def load_run_model(
    run: RunDirectory,
    step: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    keep_originals: bool = False,
) -> Model:
    """The weights that a run saved at `step`, whole, in this one process.

    With `keep_originals` it can also be used as it was before it had its adapter.
    """
    hf_config, recipe = run.read_model_config(), run.read_recipe()
    directory = pretrained_directory(recipe.model)
    model = unfilled_model(run, keep_originals=keep_originals)
    if isinstance(model, Decoder):
        model.to_empty(device="cpu")
        if recipe.adapter is not None:
            fill(model, recipe.adapter, directory, recipe.seed)
    elif recipe.adapter is not None:
        fill_adapter_alone(model, recipe.adapter, directory, recipe.seed)
    CheckpointStore(run.checkpoints).load(step, model_state(model))
    model.stop_token_ids = stop_token_ids(hf_config, run.model_config.parent)
    return model.to(device=device, dtype=dtype).eval()


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

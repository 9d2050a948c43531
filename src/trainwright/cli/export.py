"""`trainwright export`: a run's weights as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = """
Examples:

  trainwright export runs/quickstart

  trainwright export runs/quickstart my-model --step 200 --dtype bf16
"""


def export(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    destination: Annotated[
        Path | None, typer.Argument(help="Folder to write; default RUN/export.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Saved step; default the newest.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; default the recipe's.")
    ] = None,
    merge: Annotated[
        bool | None,
        typer.Option("--merge/--adapter", help="Of a run with an adapter: the whole model."),
    ] = None,
) -> None:
    """Write a run's model in Hugging Face's layout: config, weights, tokenizer, model card."""
    from trainwright.training.artifacts import export_run

    written = export_run(run, destination, step=step, dtype=dtype, merge=merge)
    size = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
    typer.echo(f"{written} ({size / 1e6:,.1f} MB)")
    if (written / "adapter_config.json").is_file():
        typer.echo(f'  peft.PeftModel.from_pretrained(model, "{written}")')
    else:
        typer.echo(f'  transformers.AutoModelForCausalLM.from_pretrained("{written}")')


export.__doc__ = f"{export.__doc__}\n{EXAMPLE}"

"""`trainwright export`: a run's weights as a Hugging Face directory or GGUF files, and uploaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from trainwright.errors import UserError

if TYPE_CHECKING:
    from trainwright.recipe.schema import GgufType

EXAMPLE = """
Examples:

  trainwright export runs/quickstart

  trainwright export runs/quickstart my-model --step 200 --dtype bf16

  trainwright export runs/quickstart --gguf q8_0 --gguf f16

  trainwright export runs/quickstart --push me/quickstart --private
"""


def export(
    run: Annotated[
        str, typer.Argument(help="The run's folder; with --gguf, also a model's, or its hub id.")
    ],
    destination: Annotated[
        Path | None,
        typer.Argument(help="Folder to write; default RUN/export, and of GGUF files RUN/gguf."),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Saved step; default the newest.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; default the recipe's.")
    ] = None,
    merge: Annotated[
        bool | None,
        typer.Option("--merge/--adapter", help="Of a run with an adapter: the whole model."),
    ] = None,
    gguf: Annotated[
        list[str] | None,
        typer.Option(
            help="A GGUF file of this type instead, for llama.cpp: f32, f16, bf16, q8_0, q5_1, "
            "q5_0, q4_1 or q4_0. May be given several times."
        ),
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Upload it to this repository of the hub: OWNER/NAME.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: a private repository.")
    ] = False,
) -> None:
    """Write a run's model in Hugging Face's layout: config, weights, tokenizer, model card."""
    from trainwright.training.exporting import export_run

    if private and push is None:
        raise UserError("--private is of an upload", "add --push OWNER/NAME")
    if gguf:
        if dtype is not None or merge is False:
            what = (
                "--dtype and --adapter are of Hugging Face's layout: GGUF files hold whole models"
            )
            raise UserError(what, "leave them out; --gguf says the type")
        written = _export_gguf(run, destination, _types(gguf), step)
    else:
        written = export_run(run, destination, step=step, dtype=dtype, merge=merge)
        size = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
        typer.echo(f"{written} ({size / 1e6:,.1f} MB)")
        if (written / "adapter_config.json").is_file():
            typer.echo(f'  peft.PeftModel.from_pretrained(model, "{written}")')
        else:
            typer.echo(f'  transformers.AutoModelForCausalLM.from_pretrained("{written}")')
    if push is not None:
        from trainwright.checkpoint.export import MARKER
        from trainwright.checkpoint.hub import push as upload

        typer.echo(upload([written], push, private=private, leave_out=[MARKER]))


def _export_gguf(
    run: str, destination: Path | None, kinds: Sequence[GgufType], step: int | None
) -> Path:
    from trainwright.training.exporting import export_gguf

    made = export_gguf(run, destination, kinds=kinds, step=step)
    for file in made.files:
        typer.echo(f"{file} ({file.stat().st_size / 1e6:,.1f} MB)")
    for note in made.notes:
        typer.echo(f"  note: {note}")
    return made.folder


def _types(names: Sequence[str]) -> list[GgufType]:
    from trainwright.recipe.schema import GgufType

    known = get_args(GgufType)
    for name in names:
        if name not in known:
            raise UserError(f"there is no GGUF type {name!r} here", f"one of {', '.join(known)}")
    return list(names)  # type: ignore[arg-type]


export.__doc__ = f"{export.__doc__}\n{EXAMPLE}"

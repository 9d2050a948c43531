"""`trainwright generate` and `trainwright chat`: look at what a model writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
Examples:

  trainwright generate runs/quickstart "def read_file(path):"

  trainwright generate ./some-model "Once upon a time" --temperature 0 --max-new-tokens 40

  echo "A prompt a line" | trainwright generate runs/quickstart -
"""

CHAT_EXAMPLE = """
Example:

  trainwright chat ./some-chat-model --system "Answer in one sentence."
"""

Model = Annotated[str, typer.Argument(help="A run, a Hugging Face directory, or a hub id.")]
Step = Annotated[int | None, typer.Option(help="Saved step of a run; default the newest.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens to add.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling's probability mass.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample among the k likeliest; 0 is all.")]
MinP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Drop tokens below this share of the likeliest's.")
]
Stop = Annotated[list[str] | None, typer.Option(help="End at this text; may be repeated.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]


def generate(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(help="Texts to complete; - reads them by line.")],
    step: Step = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    stop: Stop = None,
    seed: Seed = 0,
) -> None:
    """Complete prompts. One prompt is streamed as it is written; several are completed together."""
    from trainwright.rollout.engine import generate as complete
    from trainwright.rollout.engine import stream
    from trainwright.rollout.sampling import SamplingParams
    from trainwright.training.artifacts import open_model

    if prompts == ["-"]:
        prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    opened = open_model(model, step=step)
    params = SamplingParams(
        max_new_tokens, temperature, top_p, top_k, min_p, tuple(stop or ()), seed
    )
    if len(prompts) == 1:
        typer.echo(prompts[0], nl=False)
        for piece in stream(opened.model, opened.tokenizer, prompts[0], params):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()
        return
    completions = complete(opened.model, opened.tokenizer, prompts, params)
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if number:
            typer.echo("─" * 40)
        typer.echo(prompt + completion.text)


def chat(
    model: Model,
    step: Step = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    template: Annotated[
        Path | None, typer.Option(help="Jinja chat template to use instead of the tokenizer's.")
    ] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    stop: Stop = None,
    seed: Seed = 0,
) -> None:
    """Talk with a model that has a chat template; an empty line or Ctrl-D ends it."""
    from trainwright.errors import UserError
    from trainwright.rollout.engine import stream
    from trainwright.rollout.prompts import chat_prompt
    from trainwright.rollout.sampling import SamplingParams
    from trainwright.training.artifacts import open_model

    opened = open_model(model, step=step)
    if template is not None:
        if not template.is_file():
            raise UserError(f"{template} is not a file", fix="give a Jinja chat template")
        opened.tokenizer.chat_template = template.read_text()
    if not opened.tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {model} has no chat template, so turns cannot be told apart",
            fix="use `trainwright generate`, or give a template with --template FILE",
        )
    messages = [{"role": "system", "content": system}] if system else []
    typer.echo(f"{opened.origin}. An empty line ends the talk.\n")
    while True:
        try:
            text = input("you> ").strip()
        except EOFError:
            text = ""
        if not text:
            return
        messages.append({"role": "user", "content": text})
        ids = chat_prompt(opened.tokenizer, messages)
        params = SamplingParams(
            max_new_tokens,
            temperature,
            top_p,
            top_k,
            min_p,
            tuple(stop or ()),
            seed + len(messages),
        )
        reply = ""
        typer.echo("model> ", nl=False)
        for piece in stream(opened.model, opened.tokenizer, ids, params):
            reply += piece
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo("\n")
        messages.append({"role": "assistant", "content": reply})


generate.__doc__ = f"{generate.__doc__}\n{EXAMPLES}"
chat.__doc__ = f"{chat.__doc__}\n{CHAT_EXAMPLE}"

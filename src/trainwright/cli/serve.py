"""`trainwright serve`: a model and its adapters behind OpenAI's API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
Examples:

  trainwright serve runs/quickstart

  trainwright serve ./some-chat-model --adapter french=./french-lora --port 8080

  curl http://127.0.0.1:8000/v1/completions -d '{"model": "quickstart", "prompt": "def "}'
"""


def serve(
    model: Annotated[str, typer.Argument(help="A run, a Hugging Face directory, or a hub id.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR: a PEFT adapter, asked for by its name; may be repeated."),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Saved step of a run; default newest.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="TRAINWRIGHT_API_KEY", help="Answer only requests that bear it."),
    ] = None,
) -> None:
    """Serve a model through OpenAI's API: chat, completions, streams. Ctrl-C ends it."""
    from trainwright.errors import UserError

    try:
        from trainwright.rollout import server
    except ImportError as error:
        raise UserError(
            f"serving needs starlette and uvicorn: {error}", "pip install 'trainwright[serve]'"
        ) from error
    from trainwright.training.serving import open_served

    adapters = _named(adapter or [])
    door = server.listen(host, port)
    served = open_served(model, adapters, step=step)
    address = f"[{host}]" if ":" in host else host
    typer.echo(
        f"{', '.join(served.names)} at http://{address}:{door.getsockname()[1]}/v1. Ctrl-C ends it."
    )
    server.serve(served, door, api_key=api_key)


def _named(given: list[str]) -> dict[str, Path]:
    """Directories by name; UserError for what is not NAME=DIR, or a name that is there twice."""
    from trainwright.errors import Mistake, UserError

    named: dict[str, Path] = {}
    mistakes = []
    for each in given:
        name, _, directory = each.partition("=")
        if not name or not directory or name in named:
            what = f"--adapter {each}" + (" comes after another of its name" * (name in named))
            mistakes.append(Mistake(what, "write --adapter NAME=DIR, each with a name of its own"))
        named[name] = Path(directory).expanduser()
    if mistakes:
        raise UserError(mistakes)
    return named


serve.__doc__ = f"{serve.__doc__}\n{EXAMPLES}"

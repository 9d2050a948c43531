"""`trainwright swarm`: machines over slow links train one model together."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from trainwright.swarm.status import RunStatus

app = typer.Typer(
    no_args_is_help=True,
    help="Train one model together with others, over ordinary internet links.",
    epilog="Begin with:  trainwright swarm start examples/swarm.yaml --run /shared/folder",
)

Url = Annotated[
    str,
    typer.Argument(
        help="Where the run's peers meet: a folder, s3://BUCKET/PREFIX, or ring://HOST:PORT."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Keys of this machine's own to change, as parallel.tp=2."),
]
Directory = Annotated[
    Path | None,
    typer.Option(help="This machine's folder of the run; default runs/ and the URL's last part."),
]


@app.command()
def start(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys to change, as key.path=value.")
    ] = None,
    run: Annotated[
        str, typer.Option(help="Where its peers meet: a folder, s3://… or ring://HOST:PORT.")
    ] = ...,  # type: ignore[assignment]
    peers: Annotated[int, typer.Option(min=1, help="How many are expected, for `auto`.")] = 4,
    directory: Directory = None,
) -> None:
    """Create a run: its rules, first weights and tokenizer. Nobody trains before they join."""
    with _told(run):
        from trainwright.training import swarm_runs

        manifest = swarm_runs.start(
            recipe, run, overrides or [], peers=peers, directory=directory, say=_printer()
        )
    settings = manifest.settings
    typer.echo(
        f"\nrun {manifest.run[:8]}: {settings.method}, {settings.inner_steps} steps between "
        f"exchanges, {settings.codec}"
    )
    join = shlex.join(["trainwright", "swarm", "join", run])
    typer.echo(f"Every machine joins with:  {join}")
    if directory is not None:
        typer.echo(f"This one with:  {join} --directory {shlex.quote(str(directory))}")
    if run.startswith("ring:"):
        typer.echo("This one joins first (others wait with --wait): the run is nowhere else yet.")


@app.command()
def join(
    url: Url,
    overrides: Overrides = None,
    directory: Directory = None,
    name: Annotated[str, typer.Option(help="What others see of this machine.")] = "",
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a run that is not there yet.")
    ] = 0.0,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show traffic inside.")] = False,
) -> None:
    """Train with the others until the run ends; the same command goes on after a stop."""
    from trainwright.training.launch import INTERRUPTED, RunInterrupted, WorkerFailed

    with _told(url):
        from trainwright.training import swarm_runs

        try:
            result = swarm_runs.join(
                url,
                overrides or [],
                directory=directory,
                name=name,
                wait=wait,
                verbose=verbose,
                say=_printer(),
            )
        except RunInterrupted as stopped:
            what = "Left and saved" if stopped.saved else "Left before the next step was saved"
            typer.echo(f"{what}. The same command joins again.")
            raise typer.Exit(INTERRUPTED) from None
        except WorkerFailed as failure:
            typer.echo(str(failure), err=True)
            raise typer.Exit(1) from None
    if result.export is not None:
        typer.echo(f"\nThe agreed model: {result.export}")
    typer.echo(f"Report: {result.report}")


@app.command()
def status(
    url: Url,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every few seconds.")] = False,
) -> None:
    """Show peers, rounds, losses, bytes, ratings, and who is excluded and why."""
    import tempfile
    import time

    from rich.console import Console

    console = Console(highlight=False)
    with _told(url), tempfile.TemporaryDirectory(prefix="trainwright-swarm-") as folder:
        from trainwright.swarm.identity import Identity
        from trainwright.swarm.status import Watch
        from trainwright.swarm.transports.open import open_transport
        from trainwright.swarm.transports.transport import TransportError
        from trainwright.training.swarm_place import require_run

        transport = open_transport(url, Identity.new(), Path(folder), visit=True)
        try:
            manifest = require_run(transport, url)
            look = Watch(transport, manifest)
            look.look()
            # A card that stays as it is for longer than its owner writes one is no sign of life.
            pause = min(5.0, manifest.rules.silence / 10) + 0.5
            while True:
                time.sleep(pause)
                try:
                    _show(look.look(), console.print)
                except TransportError as error:
                    if not watch:
                        raise
                    console.print(f"out of reach just now: {error}", markup=False)
                if not watch:
                    break
        finally:
            transport.close()


@app.command()
def validate(
    url: Url,
    overrides: Overrides = None,
    directory: Directory = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds to watch; default until interrupted.")
    ] = None,
) -> None:
    """Try all contributions on data, without training, and publish what they are worth."""
    with _told(url):
        from trainwright.training import swarm_runs

        swarm_runs.validate(
            url, overrides or [], directory=directory, rounds=rounds, say=_printer()
        )


@app.command()
def export(
    url: Url,
    destination: Annotated[Path, typer.Argument(help="Folder to write.")] = Path("swarm-model"),
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Where this machine has files that the recipe names: model.path=…"),
    ] = None,
) -> None:
    """Fetch the newest agreed model as a Hugging Face directory."""
    with _told(url):
        from trainwright.training import swarm_runs

        rounds, folder = swarm_runs.export(url, destination, overrides or [], say=_printer())
    typer.echo(f"{folder}: the model after {rounds} rounds")


@contextmanager
def _told(url: str) -> Iterator[None]:
    """A package of the extra that is missing, or a place that is away, in a sentence."""
    from trainwright.errors import Mistake, UserError
    from trainwright.swarm.transports.transport import TransportError
    from trainwright.training.swarm_place import away

    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("cryptography", "obstore", "openskill"):
            raise
        what = f"`trainwright swarm` needs the package {error.name}"
        raise UserError(Mistake(what, "pip install 'trainwright[swarm]'")) from None
    except TransportError as error:
        raise away(error, url) from None


def _printer() -> Callable[[str], None]:
    from rich.console import Console

    console = Console(highlight=False)
    return lambda text: console.print(text, markup=False, soft_wrap=True)


def _show(status: RunStatus, echo: Callable[..., None]) -> None:
    settings = status.manifest.settings
    echo(
        f"run {status.manifest.run[:8]} · {settings.method}, {settings.codec}, "
        f"{settings.inner_steps} steps · round {status.round}"
    )
    echo(_table(status))
    for peer, reason in status.excluded.items():
        echo(f"excluded: {peer[:6]}: {reason}", markup=False)


def _table(status: RunStatus) -> Table:
    from rich.table import Table
    from rich.text import Text

    from trainwright.swarm.status import COLUMNS, table

    found = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        found.add_column(column, justify="left" if column in ("peer", "state") else "right")
    for row in table(status):
        found.add_row(*map(Text, row))  # names are strangers' text, and no markup
    return found

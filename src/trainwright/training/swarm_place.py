"""A run's place, seen by who comes there: is a run there, is it free, is it worth waiting for."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from trainwright.errors import Mistake, UserError
from trainwright.swarm.identity import Identity
from trainwright.swarm.manifest import Manifest
from trainwright.swarm.runs import find_run
from trainwright.swarm.transports.open import open_transport
from trainwright.swarm.transports.transport import AbsentError, Transport, TransportError
from trainwright.training.swarm_tokenizer import fetch_tokenizer

_PAUSE = 1.0  # seconds between two looks


def reach(
    url: str,
    identity: Identity,
    own: Path,
    *,
    visit: bool = False,
    wait: float = 0.0,
    say: Callable[[str], None] = print,
) -> tuple[Manifest, Path]:
    """The manifest and the tokenizer of the run at `url`; what is fetched is kept below `own`.

    A run that is not there, or out of reach, is looked for again for `wait` seconds, and then
    AbsentError or TransportError is raised. What waiting would not mend raises UserError at once.
    """
    until, told = time.monotonic() + wait, False
    while True:
        try:
            # Whoever has to wait is not the starter: a ring's first address is left to that one.
            with closing(open_transport(url, identity, own, visit=visit or told)) as transport:
                manifest = require_run(transport, url)
                return manifest, fetch_tokenizer(transport, manifest, own)
        except (TransportError, AbsentError) as error:
            if time.monotonic() >= until:
                raise
            if not told:
                problem = error if isinstance(error, AbsentError) else away(error, url)
                say(f"{problem}\nwaiting for it, up to {wait:g} s")
                told = True
        time.sleep(min(_PAUSE, max(0.0, until - time.monotonic())))


def require_run(transport: Transport, url: str) -> Manifest:
    """The manifest of the run at that place. Raises AbsentError where there is none."""
    manifest = find_run(transport)
    if manifest is None:
        fix = "look up the URL, or start one there: `trainwright swarm start RECIPE --run URL`"
        if url.startswith("ring:"):
            fix = "over a ring it is where its peers are: have its starter `swarm join` first"
        raise AbsentError(Mistake("there is no run at this place", fix, where=url))
    return manifest


def require_free(transport: Transport, url: str) -> None:
    """Raise UserError for a place that has a run, or that cannot be reached."""
    try:
        found = find_run(transport)
    except TransportError as error:
        what = f"no run can be started there: {error}"
        fix = "look up the URL, and try again"
        if url.startswith("ring:"):
            fix = "start it on the machine that the URL names first, at a port that is free there"
        raise UserError(Mistake(what, fix, where=url)) from error
    if found is not None:
        what = "another run was started at this place already"
        raise UserError(Mistake(what, "join it, or take another URL", where=url))


def away(error: Exception, url: str) -> UserError:
    """The refusal of a place that cannot be reached."""
    fix = "look up the URL, and try again"
    if url.startswith("ring:"):
        fix += " when a machine that it names has joined"
    return UserError(Mistake(f"the run's place cannot be reached: {error}", fix))

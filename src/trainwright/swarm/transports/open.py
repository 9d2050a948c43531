"""A run's URL → the transport by which its peers meet."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from trainwright.errors import Mistake, UserError
from trainwright.swarm.identity import Identity
from trainwright.swarm.transports.folder import Folder
from trainwright.swarm.transports.store import Store
from trainwright.swarm.transports.transport import AbsentError, Transport

_FORMS = "a folder (/mnt/disk/run), s3://bucket/run, gs://bucket/run, az://… or ring://host:port"


def open_transport(
    url: str, identity: Identity, directory: Path, create: bool = False, visit: bool = False
) -> Transport:
    """The transport of a run's URL, for the peer of that identity.

    `directory` is the peer's own on a local disk, for transports that keep something there.
    `create` makes a folder that is not there yet; without it a missing folder is a mistake. Who
    only means to `visit` leaves a ring's own addresses to its peers.
    Nothing is written into the run: whoever only looks leaves no trace. Raises UserError for URLs
    that are none, and for whatever else the user has to put right.
    """
    scheme = urlsplit(url).scheme
    if scheme == "ring":
        from trainwright.swarm.transports.ring import open_ring

        return open_ring(url, identity.peer, directory, visit)
    if scheme in ("s3", "gs", "az"):
        from trainwright.swarm.transports.bucket import open_bucket

        return Store(open_bucket(url), identity.peer)
    if scheme in ("", "file"):
        return Store(Folder(_folder(url, create)), identity.peer)
    raise UserError(Mistake(f"a run cannot be at {scheme}://", f"write {_FORMS}", where=url))


def _folder(url: str, create: bool) -> Path:
    path = Path(url.removeprefix("file://")).expanduser()
    if create:
        path.mkdir(parents=True, exist_ok=True)
    if not path.is_dir():
        what = "there is no such folder"
        fix = "mount it, or look up the URL again; `swarm start` makes the folder of a new run"
        raise AbsentError(Mistake(what, fix, where=str(path)))
    return path

"""Beginning a run, and finding the one that is at a place: register `run`, manifest, genesis.

register run       who started it, and the run's id
manifest           on the starter's shelf: recipe, rules, hash of the first weights
snapshots/0        on the starter's shelf: those weights
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trainwright.errors import Mistake, UserError
from trainwright.swarm.identity import Identity
from trainwright.swarm.manifest import MANIFEST_BYTES, Manifest
from trainwright.swarm.message import BadMessage, read_message, write_message
from trainwright.swarm.transports.transport import Transport

if TYPE_CHECKING:  # torch, which `swarm status` does without
    from trainwright.swarm.ledger import Ledger
    from trainwright.swarm.methods.method import Agreed

REGISTER = "run"
_BYTES = 4096
_NO_RUN = "0" * 32  # whoever reads the register does not know the run's id yet
_RUN = re.compile(r"[0-9a-f]{32}")


def first_ledger(starter: str) -> Ledger:
    """The ledger before round 0."""
    from trainwright.swarm.ledger import Ledger

    return Ledger(validators=(starter,))


def genesis_hash(agreed: Agreed, starter: str) -> str:
    """The manifest's `genesis`: the hash of what is agreed before round 0."""
    from trainwright.swarm.agreed_hash import agreed_hash

    return agreed_hash(agreed, first_ledger(starter).to_json())


def start_run(transport: Transport, identity: Identity, manifest: Manifest, agreed: Agreed) -> None:
    """Publish a run: its manifest, its first weights, and, last, the register that names it.

    Raises UserError if another run is at that place. May be called again after a crash.
    """
    from trainwright.swarm.agreed_hash import write_snapshot

    run, ledger = manifest.run, first_ledger(manifest.starter).to_json()
    transport.put("manifest", manifest.write(identity))
    transport.put("snapshots/0", write_snapshot(agreed, ledger, run, identity))
    name = write_message(REGISTER, _NO_RUN, 0, {"run": run}, [], identity)
    if transport.settle(REGISTER, name, ()) != name:  # there are no peers yet to agree
        what = "another run was started at this place already"
        raise UserError(Mistake(what, "join it, or take another URL"))


def find_run(transport: Transport) -> Manifest | None:
    """The manifest of the run at this place; None where there is none.

    Raises UserError for a run whose register or manifest is not what its starter wrote.
    """
    data = transport.settled(REGISTER, _BYTES)
    if data is None:
        return None
    try:
        message = read_message(data, run=_NO_RUN, kind=REGISTER, limit=_BYTES)
        run = message.body.get("run")
        if not isinstance(run, str) or not _RUN.fullmatch(run):
            raise BadMessage("it names no run")
        found = transport.get(message.peer, "manifest", MANIFEST_BYTES)
        if found is None:
            return None
        return Manifest.read(found, run=run, starter=message.peer)
    except ValueError as error:
        what = f"what is here is no run of Trainwright's: {error}"
        raise UserError(Mistake(what, "ask whoever started it for the URL")) from None

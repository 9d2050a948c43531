"""The tokenizer that a run's starter gives to all: from its shelf to files of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainwright.errors import Mistake, UserError
from trainwright.files import write_atomically
from trainwright.swarm.identity import Identity
from trainwright.swarm.manifest import Manifest
from trainwright.swarm.message import BadMessage, read_message, write_message
from trainwright.swarm.transports.transport import Transport
from trainwright.training.run_directory import RunDirectory

CONFIG = "model.json"  # among the tokenizer's files: the model's shape, as Hugging Face writes it
TOKENIZER = "tokenizer"  # an object on the starter's shelf: the files that all peers read text with
_TOKENIZER_BYTES = 1 << 27
_TEXTS = (".json", ".txt", ".model", ".jinja")  # what a tokenizer's files end in


def tokenizer_files(run: RunDirectory) -> dict[str, bytes]:
    """The tokenizer's files and the model's config, by name. Raises UserError for what no peer
    would take.
    """
    found = sorted(path for path in run.tokenizer.iterdir() if path.is_file())
    files = {CONFIG: run.model_config.read_bytes()}
    for path in found:
        if not path.name.endswith(_TEXTS):
            what = f"the tokenizer has a file that peers would not take: {path.name}"
            raise UserError(Mistake(what, "save it as tokenizer.json", where=str(run.tokenizer)))
        files[path.name] = path.read_bytes()
    if (size := sum(map(len, files.values()))) > _TOKENIZER_BYTES - 2**20:
        what = f"the tokenizer's files have {size / 1e6:.0f} MB"
        raise UserError(Mistake(what, "take a smaller tokenizer", where=str(run.tokenizer)))
    return files


def packed(files: Mapping[str, bytes], run: str, identity: Identity) -> bytes:
    """Files as a message."""
    return write_message(TOKENIZER, run, 0, {"files": [*files]}, [*files.values()], identity)


def fetch_tokenizer(transport: Transport, manifest: Manifest, directory: Path) -> Path:
    """The starter's tokenizer, in a folder of this machine. It is read as data, never run."""
    folder = directory / TOKENIZER
    try:
        data = transport.get(manifest.starter, TOKENIZER, _TOKENIZER_BYTES)
        if data is None:
            raise BadMessage("it is not there")
        message = read_message(
            data,
            run=manifest.run,
            kind=TOKENIZER,
            limit=_TOKENIZER_BYTES,
            peer=manifest.starter,
            round=0,
        )
        names = message.body.get("files")
        if not isinstance(names, list) or len(names) != len(message.planes):
            raise BadMessage("it names no files")
        for name, plane in zip(names, message.planes, strict=True):
            if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
                raise BadMessage(f"{name!r} is no file's name")
            if not name.endswith(_TEXTS):
                raise BadMessage(f"{name!r} is no file of a tokenizer")
            folder.mkdir(parents=True, exist_ok=True)
            place = directory if name == CONFIG else folder
            write_atomically(place / name, plane.tobytes())
    except ValueError as error:
        what = f"the run's tokenizer cannot be read: {error}"
        raise UserError(Mistake(what, "ask whoever started the run")) from None
    return folder

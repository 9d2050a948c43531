"""Finding a pretrained model: a directory in Hugging Face's layout, or a hub id made into one.

Torch-free, so that a recipe's checks can read a model's config without loading anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainwright.errors import Mistake, UserError
from trainwright.models.families import DecoderConfig, decoder_config
from trainwright.models.scoring import gives_scores

# No pickles: weights come from safetensors alone.
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def resolve_model_directory(path_or_id: str | Path, *, trust_remote_code: bool = False) -> Path:
    """The directory of a pretrained model; a hub id is downloaded, or found in the local cache.

    Python files come along only with `trust_remote_code`. Raises UserError where there is neither
    such a directory nor such a model, or where it cannot be downloaded.
    """
    directory = Path(path_or_id).expanduser()
    if directory.is_dir():
        return directory
    name = str(path_or_id)
    if directory.exists():
        raise UserError(f"{name} is a file", "give the directory that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no directory {name}", "check the path, or give a hub id")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = [*PATTERNS, "*.py"] if trust_remote_code else list(PATTERNS)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise UserError(f"{name!r} is neither a directory nor a hub id", str(error)) from error
    except GatedRepoError as error:
        fix = f"accept its terms at https://huggingface.co/{name} and log in with `hf auth login`"
        raise UserError(f"the hub gives {name} only to users it knows", fix) from error
    except RepositoryNotFoundError as error:
        fix = "check the spelling; a private model needs `hf auth login`"
        raise UserError(
            f"there is no directory and no model on the hub named {name}", fix
        ) from error
    except LocalEntryNotFoundError as error:
        fix = (
            "give a local directory, or download it once with a network (and HF_HUB_OFFLINE unset)"
        )
        what = f"there is no directory {name}, and the hub cannot be asked for such a model"
        raise UserError(what, fix) from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"downloading {name} from the hub failed: {error}", "try again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError naming the file where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        fix = f"{path.parent} must hold a model in Hugging Face's layout"
        raise UserError(Mistake(f"there is no {path.name}", fix, where=str(path.parent))) from error
    except (ValueError, OSError) as error:
        raise UserError(
            Mistake(f"cannot be read: {error}", "restore it", where=str(path))
        ) from error
    if not isinstance(value, dict):
        raise UserError(Mistake("is not a JSON object", "restore it", where=str(path)))
    return value


def read_hf_config(directory: Path) -> dict[str, Any]:
    """The directory's config.json."""
    return read_json(directory / "config.json")


def read_decoder_config(hf: Mapping[str, Any], directory: Path) -> DecoderConfig:
    """`decoder_config`, with mistakes told as mistakes of the directory's config.json."""
    try:
        return decoder_config(hf)
    except UserError as error:
        place = str(directory / "config.json")
        raise UserError(
            Mistake(m.what, m.fix, m.key.removeprefix("model.config."), place)
            for m in error.mistakes
        ) from error


def has_new_head(config: DecoderConfig, directory: Path) -> bool:
    """Whether a reward model begins as the language model in the directory."""
    return config.scores and not gives_scores(read_hf_config(directory))


def stop_token_ids(hf: Mapping[str, Any], directory: Path | None = None) -> tuple[int, ...]:
    """Tokens that end a text: generation_config.json's, or else config.json's."""
    found = hf.get("eos_token_id")
    if directory is not None and (directory / "generation_config.json").is_file():
        found = read_json(directory / "generation_config.json").get("eos_token_id", found)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (found,)

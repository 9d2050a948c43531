"""Uploading what was exported to the Hugging Face hub (or to another that HF_ENDPOINT names)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainwright.errors import UserError

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def push(
    folders: Sequence[Path],
    repository: str,
    *,
    private: bool = False,
    leave_out: Sequence[str] = (),
) -> str:
    """Upload the files of `folders` to the model repository OWNER/NAME; returns its address.

    Files whose names are in `leave_out` stay here.
    It is made where it is missing; each folder is one commit, and files of the same name are
    replaced. Raises UserError without a token, network or rights, where HF_HUB_OFFLINE is set, and
    where `private` was asked for and the repository is public.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    check_push(repository)
    api = HfApi(library_name="trainwright")
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:
            fix = "make it private in its settings, or choose another name"
            raise UserError(f"{repository} is there already, and is public", fix)
        for folder in folders:
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                ignore_patterns=list(leave_out),
                commit_message="Upload from Trainwright",
            )
    except HFValidationError as error:
        raise UserError(f"{repository!r} is no name of a repository", str(error)) from error
    except HfHubHTTPError as error:
        raise _refused(repository, error.response.status_code, str(error)) from error
    except UserError:
        raise
    except Exception as error:  # whatever the HTTP client of that version has for a dead network
        what = f"{constants.ENDPOINT} could not be reached: {_first_line(error)}"
        raise UserError(
            what, "check the network, then `trainwright export RUN --push` again"
        ) from error
    return str(url)


def check_push(repository: str) -> None:
    """UserError where an upload to `repository` cannot even begin; the network is not asked."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        what = f"nothing is uploaded to {repository} while HF_HUB_OFFLINE is set"
        raise UserError(what, "unset HF_HUB_OFFLINE")
    if get_token() is None:
        raise UserError(f"uploading to {repository} needs a token of the hub", _LOGIN)


def _refused(repository: str, status: int, told: str) -> UserError:
    if status == 401:
        return UserError(f"the hub does not accept the token: {_first_line(told)}", _LOGIN)
    if status in (403, 404):
        owner = repository.split("/")[0]
        fix = f"use a token with the right to write, of {owner} or of a member of it"
        return UserError(f"the token has no right to write to {repository}", fix)
    return UserError(f"the hub answered {status}: {_first_line(told)}", "try again later")


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

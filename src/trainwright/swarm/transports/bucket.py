"""A bucket as the store: S3 and what speaks like it (R2, MinIO, B2), Google's, Azure's.

Objects over 5 MiB go up in parts and come down in ranges, so that no request lasts long on a slow
link. Requests are few: each costs a round trip, and some stores take money for them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore, from_url

from trainwright.errors import Mistake, UserError
from trainwright.swarm.transports.transport import TransportError

_PART = 5 << 20  # bytes; the smallest part that S3 takes
_PATIENCE = timedelta(seconds=120)  # for a request: a part of 5 MiB needs 0.35 Mbit/s
_RETRIES = {"max_retries": 2, "retry_timeout": timedelta(seconds=15)}  # peers ask again anyway
_FORM = (
    "write s3://bucket/prefix, gs://bucket/prefix, or az://container/prefix with "
    "AZURE_STORAGE_ACCOUNT_NAME set"
)
_RIGHTS = (
    "set the right AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (GOOGLE_APPLICATION_CREDENTIALS; "
    "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY)"
)
# Refused, or asked of the cloud's own machine, which this one is not: there are no credentials.
_NO_RIGHT = re.compile(r" 40[13] |privileges|credentials|169\.254\.169\.254|metadata\.google")
_RETRYING = re.compile(r" in [\d.]+.?s(, after \d+ retries.*?retry_timeout: \w+ )?")

if TYPE_CHECKING:
    from obstore import GetOptions


class Bucket:
    """A `Backing` below the prefix of an obstore store."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def write(self, path: str, data: bytes) -> None:
        """See `Backing`."""
        with _reported():
            obstore.put(self._store, path, data, chunk_size=_PART, max_concurrency=2)

    def create(self, path: str, data: bytes) -> bool:
        """See `Backing`; S3's `If-None-Match: *`."""
        try:
            with _reported():
                obstore.put(self._store, path, data, mode="create")
        except AlreadyExistsError:
            return False
        return True

    def read(self, path: str, limit: int) -> bytes | None:
        """See `Backing`."""
        with _reported():
            try:
                found = obstore.get(self._store, path, options={"range": (0, _PART)})
            except FileNotFoundError:
                return None
            except BaseError as error:  # no range is in an object without bytes
                if "range" in str(error).lower() and not obstore.head(self._store, path)["size"]:
                    return b""
                raise
            size, tag = found.meta["size"], found.meta["e_tag"]
            if size > limit:
                raise ValueError(f"{path} has {size:,} bytes, over {limit:,}")
            parts = [found.bytes().to_bytes()]
            for start in range(_PART, size, _PART):
                # Of the same version: its owner may have replaced it meanwhile.
                within: GetOptions = {"range": (start, min(size, start + _PART)), "if_match": tag}
                parts.append(obstore.get(self._store, path, options=within).bytes().to_bytes())
            return b"".join(parts)

    def folders(self, path: str) -> Iterator[str]:
        """See `Backing`."""
        with _reported():
            found = obstore.list_with_delimiter(self._store, path)
            yield from (prefix.rsplit("/", 1)[-1] for prefix in found["common_prefixes"])

    def files(self, path: str) -> Iterator[tuple[str, int]]:
        """See `Backing`."""
        with _reported():
            for page in obstore.list(self._store, path):
                for found in page:
                    yield found["path"].removeprefix(path + "/"), found["size"]

    def remove(self, path: str) -> None:
        """See `Backing`."""
        with _reported(), suppress(FileNotFoundError):
            obstore.delete(self._store, path)


def open_bucket(url: str) -> Bucket:
    """The bucket of "s3://bucket/prefix", "gs://…" or "az://…", with the environment's credentials.

    `?endpoint=https://…` names another server than the cloud's own (also AWS_ENDPOINT_URL),
    `&region=` its region. Raises UserError where the bucket or the right to it is missing; one
    that cannot be reached just now is no mistake.
    """
    parts = urlsplit(url)
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    if unknown := sorted(set(options) - {"endpoint", "region"}):
        raise UserError(
            Mistake(f"{unknown[0]!r} in the run's URL is nothing of a bucket", "leave it out")
        )
    endpoint = options.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL", "")
    if endpoint and not re.match(r"https?://[^/]", endpoint):
        what = f"the endpoint {endpoint!r} is no server's address"
        raise UserError(Mistake(what, "write ?endpoint=https://host", where=url))
    client = {
        "timeout": _PATIENCE,
        "connect_timeout": timedelta(seconds=10),
        "allow_http": endpoint.startswith("http://"),
    }
    plain = urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
    opened: Any = from_url  # typed by kind of store, of which it finds out itself
    try:
        store = opened(plain, config=options, client_options=client, retry_config=_RETRIES)
    except (BaseError, ValueError) as error:
        text = _first(error)
        fix = _RIGHTS if "Missing" in text else _FORM
        raise UserError(Mistake(f"no bucket can be opened: {text}", fix, where=url)) from error
    _check(store, url)
    return Bucket(store)


def _check(store: ObjectStore, url: str) -> None:
    try:
        obstore.list_with_delimiter(store)
    except (BaseError, OSError) as error:  # of a listing all kinds of refusals are one class
        text = _first(error)
        if _NO_RIGHT.search(text):
            raise UserError(
                Mistake(f"the bucket may not be read: {text}", _RIGHTS, where=url)
            ) from error
        if " 404 " in text:
            what = "there is no such bucket"
            raise UserError(Mistake(what, f"make it first; {_FORM}", where=url)) from error
        if "incorrectly configured region" in text:
            what = "the bucket is in another region"
            raise UserError(Mistake(what, "write ?region=… behind the URL", where=url)) from error


@contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except AlreadyExistsError:
        raise
    except (BaseError, OSError) as error:
        raise TransportError(_first(error)) from error


def _first(error: Exception) -> str:
    """What obstore says, without the debugger's view of it, its retries and the server's XML."""
    text = str(error).split("\n", 1)[0].split("<?xml", 1)[0]
    return _RETRYING.sub("", text)[:500].strip(" :")

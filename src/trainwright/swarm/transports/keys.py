"""Names of objects, registers and peers that are safe as paths on every disk and in every store."""

from __future__ import annotations

import re

LONGEST = 200  # characters of a whole key; a name in it has at most half of that

_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"
_KEY = re.compile(rf"{_NAME}(?:/{_NAME})*")
_PEER = re.compile(_NAME)


def checked_key(key: str) -> str:
    """`key` again: names of letters, digits, `_`, `-` and inner dots, parted by slashes.

    Raises ValueError for whatever else it is: "../x", "/x", "a//b", ".hidden", "a\\b", over 200
    characters.
    """
    if not isinstance(key, str) or len(key) > LONGEST or not _KEY.fullmatch(key):
        raise ValueError(f"not a key of an object: {key!r:.100}")
    return key


def checked_peer(peer: str) -> str:
    """`peer` again: one safe name. Raises ValueError for whatever else it is."""
    if not isinstance(peer, str) or not _PEER.fullmatch(peer):
        raise ValueError(f"not the name of a peer: {peer!r:.100}")
    return peer


def is_key(key: str) -> bool:
    """Whether `checked_key` would take it."""
    return len(key) <= LONGEST and _KEY.fullmatch(key) is not None


def is_peer(peer: str) -> bool:
    """Whether `checked_peer` would take it."""
    return _PEER.fullmatch(peer) is not None

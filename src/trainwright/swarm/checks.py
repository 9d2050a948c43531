"""The first look at a contribution: whatever can be seen without asking anybody else.

Signature, run and round are `read_message`'s to check; here it is what the peer has signed. What
passes may still be a lie, of the kinds that `swarm.conduct` and `swarm.scores` find; what does not
is never added to anything.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trainwright.comm.codecs.codec import BrokenPlanes
from trainwright.swarm.message import Message
from trainwright.swarm.methods.method import Method
from trainwright.swarm.sums import norm

# A step of an optimizer changes no weight by more than its learning rate or so; a contribution ten
# times as long as all weights can be no sum of such steps, and its sums might overflow.
_TIMES_THE_WEIGHTS = 10.0


@dataclass(frozen=True)
class Checked:
    """A contribution that was read and found possible. `loss` is None where it was not finite."""

    peer: str
    values: Tensor = field(repr=False)  # as Method.decode gives them
    tokens: int
    loss: float | None


@dataclass(frozen=True)
class Refused:
    """Why a contribution is not used. `proof`: the peer's own signature stands under what is wrong,
    so the message shows to everybody that the fault is the peer's. Without, it may be an honest
    peer whose weights went astray.
    """

    reason: str
    proof: bool


def contribution_body(base: str, tokens: int, steps: int, loss: float | None) -> dict[str, Any]:
    """The body of a contribution's message. `base` is the hash of the agreed state before it;
    `loss` the mean over its steps, told to six digits, and as None if it is not finite.
    """
    told = float(f"{loss:.6g}") if loss is not None and math.isfinite(loss) else None
    return {"base": base, "loss": told, "steps": steps, "tokens": tokens}


def check_contribution(
    message: Message,
    *,
    method: Method,
    base: str | None,
    most_norm: float,
    most_tokens: int,
    earlier: Mapping[str, str],
) -> Checked | Refused:
    """Size, shape, dtype, index range, NaN, norm, replay, and the state that it starts from.

    `base` is the hash of this peer's agreed state before the round, None where nothing is agreed
    (NoLoCo). `earlier` tells of the planes' digests of contributions that were decided in earlier
    rounds, whoever's, what they were ("those of … in round 3").

    Gives the same for the same arguments on all machines.
    """
    body, size = message.body, sum(plane.size for plane in message.planes)
    try:
        tokens, loss = _claims(body, most_tokens)
        if size > method.most_bytes(message.round):
            raise _Wrong(f"{size} bytes, and the codec needs {method.most_bytes(message.round)}")
        values = method.decode(message.planes, message.round)
        length = norm(values)
        if not math.isfinite(length):
            raise _Wrong(f"{int((~values.isfinite()).sum())} values are NaN or infinite")
        if length > most_norm:
            raise _Wrong(f"its norm is {length:.3g}, and at most {most_norm:.3g} can be right")
        before = earlier.get(planes_digest(message))
        if before and length > 0:  # nothing is nobody's: learning rates may be 0
            raise _Wrong(f"the same values as {before}")
    except (_Wrong, BrokenPlanes) as error:
        return Refused(str(error), proof=True)
    if base is not None and body["base"] != base:
        return Refused(f"made from state {body['base']}, and the agreed one is {base}", proof=False)
    return Checked(message.peer, values, tokens, loss)


def largest_norm(weights: Tensor) -> float:
    """The largest norm a contribution may have, from the agreed weights of its fragment: ten times
    theirs, and where they are near zero (new adapters) ten times that of as many ones.
    """
    return _TIMES_THE_WEIGHTS * max(norm(weights), math.sqrt(weights.numel()))


def planes_digest(message: Message) -> str:
    """SHA-256 of a message's planes alone: the same for the same values under another name."""
    digest = hashlib.sha256()
    for plane in message.planes:
        digest.update(plane.size.to_bytes(8, "little"))
        digest.update(plane.data)
    return digest.hexdigest()


class _Wrong(Exception):  # noqa: N818
    """What is wrong with a contribution."""


def _claims(body: dict[str, Any], most_tokens: int) -> tuple[int, float | None]:
    base, tokens, steps, loss = (body.get(key) for key in ("base", "tokens", "steps", "loss"))
    if not isinstance(base, str) or type(tokens) is not int or type(steps) is not int:
        raise _Wrong("it does not name base, tokens and steps")
    if tokens < 1 or steps < 1:
        raise _Wrong(f"{tokens} tokens in {steps} steps stand for nothing")
    if tokens > most_tokens:
        raise _Wrong(f"it says {tokens} tokens, and a round has at most {most_tokens}")
    if loss is not None and type(loss) not in (int, float):
        raise _Wrong("its loss is not a number")
    return tokens, None if loss is None else float(loss)

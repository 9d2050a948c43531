"""Numbers with units as people write them: `400 Gbit/s`, `80 ms`, `80 GB`, `989 TFLOP/s`."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from trainwright.recipe.section import refusal

_METRIC = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def _scaled(unit: str, size: float = 1.0, *, binary: bool = False) -> dict[str, float]:
    prefixes = _METRIC | (_BINARY if binary else {})
    return {f"{prefix}{unit}": factor * size for prefix, factor in prefixes.items()}


UNITS: dict[str, dict[str, float]] = {
    "bytes": _scaled("B", binary=True),
    "bytes/s": _scaled("B/s", binary=True) | _scaled("bit/s", 1 / 8),
    "seconds": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9},
    "FLOP/s": _scaled("FLOP/s"),
    "watts": {"W": 1.0, "kW": 1e3},
}
_EXAMPLES = {
    "bytes": "80 GB",
    "bytes/s": "400 Gbit/s",
    "seconds": "80 ms",
    "FLOP/s": "312 TFLOP/s",
    "watts": "700 W",
}


def quantity(value: Any, measure: str) -> float:
    """A text such as `400 Gbit/s` in the measure's own unit, a key of `UNITS`.

    Raises pydantic's error where it has no unit, or none of this measure's.
    """
    units, example = UNITS[measure], _EXAMPLES[measure]
    found = re.fullmatch(r"\s*([\d._]+(?:[eE][+-]?\d+)?)\s*(\S*)\s*", str(value))
    try:
        number = float(found[1]) if found else -1.0
    except ValueError:
        number = -1.0
    if found is None or number < 0 or isinstance(value, bool):
        raise refusal(f"expected a number and its unit, found `{value}`", f"write `{example}`")
    if found[2] not in units:
        what = (
            f"`{value}` has no unit" if not found[2] else f"`{found[2]}` is no unit for {measure}"
        )
        close = difflib.get_close_matches(found[2], units, n=1, cutoff=0.6)
        fix = f"write `{found[1]} {close[0]}`" if close else f"write for example `{example}`"
        raise refusal(what, fix)
    return number * units[found[2]]


def _measured(measure: str) -> Any:
    return Annotated[
        float,
        BeforeValidator(lambda value: quantity(value, measure)),
        WithJsonSchema({"type": "string", "examples": [_EXAMPLES[measure]]}),
    ]


Bytes = _measured("bytes")
Bandwidth = _measured("bytes/s")
Seconds = _measured("seconds")
Flops = _measured("FLOP/s")
Watts = _measured("watts")

"""Numbers as people read them, for the terminal and the report: short, with their unit."""

from __future__ import annotations

import math
from datetime import datetime

COUNT_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"))
BYTE_SUFFIXES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
RATE_SUFFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

UNKNOWN = "–"


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits and no exponent where that stays readable."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    # Rounding may carry into a new digit: 9.999 has the power of 10.0.
    power = int(f"{value:.{digits - 1}e}".split("e")[1])
    if power < -4 or power >= 9:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{max(0, digits - 1 - power)}f}"


def count_text(value: float | None) -> str:
    """Whole numbers up to 9,999 as they are, then 12.3k, 4.56M, 7.89B, 1.23T."""
    if value is None:
        return UNKNOWN
    for size, suffix in COUNT_SUFFIXES:
        if abs(value) >= 0.9995 * size:
            return significant(value / size) + suffix
    if abs(value) >= 1e4:
        return significant(value / 1e3) + "k"
    return f"{value:,.0f}"


def bytes_text(value: float | None) -> str:
    """Bytes in decimal units: 1.20 GB is 1.2e9 bytes."""
    if value is None:
        return UNKNOWN
    for size, suffix in BYTE_SUFFIXES:
        if abs(value) >= size:
            return f"{significant(value / size)} {suffix}"
    return f"{value:.0f} B"


def rate_text(value: float | None, unit: str) -> str:
    """A rate with its unit: `rate_text(3.3e11, "FLOP/s")` is `330 GFLOP/s`."""
    if value is None:
        return UNKNOWN
    for size, suffix in RATE_SUFFIXES:
        if abs(value) >= size:
            return f"{significant(value / size)} {suffix}{unit}"
    return f"{significant(value)} {unit}"


def percent_text(share: float | None) -> str:
    """A share of 1 in per cent: 0.412 is `41.2%`."""
    return UNKNOWN if share is None else f"{100 * share:.1f}%"


def duration_text(seconds: float | None) -> str:
    """The two largest units that matter: `8.1 s`, `2 min 31 s`, `3 h 12 min`, `2 d 4 h`."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    # Each unit rounds before it is chosen: 59 min 59.6 s is 1 h 0 min, never 60 min.
    if round(seconds) < 60:
        return f"{round(seconds)} s"
    if round(seconds) < 3600:
        return "{} min {} s".format(*divmod(round(seconds), 60))
    if round(seconds / 60) < 24 * 60:
        return "{} h {} min".format(*divmod(round(seconds / 60), 60))
    return "{} d {} h".format(*divmod(round(seconds / 3600), 24))


def date_text(timestamp: float | None) -> str:
    """Seconds since 1970 as local date and time to the minute."""
    if timestamp is None:
        return UNKNOWN
    return datetime.fromtimestamp(timestamp).strftime("%d %b %Y, %H:%M").lstrip("0")

"""Numbers in words: units, rounding that carries, and the unknown."""

from __future__ import annotations

import math

import pytest

from trainwright.report.tables import (
    bytes_text,
    count_text,
    duration_text,
    percent_text,
    rate_text,
    significant,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (9.999, "10.0"),
        (0.0009996, "0.00100"),
        (0.00012, "0.000120"),
        (3e-5, "3.00e-5"),
        (3.14159e-7, "3.14e-7"),
        (-1234.5, "-1,234"),
        (2.5e12, "2.50e12"),
        (math.nan, "NaN"),
        (-math.inf, "−∞"),
    ],
)
def test_significant_digits(value, text):
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (9_999, "9,999"),
        (12_345, "12.3k"),
        (999_499, "999k"),
        (999_600, "1.00M"),
        (4_123_456, "4.12M"),
        (8.03e9, "8.03B"),
        (2e12, "2.00T"),
        (None, "–"),
    ],
)
def test_counts(value, text):
    assert count_text(value) == text


def test_bytes_rates_and_shares():
    assert [bytes_text(value) for value in (12, 1_500, 1.2e9, None)] == [
        "12 B",
        "1.50 kB",
        "1.20 GB",
        "–",
    ]
    assert rate_text(3.33e11, "FLOP/s") == "333 GFLOP/s"
    assert rate_text(2.3e12, "FLOP/s") == "2.30 TFLOP/s"
    assert rate_text(12.0, "B/s") == "12.0 B/s"
    assert percent_text(0.4123) == "41.2%" and percent_text(None) == "–"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (8.14, "8.1 s"),
        (59.6, "1 min 0 s"),
        (151, "2 min 31 s"),
        (3599.7, "1 h 0 min"),
        (3600 * 23 + 60 * 59.6, "1 d 0 h"),
        (100 * 86400, "100 d 0 h"),
        (math.nan, "–"),
        (None, "–"),
    ],
)
def test_durations_round_before_they_choose_their_unit(seconds, text):
    assert duration_text(seconds) == text

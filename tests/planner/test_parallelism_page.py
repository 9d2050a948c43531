"""docs/parallelism.md is what its generator writes, and tells every rule and every dimension."""

from __future__ import annotations

from tests.conftest import REPOSITORY
from trainwright.planner.parallelism_page import page
from trainwright.planner.rules import RULES
from trainwright.planner.schedules import SCHEDULES


def test_the_page_is_up_to_date() -> None:
    written = (REPOSITORY / "docs" / "parallelism.md").read_text(encoding="utf-8")
    command = "python -m trainwright.planner.parallelism_page docs/parallelism.md"
    assert written == page(), f"run `{command}`"
    assert command in written
    assert command in (REPOSITORY / "Makefile").read_text(encoding="utf-8")


def test_the_page_has_every_rule_schedule_and_table() -> None:
    text = page()
    assert "<!-- table" not in text
    for rule in RULES:
        assert f'<a id="{rule.name}"></a>' in text
        assert rule.reason in text
    for name in SCHEDULES:
        assert f"| `{name}` |" in text
    # A pair that works, one that does not, and two values of one thing.
    lines = {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith("| **")}
    number = [rule.name for rule in RULES].index("zero-split-backward") + 1
    assert f"[{number}](#zero-split-backward)" in lines["`pp`, split backward"]
    assert "✓" in lines["`tp`"]
    assert "–" in lines["`zero: 2`"]

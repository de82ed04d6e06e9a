"""docs/own-method.md tells the laws that there are."""

from __future__ import annotations

from laws.page import PAGE, TABLES, with_tables


def test_the_tables_are_the_laws() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_tables(text), "run `PYTHONPATH=.:tests python -m laws.page`"
    rows = [line for line in text.splitlines() if line.endswith(". |")]
    assert len(rows) >= sum(map(len, TABLES.values())) > 35

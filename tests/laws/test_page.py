"""docs/own-method.md tells the laws that there are."""

from __future__ import annotations

from laws.page import PAGE, TABLES, with_tables


def test_the_tables_are_the_laws() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_tables(text), "run `PYTHONPATH=.:tests python -m laws.page`"
    for laws in TABLES.values():
        for name in laws:
            assert text.count(f"| `{name}` |") == sum(name in other for other in TABLES.values())

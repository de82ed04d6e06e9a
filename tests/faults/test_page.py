"""The table of docs/faults.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.docs
HERE = Path(__file__).parent


def test_every_row_of_the_table_names_a_test() -> None:
    page = (HERE.parents[1] / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        names = re.findall(r"`(test_\w+\.py)::(test_\w+)(?:\[(\w+)\])?`", row)
        assert names, row
        for file, test, case in names:
            text = (HERE / file).read_text(encoding="utf-8")
            assert f"def {test}(" in text
            assert case in text

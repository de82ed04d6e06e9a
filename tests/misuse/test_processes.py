"""Mistakes that only several processes can make: all of them are told, and none is left waiting for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from misuse.processes import ROWS

from lightning_peft.testing.processes import run_processes

pytestmark = pytest.mark.dist


def said(wrong: Callable[[], Any]) -> str:
    try:
        wrong()
    except Exception as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(("wrong", "says"), ROWS.values(), ids=ROWS.keys())
def test_every_process_is_told(wrong: Callable[[], Any], says: str) -> None:
    assert run_processes(2, said, wrong, timeout=120) == [says, says]

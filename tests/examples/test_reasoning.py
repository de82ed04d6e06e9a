"""The reasoning example: questions whose answers are right, and its table on a tiny model in the place of SmolLM2."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
from tiny_models import save_decoder

EXAMPLE = Path(__file__).parents[2] / "examples" / "reasoning"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of the example, which are no package: importable from their own folder, as for a script there."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in ("questions", "run", "smollm"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_answers_are_right_and_questions_differ() -> None:
    make = import_module("questions").make
    asked = make(60, seed=3)
    assert len(dict(asked)) == 60
    assert asked == make(60, seed=3) != make(60, seed=4)
    kinds = set()
    for question, answer in asked:
        a, b, *more = map(int, re.findall(r"\d+", question))
        c = more[0] if more else 0
        kind = next(word for word in ("together", "buys", "gets", "gives", "in each") if word in question)
        kinds.add(kind)
        wanted = {"together": a + b * c, "buys": a + b - c, "gets": a + b, "gives": a - b, "in each": a * b}[kind]
        assert answer == str(wanted), question
    assert len(kinds) == 5


def test_the_table_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # the example adds a folder to it
    folder = save_decoder(tmp_path / "model", max_position_embeddings=512)
    options = ["--questions", "2", "--examples", "1", "--tokens", "4", "--model", folder]
    monkeypatch.setattr(sys, "argv", ["run.py", *options])
    assert import_module("run").main() == 0
    shown = capsys.readouterr().out
    rows = re.findall(r"^(\S[\w ,-]*?) +[01]\.\d{3}  \[\d\.\d{3}, \d\.\d{3}\] ", shown, re.MULTILINE)
    assert rows == [
        "self-generated, integrated", "self-consistency, equal tokens",
        "self-generated, staged", "self-consistency, equal tokens", "zero-shot", "zero-shot CoT", "few-shot CoT",
    ]  # fmt: skip
    assert "2 of 2 texts" in shown

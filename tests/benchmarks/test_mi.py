"""The benchmark of estimators in its quick form: it runs, keeps what it has, and its page is made of its file."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def mi(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script puts its own folder in front
    spec = importlib.util.spec_from_file_location("mi", ROOT / "benchmarks" / "mi.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mi", module)  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_quick_form_measures_every_part_once(
    mi: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "mi.jsonl"
    mi.run_all(list(mi.PARTS), results, quick=True)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["part"] for row in rows] == ["analytic"] * 3 + ["learnt"] * 4 + ["club"] + ["aggregate"] * 4
    capsys.readouterr()
    mi.run_all(list(mi.PARTS), results, quick=True)
    assert capsys.readouterr().out.count("there already") == len(rows)
    page = mi.page(results, quick=True)
    for row in rows:
        for value in row["values"].values():
            assert f"{value['mean']:.3f} ± {value['std']:.3f}" in page  # every figure is one of the file
    assert "missing" not in page
    assert re.search(r"\d+ of 18 means are within 3 standard errors of the expected ones", page)


def test_page_in_the_docs_is_the_one_of_the_results(mi: ModuleType) -> None:
    assert (ROOT / "docs" / "mutual-information-estimators.md").read_text(encoding="utf-8") == mi.page()
    assert len(mi.load()) == sum(len(mi.planned(part)) for part in mi.PARTS)


def test_quick_results_are_kept_apart(
    mi: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mi.py", "plan", "--quick"])
    with pytest.raises(SystemExit):
        mi.main()
    assert "--quick needs --results FILE: what it measures does not belong" in capsys.readouterr().err

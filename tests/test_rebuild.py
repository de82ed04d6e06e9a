"""Hyper-parameters come from the file, and the digest does not cover them: they choose no code."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_peft import AdapterFileError
from lightning_peft.checkpoint import ENTRY, digest
from lightning_peft.rebuild import rebuild


class Net(LightningModule):
    def __init__(self, net: Any = None, act: Any = None) -> None:
        super().__init__()
        self.given = (net, act)


def write(path: Path, hyper_parameters: Any) -> Path:
    entry: dict[str, Any] = {
        "version": 1, "recipe": {"adapters": [], "trained": []}, "ranks": {}, "costs": {}, "base": {},
    }  # fmt: skip
    entry["digest"] = digest({}, entry)
    torch.save({"state_dict": {}, ENTRY: entry, "hyper_parameters": hyper_parameters}, path)
    return path


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ModuleType("mine_net")
    mine.Net = Net  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine_net", mine)


@pytest.mark.parametrize(("hyper_parameters", "sentence"), [
    ([1], "has hyper-parameters that are no dictionary by name"),
    ({1: 2}, "has hyper-parameters that are no dictionary by name"),
    ({"_class_path": 3}, "was trained on 3, and a file does not make us import code"),
    ({"_class_path": "antigravity.Net"}, "a file does not make us import code"),
    ({"_class_path": "lightning_peft.no_such_thing.Net"}, "a file does not make us import code"),
    ({"_class_path": "lightning_peft/../x.Net"}, "a file does not make us import code"),
    ({"_class_path": "mine_net.Net", "net": {"class_path": "subprocess.Popen", "init_args": {"args": ["true"]}}},
     "'subprocess.Popen' in its hyper-parameters, which is no nn.Module"),
    ({"_class_path": "mine_net.Net", "net": {"class_path": "builtins.exec"}}, "'builtins.exec' in its hyper"),
    ({"_class_path": "mine_net.Net", "net": {"class_path": "torch.hub.load"}}, "'torch.hub.load' in its hyper"),
    ({"_class_path": "mine_net.Net", "net": {"class_path": "torch.nn.ReLU"}, "act": "os.system"}, "'os.system' in its"),
    ({"_class_path": "mine_net.Net", "net": {"class_path": "torch.nn.ReLU"}, "act": "antigravity.fly"},
     "names the class 'antigravity.fly' in its hyper-parameters, which is not imported"),
])  # fmt: skip
def test_a_file_chooses_no_code(tmp_path: Path, hyper_parameters: Any, sentence: str) -> None:
    with pytest.raises(AdapterFileError) as caught:
        rebuild(write(tmp_path / "evil.ckpt", hyper_parameters))
    assert sentence in str(caught.value)
    assert "antigravity" not in sys.modules


def test_hyper_parameters_nested_without_end_are_refused(tmp_path: Path) -> None:
    value: list[Any] = []
    for _ in range(100):
        value = [value]
    with pytest.raises(AdapterFileError, match="nested too deep"):
        rebuild(write(tmp_path / "deep.ckpt", {"_class_path": "mine_net.Net", "net": value}))


def test_paths_in_hyper_parameters_are_given_to_the_class_and_not_opened(tmp_path: Path) -> None:
    module = rebuild(write(tmp_path / "good.ckpt", {"_class_path": "mine_net.Net", "net": "../../secret.txt"}))
    assert isinstance(module, Net)
    assert module.given == ("../../secret.txt", None)

"""Convolutions: stock PEFT loads what to_hf_peft writes, with equal outputs, or it is refused by name."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft.adapters import DynamicDoRA, LoRA, WeightDecomposed
from lightning_peft.export import merge
from lightning_peft.interop import hf_peft
from lightning_peft.interop.hf_peft import to_hf_peft
from lightning_peft.interop.merged import save_merged
from lightning_peft.interop.size import exported_bytes
from lightning_peft.rank.budget import RankBudget
from lightning_peft.surgery import inject

peft = pytest.importorskip("peft", reason="lightning-peft[hf] is not installed")

RANK = 4
LORA = partial(LoRA, rank=RANK, alpha=6.0)
DORA = partial(DynamicDoRA, rank=RANK)
MODES: list[hf_peft.Mode] = ["padded", "compact", "folded"]


def fill(module: nn.Module, *ranks: int) -> None:
    """Give the adapters values, as training would, and close components: without `ranks`, 1, 2, ... stay open."""
    for i, site in enumerate(RankBudget.of(module).values()):
        nn.init.normal_(site.adapter.B, std=0.1)
        if site.gate.gain is not None:
            nn.init.normal_(site.gate.gain)
        site.gate.keep(torch.randperm(RANK) < (ranks[i] if ranks else i % RANK + 1))


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(-1)


def sound() -> nn.Module:
    first = nn.Conv1d(6, 8, 5, stride=2, padding=2)
    return nn.Sequential(first, nn.ReLU(), nn.Conv1d(8, 8, 3, padding="same"), Flat(), nn.Linear(8, 8), nn.Linear(8, 3))


def image() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, (1, 3), stride=(1, 2), bias=False)]
    pointwise = nn.Conv2d(10, 6, 1, padding_mode="reflect")  # pads nothing
    return nn.Sequential(*layers, pointwise, Flat(), nn.Linear(6, 8), nn.Linear(8, 3))


def volume() -> nn.Module:
    # Kernels whose first two edges are 1: PEFT cannot merge these, and computes with them all the same.
    layers = [nn.Conv3d(2, 6, (3, 1, 2), padding=(1, 0, 1)), nn.ReLU(), nn.Conv3d(6, 8, (1, 1, 3)), nn.Conv3d(8, 8, 1)]
    return nn.Sequential(*layers, Flat(), nn.Linear(8, 3))


INPUTS = {sound: (2, 6, 20), image: (2, 3, 9, 8), volume: (2, 2, 4, 5, 6)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", INPUTS)
@pytest.mark.parametrize("factory", [LORA, DORA], ids=["lora", "dynamic_dora"])
def test_stock_peft_loads_convolutions_and_linear_layers_with_equal_outputs(
    build: Any, factory: Any, mode: hf_peft.Mode
) -> None:
    model = build().eval()
    base = copy.deepcopy(model)
    inject(model, factory)
    fill(model)
    x = torch.randn(INPUTS[build])
    report = to_hf_peft(model, "out", mode, check="peft", inputs=x)
    assert report.max_difference <= 1e-6
    assert report.check == "loaded with stock PEFT on a copy of the base; outputs compared on 1 input"
    assert to_hf_peft(model, "out", mode, check="files").max_difference <= 1e-6
    assert to_hf_peft(model, "out", mode).check.endswith("updates of every layer compared, outputs not")
    with torch.no_grad():
        wanted = model(x)
        assert (wanted - base(x)).abs().max() > 1e-3
        loaded = peft.PeftModel.from_pretrained(base, "out").eval()
        assert (loaded(x) - wanted).abs().max() <= 1e-6
        merge(model)
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)


def test_what_is_written_for_a_convolution() -> None:
    model = image()
    inject(model, LORA, ["0", "3"], train=[])
    fill(model, 2, 3)
    to_hf_peft(model, "out", "compact")
    shapes = {name: tuple(t.shape) for name, t in load_file("out/adapter_model.safetensors").items()}
    assert shapes == {
        "base_model.model.0.lora_A.weight": (2, 3, 3, 3),
        "base_model.model.0.lora_B.weight": (8, 2, 1, 1),
        "base_model.model.3.lora_A.weight": (3, 10, 1, 1),
        "base_model.model.3.lora_B.weight": (6, 3, 1, 1),
    }


REFUSALS = {
    "groups=2": nn.Conv2d(8, 8, 3, groups=2),
    r"dilation=\(2, 2\)": nn.Conv2d(8, 8, 3, dilation=2),
    "padding_mode='circular'": nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
}


@pytest.mark.parametrize("odd", REFUSALS)
def test_what_peft_computes_otherwise_is_refused_by_name(odd: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), copy.deepcopy(REFUSALS[odd]))
    inject(model, LORA, ["0", "1"], train=[])
    fill(model)
    sentence = rf"layer '1' is a convolution with {odd}, and PEFT computes something else on it\. Export the merged"
    with pytest.raises(TypeError, match=sentence):
        to_hf_peft(model, "out")
    assert list(tmp_path.iterdir()) == []
    assert exported_bytes(model, None, lambda t: t.element_size()) is None


@pytest.mark.parametrize("first", [LORA, partial(WeightDecomposed, rank=RANK)])
def test_lengths_of_rows_beside_convolutions(first: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(1), nn.Linear(8, 8)).eval()
    kinds = iter([first, partial(WeightDecomposed, rank=RANK)])
    inject(model, lambda layer: next(kinds)(layer), targets=["0", "2"])
    with torch.no_grad():
        for site in RankBudget.of(model).values():
            for _, parameter in site.adapter.own_parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    report = to_hf_peft(model, tmp_path / "out", check="peft", inputs=torch.randn(3, 4, 3, 3))
    assert report.max_difference <= 1e-6


def test_a_peft_that_moves_kernels_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lightning_peft.interop.targets._not_by_peft", lambda layer: None)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"))
    inject(model, LORA, ["0"], train=[])
    fill(model)
    with pytest.raises(RuntimeError, match=r"is not right: base_model\.model\.0 differs by"):
        to_hf_peft(model, "out", check="peft")
    assert list(tmp_path.iterdir()) == []


class Small(nn.Module):
    """A backbone with batch norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.body(self.bn1(self.conv1(x)).relu()).flatten(2).mean(-1))
        return y


@pytest.mark.parametrize("check", ["peft", "files"])
def test_running_statistics_that_training_changed_go_with_the_adapters(check: Any) -> None:
    model = Small()
    base = copy.deepcopy(model)
    inject(model, LORA)
    fill(model, RANK, RANK)
    model.train()(torch.randn(8, 3, 6, 6) + 1.0)
    x = torch.randn(2, 3, 6, 6)
    report = to_hf_peft(model, "out", check=check, inputs=x)
    assert report.head == ("fc",)
    assert "those of 2 layers are written with the adapters." in report.notes[0]
    # In another order of tensors, places in the file have a digit more or less.
    assert abs(report.bytes - exported_bytes(model, None, lambda t: t.element_size())) <= 16
    assert json.loads(Path("out/adapter_config.json").read_text())["modules_to_save"] == ["fc", "bn1", "body.1"]
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), "out").eval()
    with torch.no_grad():
        assert (loaded(x) - model.eval()(x)).abs().max() <= 1e-6
    report = to_hf_peft(model, "out", check=check, head=False)
    assert "those of 2 layers are not written (head=False), and outputs differ without them." in report.notes[0]
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), "out").eval()
    with torch.no_grad():
        assert (loaded(x) - model(x)).abs().max() > 1e-3


def test_a_network_of_transformers_by_either_way() -> None:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    model = hf.ResNetForImageClassification(config)
    base = copy.deepcopy(model)
    adapted = inject(model, LORA)
    assert adapted.trained == ("classifier.1.bias", "classifier.1.weight")
    assert "resnet.embedder.embedder.convolution" in adapted.adapted
    assert len(adapted.adapted) == sum(isinstance(m, nn.Conv2d) for m in base.modules())
    fill(model)
    x = torch.randn(2, 3, 32, 32)
    model.train()(x + 1.0)
    assert to_hf_peft(model, "out", inputs=x, check="peft").max_difference <= 1e-5
    with torch.no_grad():
        wanted = model.eval()(x).logits
        loaded = peft.PeftModel.from_pretrained(base, "out").eval()
        torch.testing.assert_close(loaded(x).logits, wanted, rtol=1e-5, atol=1e-5)
        save_merged(model, "merged", inputs=x)
        plain = hf.ResNetForImageClassification.from_pretrained("merged").eval()
        torch.testing.assert_close(plain(x).logits, wanted, rtol=1e-5, atol=1e-5)

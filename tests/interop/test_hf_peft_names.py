"""PEFT finds layers by patterns, and torch's attention by its own name: what is written is read as it was meant."""

from __future__ import annotations

import copy
import itertools
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft.adapters import DynamicDoRA, LoRA
from lightning_peft.interop import hf_peft
from lightning_peft.interop.hf_peft import to_hf_peft
from lightning_peft.rank.budget import RankBudget
from lightning_peft.surgery import inject

peft = pytest.importorskip("peft", reason="lightning-peft[hf] is not installed")

RANK = 4
LORA = partial(LoRA, rank=RANK, alpha=6.0)
DORA = partial(DynamicDoRA, rank=RANK)
MODES: list[hf_peft.Mode] = ["padded", "compact", "folded"]


def fill(module: nn.Module, *ranks: int) -> dict[str, int]:
    """Give the adapters values, as training would, and close components: without `ranks`, 0, 1, 2, ... stay open."""
    kept = {}
    for i, (name, site) in enumerate(RankBudget.of(module).items()):
        nn.init.normal_(site.adapter.B, std=0.1)
        if site.gate.gain is not None:
            nn.init.normal_(site.gate.gain)
        kept[name] = ranks[i] if ranks else i % (RANK + 1)
        site.gate.keep(torch.randperm(RANK) < kept[name])
    return kept


@pytest.fixture(params=[LORA, DORA], ids=["lora", "dynamic_dora"])
def factory(request: pytest.FixtureRequest) -> Any:
    return request.param


class Encoder(nn.Module):
    """torch's own attention, which is read and never called, with a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x).mean(1))
        return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("targets", [None, ["in_proj", "linear1"]])
def test_attention_of_unequal_ranks(factory: Any, mode: hf_peft.Mode, targets: list[str] | None) -> None:
    module = Encoder().eval()
    base = copy.deepcopy(module)
    nn.init.normal_(base.head.weight)
    inject(module, factory, targets)
    # An attention with out_proj of rank 0 or not adapted, one with both of rank 0, another one like the first.
    ranks = itertools.cycle((3, 2, 4, 0, 1) if targets is None else (3, 1, 0, 2, 4))
    fill(module, *[0 if name.endswith("out_proj") else next(ranks) for name in RankBudget.of(module)])
    x = torch.randn(64, 5, 16)
    report = to_hf_peft(module, "out", mode, inputs=x)
    assert report.max_difference <= 1e-5
    assert report.check.endswith("outputs compared on 1 input")
    assert report.head == ("head",)
    loaded = peft.PeftModel.from_pretrained(base, "out").eval()
    with torch.no_grad():
        wanted = module(x)
        fast = loaded(x)
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            assert (loaded(x) - wanted).abs().max() <= 1e-5
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    # What the report's note is for: in torch's fast path stock PEFT leaves its adapters out.
    assert (fast - wanted).abs().max() > 1e-3
    assert "note: in evaluation mode TransformerEncoderLayer has a fast path" in str(report)
    assert "set_fastpath_enabled(False)" in Path("out/README.md").read_text()


def test_an_adapter_on_out_proj_is_not_written_for_a_peft_that_adds_it_twice(tmp_path: Path) -> None:
    module = Encoder().eval()
    base = copy.deepcopy(module)
    inject(module, DORA, ["self_attn"])
    fill(module, 0, 0, 2, 3, 0, 4)
    with pytest.raises(
        RuntimeError, match=r"layer 'encoder\.layers\.1\.self_attn\.out_proj': the installed PEFT .* twice"
    ):
        to_hf_peft(module, "out")
    assert list(tmp_path.iterdir()) == []
    # The files themselves are right: PEFT reads the very updates, padded to the rank that an attention has in common.
    to_hf_peft(module, "out", "compact", check="files")
    loaded = peft.PeftModel.from_pretrained(base, "out").base_model.model
    for name, site in RankBudget.of(module).items():
        attention = loaded.get_submodule(name.rpartition(".")[0])
        if name.startswith("encoder.layers.0."):
            assert type(attention) is nn.MultiheadAttention
            continue
        layer = attention.base_layer.out_proj if name.endswith("out_proj") else attention
        assert layer.r["default"] == (3 if "layers.1" in name else 4)
        torch.testing.assert_close(layer.get_delta_weight("default"), site.adapter.update(), rtol=0, atol=1e-6)


def test_without_inputs_updates_are_compared() -> None:
    module = Encoder()
    inject(module, DORA, ["in_proj", "linear1"])
    fill(module)
    report = to_hf_peft(module, "out")
    assert report.check == "loaded with stock PEFT on a copy of the base; updates of every layer compared, outputs not"


def test_a_plain_lightning_module_is_exported_as_it_is() -> None:
    class Job(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Encoder()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out

    module = Job()
    inject(module, DORA, ["in_proj", "linear2"])
    fill(module)
    report = to_hf_peft(module, "out", inputs=(torch.randn(2, 3, 16),))
    assert report.head == ("net.head",)
    assert report.check.endswith("outputs compared on 1 input")


class Deep(nn.Module):
    """Names that PEFT's patterns confuse: ends of each other, and full stops that match a digit."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({name: nn.ModuleDict({"x": nn.Linear(6, 6)}) for name in ("1", "11", "2")})
        self.block = nn.ModuleDict({"layer": nn.ModuleDict({"1": nn.ModuleDict({"x": nn.Linear(6, 6)})})})
        self.l = nn.ModuleDict({"1": nn.ModuleDict({"1": nn.Linear(6, 6)}), "111": nn.Linear(6, 6)})
        self.l1 = nn.ModuleDict({"1": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        for module in self.modules():
            if isinstance(module, nn.Linear) or hasattr(module, "effective_weight"):
                x = module(x).tanh() + x
        return x


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("open_", ["all", "first"])
def test_names_that_are_ends_of_other_names(mode: hf_peft.Mode, open_: str) -> None:
    module = Deep()
    base = copy.deepcopy(module)
    inject(module, LORA, [".*"], train=[])
    names = list(RankBudget.of(module))
    # With the rest of rank 0, "layer.1.x" must not be taken for "block.layer.1.x".
    fill(module, *([1, 2, 3, 4, 1, 2, 3] if open_ == "all" else [3, 0, 2, 0, 1, 0, 4]))
    assert names.index("layer.1.x") == 0
    assert names.index("block.layer.1.x") == 3
    to_hf_peft(module, "out", mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = peft.PeftModel.from_pretrained(base, "out").base_model.model
    for name, site in RankBudget.of(module).items():
        layer = loaded.get_submodule(name)
        rank = int(site.gate.open().sum())
        if not rank:
            assert type(layer) is nn.Linear
            continue
        assert layer.r["default"] == (RANK if mode == "padded" else rank)
        torch.testing.assert_close(layer.get_delta_weight("default"), site.adapter.update(), rtol=0, atol=1e-6)

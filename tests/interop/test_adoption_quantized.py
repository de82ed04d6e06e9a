"""Adoption never reads a base layer's storage, so whatever base PEFT handles stays handled.

No library with which PEFT quantizes runs in these tests. What does is a base layer of int8 numbers that has no
`weight` at all, dispatched by PEFT's own way for layers that it does not know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft_models import Job, Text, fit
from torch import Tensor, nn

from lightning_peft import (
    AdapterCheckpoint,
    Adoption,
    Budget,
    Cubic,
    Orthogonality,
    RankBudget,
    RankMonitor,
    RankPolicy,
    RankPruning,
    Regularization,
    Taylor,
    load,
    release,
    to_hf_peft,
)

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")


class Int8Linear(nn.Module):
    """y = x (q s)^T + b with q in int8. It has no `weight`: whoever reads one fails."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("quantized", (plain.weight.detach() / scale).round().to(torch.int8))
        self.bias = nn.Parameter(plain.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.quantized.to(x.dtype) * self.scale  # type: ignore[operator]
        return nn.functional.linear(x, weight, self.bias)


def build() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = Text()
        net.query, net.value = Int8Linear(net.query), Int8Linear(net.value)  # type: ignore[assignment]
        config = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
        config._register_custom_module({Int8Linear: LoraLinear})
        return get_peft_model(net, config)


def test_prune_monitor_resume_and_write_on_an_int8_base(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        policy = RankPolicy(Cubic(0.1, 0.3), Taylor(), Budget(rank=2), interval=3)
        terms = Regularization({"orthogonality": Orthogonality(0.01)})
        return [Adoption(verbose=False), RankPruning(policy), terms, RankMonitor(), AdapterCheckpoint()]

    whole = Job(model=build())
    before = {name: buffer.clone() for name, buffer in whole.named_buffers()}
    trainer = fit(whole, *callbacks())
    assert sum(RankBudget.of(whole).ranks().values()) == 4
    for name, buffer in whole.named_buffers():
        if name in before:
            assert torch.equal(buffer, before[name])
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    fresh = load(Job(model=build()), tmp_path / "some.ckpt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)
    assert to_hf_peft(whole, tmp_path / "folder", "compact", check="files").max_difference == 0.0
    ids = torch.arange(12).view(2, 6)
    wanted = whole.model(ids)
    release(whole)
    assert torch.equal(whole.model(ids), wanted)
    with pytest.raises(AttributeError, match="weight"):
        whole.model.merge_adapter()  # what PEFT itself cannot do with this base

"""Trained sparse adapters as pairs, as a file, in PEFT's SHiRA format and as plain models: the same outputs."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_peft import (
    LoRA,
    SparseAdapter,
    SparseBudget,
    SparseSwitch,
    eject,
    inject,
    merge,
    read_sparse,
    save_merged,
    to_hf_peft,
)
from lightning_peft.surgery.layers import adapters

IDS = torch.arange(12).view(2, 6)


def bert(dtype: torch.dtype = torch.float32) -> nn.Module:
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(config).to(dtype).eval()


def adapted(dtype: torch.dtype = torch.float32, close: int = 0, **options: float) -> nn.Module:
    """With deltas and a head as after training, and some entries closed."""
    net = bert(dtype)
    inject(net, SparseBudget(**{"density": 0.1} | options))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in adapters(net).values():
            adapter.delta.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr, operator]
            adapter.gate.mask[:close] = 0  # type: ignore[union-attr]
        net.classifier.weight.normal_(generator=generator)  # type: ignore[union-attr, operator]
    return net


@torch.no_grad()
def logits(net: nn.Module) -> Tensor:
    found: Tensor = net(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_property_12_saved_and_read_gives_the_same_outputs(dtype: torch.dtype, tmp_path: Path) -> None:
    net = adapted(dtype, close=3)
    pairs = SparseAdapter.of(net)
    assert pairs.parameters == sum(a.delta.numel() - 3 for a in adapters(net).values())  # type: ignore[union-attr, operator]
    pairs.save(tmp_path / "adapter.safetensors")
    plain = bert(dtype)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    switch = SparseSwitch(plain)
    switch.to(read_sparse(tmp_path / "adapter.safetensors", plain))
    assert torch.equal(logits(plain), logits(net))
    switch.to(None)
    assert all(torch.equal(p, before[name]) for name, p in plain.named_parameters())
    merged = copy.deepcopy(net)
    merge(merged)
    assert torch.equal(logits(merged), logits(net))
    eject(net)
    assert torch.equal(net.bert.encoder.layer[0].attention.self.value.weight, before[  # type: ignore[union-attr, index]
        "bert.encoder.layer.0.attention.self.value.weight"])  # fmt: skip


def test_stock_peft_computes_the_same(tmp_path: Path) -> None:
    net = adapted(close=3)
    report = to_hf_peft(net, tmp_path / "shira", check="peft")
    assert report.max_difference < 1e-6
    assert report.head == ("classifier",)
    assert "loaded with stock PEFT on a copy of the base; outputs compared" in report.check
    assert to_hf_peft(net, tmp_path / "read", check="files").max_difference == 0
    # What is compared is what counts: another delta is another adapter.
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(bert(), str(tmp_path / "shira")).eval()
    with torch.sparse.check_sparse_tensor_invariants(True):
        outputs = logits(theirs)
    torch.testing.assert_close(outputs, logits(net), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        next(iter(adapters(net).values())).delta[5] += 0.5  # type: ignore[union-attr, operator, index]
    assert not torch.allclose(outputs, logits(net), atol=1e-4)


def test_a_base_in_bfloat16(tmp_path: Path) -> None:
    assert to_hf_peft(adapted(torch.bfloat16), tmp_path / "shira", check="peft").max_difference < 1e-5


def test_the_merged_folder(tmp_path: Path) -> None:
    found = save_merged(adapted(), tmp_path / "merged")
    assert "every tensor equal to the merged model's" in found.check
    # Outputs are not compared to the bit: kernels may round by where in memory a file's tensors come to lie.
    assert found.max_difference is not None
    assert found.max_difference < 1e-6


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mode='compact': .* SHiRA format.*Use mode='padded'"):
        to_hf_peft(adapted(), tmp_path / "x", mode="compact")
    dense = bert()
    inject(dense, SparseBudget(density=0.99), [r"encoder\.layer\..*(query|key|value|dense)"])
    with pytest.raises(ValueError, match=r"r=10, which '.*dense' needs, is more than .* of 16 x 16 can have"):
        to_hf_peft(dense, tmp_path / "x")
    with pytest.raises(ValueError, match="no entry of any adapter is open"):
        to_hf_peft(adapted(close=1000), tmp_path / "x")
    net = bert()
    inject(net, SparseBudget(density=0.1), ["word_embeddings"])
    with pytest.raises(TypeError, match=r"word_embeddings' cannot be written for PEFT, whose SHiRA takes nn\.Linear"):
        to_hf_peft(net, tmp_path / "x")
    with pytest.raises(ValueError, match=r"has adapters. Take them out first, with eject or merge"):
        SparseSwitch(net)
    low = bert()
    inject(low, partial(LoRA, rank=2))
    with pytest.raises(TypeError, match="LoRA changes more than some entries of a weight"):
        SparseAdapter.of(low)
    assert not (tmp_path / "x").exists()

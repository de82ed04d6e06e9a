"""Budgets over many layers: counts, the targets where nobody names any, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_peft import RankBudget, SparseBudget, SpaRTA, eject, inject
from lightning_peft.surgery.layers import adapters


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    with torch.random.fork_rng(devices=[]):
        return BertForSequenceClassification(config)


def counts(model: nn.Module, budget: SparseBudget, targets: list[str] | None = None) -> dict[str, int]:
    inject(model, budget, targets)
    try:
        return {name: adapter.delta.numel() for name, adapter in adapters(model).items()}
    finally:
        eject(model)


def test_property_7_the_sum_is_what_was_asked_for(bert: nn.Module) -> None:
    head = sum(p.numel() for p in bert.classifier.parameters())  # type: ignore[union-attr]
    total = sum(p.numel() for p in bert.parameters()) - head
    for budget, wanted in (
        (SparseBudget(sparsity=0.99), 0.01 * total),
        (SparseBudget(parameters=200), 200),
        (SparseBudget(density=0.1), 0.1 * 4 * 256),
    ):
        found = counts(bert, budget)
        assert list(found) == [
            f"bert.encoder.layer.{i}.attention.{part}" for i in (0, 1) for part in ("self.value", "output.dense")
        ]
        assert abs(sum(found.values()) - wanted) <= len(found)
    # In other layers too, of different sizes: every one has the same share.
    found = counts(bert, SparseBudget(parameters=600), [r"encoder\.layer\..*(query|key|value|dense)"])
    assert len(found) == 12
    assert abs(sum(found.values()) - 600) <= 12
    assert found["bert.encoder.layer.0.intermediate.dense"] / found["bert.encoder.layer.0.attention.self.key"] == (
        pytest.approx(24 / 16, rel=0.05)
    )


def test_arguments_reach_the_adapters(bert: nn.Module) -> None:
    inject(bert, SparseBudget(density=0.1, seed=3, kernel="dense"))
    try:
        found = list(adapters(bert).values())
        assert all(isinstance(a, SpaRTA) and (a.seed, a.kernel, a.density) == (3, "dense", 0.1) for a in found)
        assert len(RankBudget.of(bert)) == 4
    finally:
        eject(bert)


def test_budgets_that_cannot_be(bert: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"exactly one of density, sparsity and parameters. Got none"):
        SparseBudget()
    with pytest.raises(ValueError, match=r"Got density=0.1, parameters=3"):
        SparseBudget(0.1, parameters=3)
    with pytest.raises(ValueError, match=r"give a sparsity of at least 0\.\d+, or more targets"):
        inject(bert, SparseBudget(sparsity=0.5))
    with pytest.raises(ValueError, match=r"parameters=9,999 cannot be had: the 4 targets have 1,024 entries"):
        inject(bert, SparseBudget(parameters=9999))
    assert not adapters(bert)
    with pytest.raises(TypeError, match=r"SparseBudget plans over all layers .* build SpaRTA around this one layer"):
        SparseBudget(0.1)(nn.Linear(2, 2))

"""Rows of `accuracy.py` that train a few entries of the weights, drawn or chosen, and full fine-tuning.

Rank stands for a number here: that of LoRA's parameters at this rank, in the same layers. So every row trains as many
scalars as LoRA does, beside the head; full fine-tuning trains all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accuracy_methods import METHODS, Method, Prepared
from torch import nn

from lightning_peft.modules import TextClassifier

LINEARS = r"encoder\.layer\..*\.(query|key|value|dense)"
_RATES = (1e-3, 2e-3)


def equal_count(model: nn.Module, rank: int) -> int:
    """Parameters of LoRA of this rank in all linear layers of the encoder."""
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "encoder.layer." in n]
    return rank * sum(m.in_features + m.out_features for m in linears)


def _sparta(**changes: Any) -> Callable[[TextClassifier, int, int], Prepared]:
    def build(classifier: TextClassifier, steps: int, rank: int) -> Prepared:
        from lightning_peft import presets

        options = {"targets": [LINEARS]} | changes
        callbacks = presets.sparta(parameters=equal_count(classifier.model, rank), **options)
        return Prepared(callbacks, adapter_bytes=lambda: _saved_bytes(classifier))

    return build


def _saved_bytes(classifier: TextClassifier) -> int:
    from lightning_peft import SparseAdapter

    with tempfile.TemporaryDirectory() as folder:
        return SparseAdapter.of(classifier).save(Path(folder) / "adapter.safetensors")


def full(classifier: TextClassifier, steps: int, rank: int) -> Prepared:
    """Everything trains."""
    return Prepared(adapter_bytes=lambda: sum(p.numel() * 4 for p in classifier.parameters() if p.requires_grad))


def _settings(**own: Any) -> Callable[[int], Mapping[str, Any]]:
    return lambda rank: {"as many parameters as LoRA of rank": rank, "targets": "encoder linears"} | own


SPARSE: dict[str, Method] = {
    "full": Method("full fine-tuning", full, lambda rank: {"trained": "all"}, rates=(1e-4, 2e-4)),
    "sparta": Method("SpaRTA", _sparta(), _settings(entries="random"), rates=_RATES),
    "sparta-value-output": Method(
        "SpaRTA, value and output projections alone",
        _sparta(targets=None),
        lambda rank: {"as many parameters as LoRA of rank": rank, "targets": "value and output", "entries": "random"},
        seeds=(0,),
        rates=_RATES,
    ),
    "sparta-magnitude": Method(
        "largest weights", _sparta(start="magnitude"), _settings(entries="magnitude"), rates=_RATES
    ),
    "sparta-gradient": Method(
        "largest gradients at the start", _sparta(start="gradient"), _settings(entries="gradient"), rates=_RATES
    ),
    "sparta-regrow": Method(
        "random, drop and regrow",
        _sparta(regrow=0.2),
        _settings(entries="random, drop and regrow", share=0.2, interval=20),
        rates=_RATES,
    ),
}
SHOWN = {"frozen": METHODS["frozen"], "lora": replace(METHODS["lora"], rates=_RATES)} | SPARSE
"""The rows of the sparse page: two rates are searched, and the one beyond the better."""

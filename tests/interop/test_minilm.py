"""All ways out of the adapters, on a real encoder and 64 texts."""

from __future__ import annotations

import copy
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_peft.adapters import DynamicDoRA
from lightning_peft.export import compact, merge
from lightning_peft.interop import save_merged, to_hf_peft
from lightning_peft.rank.budget import RankBudget
from lightning_peft.surgery import eject, inject

peft = pytest.importorskip("peft", reason="lightning-peft[hf] is not installed")

TEXTS = [
    f"{who} {did} {what} {when}"
    for who in ("The central bank", "A grain exporter", "The oil company", "Our new chairman")
    for did in ("raised", "cut", "announced", "will not publish")
    for what in ("its interest rate", "quarterly earnings of 12.5 mln dlrs")
    for when in ("today.", "by 3 pct in the second quarter of 1987, analysts at three brokerage houses said on Monday.")
]
RANK = 6


@pytest.fixture(scope="module")
def folder() -> str:
    examples = Path(__file__).parents[2] / "examples" / "reuters" / "inputs.py"
    try:
        found: str = runpy.run_path(str(examples))["minilm_folder"]()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    return found


@pytest.mark.slow
def test_every_way_out_keeps_the_logits_of_64_texts(folder: str) -> None:
    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    assert len(batch["input_ids"]) == 64

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            out: Tensor = model.eval()(**batch).logits
        return out

    def apart(model: nn.Module) -> float:
        return (logits(model) - wanted).abs().max().item()

    fresh = partial(AutoModelForSequenceClassification.from_pretrained, folder, num_labels=8)
    model: Any = fresh()
    plain, base = logits(model), copy.deepcopy(model.state_dict())
    inject(model, partial(DynamicDoRA, rank=RANK))
    for i, site in enumerate(RankBudget.of(model).values()):
        assert site.gate.gain is not None
        nn.init.normal_(site.gate.gain, std=0.5)
        site.gate.keep(torch.randperm(RANK) < i % (RANK + 1))
    ranks = RankBudget.of(model).ranks()
    assert set(ranks.values()) == set(range(RANK + 1))
    wanted = logits(model)
    assert (wanted - plain).abs().max() > 0.01

    for mode in ("padded", "compact", "folded"):
        report = to_hf_peft(model, mode, mode)
        assert report.max_difference <= 1e-5
        assert apart(peft.PeftModel.from_pretrained(fresh(), mode)) <= 1e-5
    assert save_merged(model, "merged").max_difference <= 1e-5
    assert apart(AutoModelForSequenceClassification.from_pretrained("merged")) <= 1e-5
    ejected, compacted = copy.deepcopy(model), copy.deepcopy(model)
    merge(model)
    assert apart(model) <= 1e-5
    assert compact(compacted) == ranks
    assert apart(compacted) <= 1e-5
    eject(ejected)
    assert all(torch.equal(tensor, base[name]) for name, tensor in ejected.state_dict().items())
    assert torch.equal(logits(ejected), plain)

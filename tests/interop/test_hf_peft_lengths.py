"""Trained lengths of rows go into PEFT's DoRA, and layers without them get lengths that change nothing."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft import Budget, LoRA, RankBudget, WeightDecomposed, inject, plan, save_merged, to_hf_peft
from lightning_peft.adapters.base import Adapter
from lightning_peft.interop.layout import Mode
from lightning_peft.interop.targets import find_targets
from lightning_peft.interop.verify import WEIGHTS, by_reading

peft = pytest.importorskip("peft", reason="lightning-peft[hf] is not installed")

MODES: list[Mode] = ["padded", "compact", "folded"]
DECOMPOSED = partial(WeightDecomposed, rank=4, alpha=6.0)


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def bert() -> nn.Module:
    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=64
    )
    return hf.BertForSequenceClassification(config).eval()


def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, n_positions=32, vocab_size=64, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config).eval()


def mixed(layer: nn.Module) -> Adapter:
    """Decomposed layers with and without gains, and plain ones."""
    if isinstance(layer, nn.Embedding):
        return WeightDecomposed(layer, rank=3)
    if layer.out_features == 48:
        return LoRA(layer, rank=3)
    return WeightDecomposed(layer, rank=4, components="dynamic_dora")


def moved(module: nn.Module) -> nn.Module:
    """The module as training might leave it, with another rank in every layer, 0 among them."""
    budget = RankBudget.of(module)
    with torch.no_grad():
        for i, site in enumerate(budget.values()):
            for _, parameter in site.adapter.own_parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
            site.gate.keep(torch.arange(len(site.gate)) < i % (len(site.gate) + 1))
    return module


@torch.no_grad()
def outputs(module: nn.Module) -> Tensor:
    logits: Tensor = module(input_ids=torch.arange(24).view(4, 6)).logits
    return logits


@pytest.mark.parametrize("mode", MODES)
def test_stock_peft_computes_the_same_of_a_mixed_model(mode: Mode) -> None:
    base = bert()
    model = copy.deepcopy(base)
    inject(model, mixed, ["query", "value", "intermediate.dense", "word_embeddings"], train=[])
    moved(model)
    ranks = RankBudget.of(model).ranks()
    assert {type(site.adapter).__name__ for n, site in RankBudget.of(model).items() if ranks[n]} == {
        "LoRA", "WeightDecomposed",
    }  # fmt: skip
    assert ranks["bert.embeddings.word_embeddings"] == 0
    report = to_hf_peft(model, "folder", mode, head=False, check="peft")
    assert report.max_difference <= 1e-6
    assert report.left_out == ()
    assert any("save_merged" in note for note in report.notes)
    assert json.loads(Path("folder/adapter_config.json").read_text())["use_dora"] is True
    tensors = load_file(f"folder/{WEIGHTS}")
    assert sum(key.endswith("lora_magnitude_vector") for key in tensors) == len(ranks)
    if mode != "padded":  # PEFT knows no rank 0
        assert tensors["base_model.model.bert.embeddings.word_embeddings.lora_embedding_A"].tolist() == [[0.0] * 64]
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), "folder").eval()
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-6, atol=1e-6)
    assert (outputs(base) - outputs(model)).abs().max() > 1e-3
    assert to_hf_peft(model, "read", mode, head=False, check="files").max_difference <= 1e-6


def test_of_transformers_conv1d_and_an_embedding() -> None:
    model = gpt2()
    inject(model, DECOMPOSED, ["wte", "c_attn", "c_fc", "c_proj"], train=[])
    report = to_hf_peft(moved(model), "folder", "compact", check="peft")
    assert report.max_difference <= 1e-6
    assert "outputs compared" in report.check


def test_of_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten(1), nn.Linear(54, 5))
    inject(model, partial(WeightDecomposed, rank=3), ["0", "2", "4"], train=[])
    report = to_hf_peft(moved(model).eval(), "folder", "compact", check="peft", inputs=torch.randn(2, 3, 8, 8))
    assert report.max_difference <= 1e-6
    assert load_file(f"folder/{WEIGHTS}")["base_model.model.0.lora_magnitude_vector"].shape == (1, 8, 1, 1)


def test_lengths_alone_are_worth_a_folder() -> None:
    model = bert()
    inject(model, DECOMPOSED, ["query"], train=[])
    for site in RankBudget.of(moved(model)).values():
        site.gate.keep(torch.zeros(4))
    report = to_hf_peft(model, "folder", "compact", head=False, check="peft")
    assert report.max_difference <= 1e-6
    assert "2 with ranks 0 to 0" in str(report)
    assert save_merged(model, "merged").left_out == ()


def test_without_lengths_nothing_is_written_of_them() -> None:
    model = bert()
    inject(model, partial(LoRA, rank=3), ["query"], train=[])
    to_hf_peft(moved(model), "folder", head=False)
    assert json.loads(Path("folder/adapter_config.json").read_text())["use_dora"] is False
    assert not any("magnitude" in key for key in load_file(f"folder/{WEIGHTS}"))


@pytest.mark.parametrize("spoil", ["changed", "missing"])
def test_the_files_are_read_for_their_lengths(spoil: str) -> None:
    model = bert()
    inject(model, DECOMPOSED, ["query"], train=[])
    to_hf_peft(moved(model), "folder", head=False, check="files")
    tensors = load_file(f"folder/{WEIGHTS}")
    key = next(key for key in tensors if key.endswith("lora_magnitude_vector"))
    length = tensors.pop(key)
    if spoil == "changed":
        tensors[key] = length * (1 + 1e-3)
    save_file(tensors, f"folder/{WEIGHTS}")
    with pytest.raises(RuntimeError, match="differs by" if spoil == "changed" else "has no tensor"):
        by_reading(Path("folder"), find_targets(model), {})


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.attention(x, x, x)[0])
        return y


def test_attentions_are_refused() -> None:
    model = Attending()
    inject(model, DECOMPOSED, ["attention"], train=[])
    with pytest.raises(TypeError, match=r"trains the lengths .* does not know on a MultiheadAttention"):
        to_hf_peft(moved(model), "folder")
    model = Attending()
    inject(model, lambda m: LoRA(m, rank=2) if m.out_features == 24 else DECOMPOSED(m), ["in_proj", "out"], train=[])
    with pytest.raises(TypeError, match=r"'attention' is a MultiheadAttention, and other layers train the lengths"):
        to_hf_peft(moved(model), "folder")
    assert not Path("folder").exists()


@pytest.mark.parametrize("kind", [LoRA, WeightDecomposed])
def test_a_row_of_zeros_is_refused_where_peft_would_divide_by_it(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[3] = 0
    first = model[0]
    inject(model, lambda m: kind(m, rank=2) if m is first else WeightDecomposed(m, rank=2), ["0", "1"], train=[])
    with torch.no_grad():
        for site in RankBudget.of(model).values():
            site.adapter.A.normal_()
    with pytest.raises(TypeError, match=r"layer '0' has a row of zeros in its weight"):
        to_hf_peft(model, "folder")


@pytest.mark.parametrize("kind", [DECOMPOSED, mixed])
def test_the_size_is_known_before(kind: Any) -> None:
    model = bert()
    inject(model, kind, ["query", "intermediate.dense"], train=[])
    expected = plan(model)
    with torch.no_grad():
        for site in RankBudget.of(model).values():
            for _, parameter in site.adapter.own_parameters():
                parameter.add_(0.1)
    assert to_hf_peft(model, "folder", "compact", head=False).bytes == expected.start.exported
    assert expected.start.adapter_parameters == sum(
        p.numel() for site in RankBudget.of(model).values() for _, p in site.adapter.own_parameters()
    )


def test_a_plan_keeps_the_lengths_whatever_the_rank() -> None:
    model = bert()
    inject(model, DECOMPOSED, ["query"], train=[])
    final = plan(model, final=Budget(share=0.5)).final
    assert final is not None
    assert final.adapter_parameters == 2 * (2 * (32 + 32) + 32)


def test_a_budget_in_megabytes_is_the_size_of_the_file() -> None:
    model = bert()
    inject(model, partial(WeightDecomposed, rank=8), ["query", "value", "dense"], train=[])
    budget = RankBudget.of(model)
    final = Budget(megabytes=0.025)
    left = final.amount(budget)
    with torch.no_grad():
        for site in budget.values():
            site.adapter.B.normal_()
            n = min(5, left // site.gate.cost)
            left -= n * site.gate.cost
            site.gate.keep(torch.arange(8) < n)
    assert all(budget.ranks().values())
    size = to_hf_peft(model, "adapter", "compact", head=False).bytes
    header = sum(3 * (len(name) + 120) for name in budget)
    assert 0.025e6 - 4 * left - header < size <= 0.025e6

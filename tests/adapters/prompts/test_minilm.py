"""A prompt in front of a real English encoder that classifies."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_peft import SoftPrompt

EXAMPLES = Path(__file__).parents[3] / "examples"
TEXTS = ["The capital of France is", "Water boils when it is heated, and it"]


def test_minilm_learns_from_its_prompt_alone() -> None:
    try:
        name = runpy.run_path(str(EXAMPLES / "reuters" / "inputs.py"))["minilm_folder"]()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(name)
    torch.manual_seed(0)
    adapter = SoftPrompt(AutoModelForSequenceClassification.from_pretrained(name, num_labels=2), length=8).eval()
    with torch.no_grad():
        both = adapter(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
        alone = torch.cat([adapter(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-4)
    batch = {**tokenizer(TEXTS, padding=True, return_tensors="pt"), "labels": torch.tensor([0, 1])}
    optimizer = torch.optim.AdamW([adapter.P], lr=0.2)
    losses = []
    for _ in range(15):
        loss = adapter(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

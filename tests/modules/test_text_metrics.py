"""Metrics of written texts: against torchmetrics' own, and on texts whose values are known."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.text import chrf_score, rouge_score, sacre_bleu_score

from lightning_peft.modules.text_metrics import TextMetrics

WRITTEN = ["the cat sat on the mat", "a red car", "no", "the sky is very blue today"]
WANTED = ["the cat sat on a mat", "a red car", "yes", "the sky is blue today"]
ALL = ("exact_match", "bleu", "chrf", "rouge1", "rouge2", "rougeL")


def test_values_are_those_of_all_texts_at_once() -> None:
    metrics = TextMetrics(ALL)
    for part in (slice(0, 3), slice(3, 4)):
        metrics.update(WRITTEN[part], WANTED[part])
    found = metrics.compute()
    references = [[text] for text in WANTED]
    rouge = rouge_score(WRITTEN, WANTED, rouge_keys=("rouge1", "rouge2", "rougeL"))
    assert found == {
        "exact_match": torch.tensor(0.25),
        "bleu": sacre_bleu_score(WRITTEN, references),
        "chrf": chrf_score(WRITTEN, references, n_word_order=0),
        **{name: pytest.approx(rouge[f"{name}_fmeasure"].item(), rel=1e-6) for name in ALL[3:]},
    }
    assert found["rouge1"] == pytest.approx((5 / 6 + 1 + 0 + 10 / 11) / 4, abs=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_texts_as_wanted_have_one_and_others_none(name: str) -> None:
    metrics = TextMetrics([name])  # type: ignore[list-item]
    metrics.update(WANTED[:1], WANTED[:1])
    assert metrics.compute()[name] == pytest.approx(1.0, abs=1e-6)
    metrics.reset()
    metrics.update(["zzzz"], WANTED[:1])
    assert metrics.compute()[name] == 0


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metrics has 'rouge': choose among 'exact_match', 'bleu', 'chrf', 'rouge1'"):
        TextMetrics(["rouge"])  # type: ignore[list-item]

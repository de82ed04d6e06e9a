"""Noise on embeddings where labels are few: random position noise, and what it is compared with, beside none.

    python benchmarks/low_data_noise.py run --method rpn --data r8 --examples 100 --lr 1e-3 [--search] [--trial N]
    python benchmarks/low_data_noise.py plan [--data r8,20ng] [--methods none,rpn]
    python benchmarks/low_data_noise.py table [--out docs/low-data-noise.md]

The claim to test is that of random position noise: it helps, most of all where labels are few. `plan` runs what is
missing; how runs, searches and the table go is in `few_labels.py`.
"""

from __future__ import annotations

from typing import Any

import few_labels
from few_labels import ENCODER, Method, Study
from lightning.pytorch import Callback

from lightning_peft import AdversarialNoise, GaussianNoise, RandomPositionNoise, RDrop, TokenCutoff, presets
from lightning_peft.modules import TextClassifier

RANK, ALPHA = 8, 16
OFFICIAL: dict[str, Any] = {
    "p": 0.3, "passes": 3, "scope": "batch", "sources": "permutation", "padding": "noise", "causal": False,
}  # fmt: skip
SAMPLE: dict[str, Any] = {"p": 0.1, "passes": 1, "scope": "sample"}
ONE: dict[str, Any] = {"mode": "virtual", "passes": 1}
ABOUT = (
    "100 and 500 labelled texts in all, as even over the classes as their number allows, drawn by the seed; five "
    "seeds; and all texts of R8 with one. MiniLM-L6 with a new head, 200 steps of 8 texts (700 for all of R8, one "
    "epoch), AdamW with warm-up and decay, LoRA of rank 8 on all linear layers of the encoder, embeddings frozen; "
    "everything but what the row names is the same for every row. A row with a virtual pass trains on the sum of the "
    "clean loss and the noisy ones."
)


def none(classifier: TextClassifier, _: float) -> list[Callback]:
    """LoRA alone."""
    return [*presets.lora(rank=RANK, alpha=ALPHA, targets=ENCODER)]


def official(classifier: TextClassifier, _: float) -> list[Callback]:
    """Random position noise as in the paper's code: three virtual passes, a permutation over the batch."""
    return [*none(classifier, _), RandomPositionNoise(**OFFICIAL)]


def sample(classifier: TextClassifier, _: float) -> list[Callback]:
    """Random position noise within the example, one virtual pass."""
    return [*none(classifier, _), RandomPositionNoise(**SAMPLE)]


def gaussian(classifier: TextClassifier, sigma: float) -> list[Callback]:
    """Normal noise, one virtual pass."""
    return [*none(classifier, sigma), GaussianNoise(sigma, **ONE)]


def cutoff(classifier: TextClassifier, p: float) -> list[Callback]:
    """Zeros in the place of tokens, one virtual pass."""
    return [*none(classifier, p), TokenCutoff(p, **ONE)]


def r_drop(classifier: TextClassifier, alpha: float) -> list[Callback]:
    """Two passes through dropout that are to agree."""
    return [*none(classifier, alpha), RDrop(alpha)]


def fgm(classifier: TextClassifier, step: float) -> list[Callback]:
    """The clean loss, and that of one step up."""
    return [*none(classifier, step), AdversarialNoise(step)]


def freelb(classifier: TextClassifier, step: float) -> list[Callback]:
    """Three passes around a random start, within three steps of it."""
    noise = AdversarialNoise(step, passes=3, start=step, radius=3 * step, reduction="mean")
    return [*none(classifier, step), noise]


OWN = {"rank": RANK, "alpha": ALPHA}
STUDY = Study(
    title="Noise on embeddings where labels are few",
    script=__file__,
    about=ABOUT,
    data={"r8": few_labels.R8, "20ng": few_labels.NEWSGROUPS},
    methods={
        "none": Method("LoRA", none, OWN, rates=(1e-3, 2e-3, 4e-3)),
        "rpn-official": Method("+ RPN, the paper's form: p = 0.3, K = 3", official, OWN | OFFICIAL),
        "rpn": Method("+ RPN within the example: p = 0.1, K = 1", sample, OWN | SAMPLE),
        "gaussian": Method(
            "+ Gaussian noise, K = 1", gaussian, OWN | ONE, strengths=(0.005, 0.01, 0.02), strength="sigma"
        ),
        "cutoff": Method("+ token cutoff, K = 1", cutoff, OWN | ONE, strengths=(0.05, 0.1, 0.2), strength="p"),
        "r-drop": Method("+ R-Drop", r_drop, OWN, strengths=(0.3, 1.0, 3.0), strength="alpha"),
        "fgm": Method("+ FGM", fgm, OWN | {"passes": 2}, strengths=(0.1, 0.3, 0.9), strength="step"),
        "freelb": Method(
            "+ FreeLB, 3 passes", freelb, OWN | {"passes": 3}, strengths=(0.03, 0.1, 0.3), strength="step"
        ),
    },
    examples=(100, 500, 0),
    search_examples=100,
    steps=200,
    base="none",
    whole={"r8": 700},
    costs=True,
)

if __name__ == "__main__":
    few_labels.main(STUDY, __doc__)

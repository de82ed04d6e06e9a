"""Noise on embeddings where labels are few: random position noise, and what it is compared with, beside none.

    python benchmarks/low_data_noise.py run --method rpn --data r8 --examples 100 --lr 1e-3 [--search] [--trial N]
    python benchmarks/low_data_noise.py plan [--data r8,20ng] [--methods none,rpn]
    python benchmarks/low_data_noise.py table [--out docs/low-data-noise.md]

The claim to test is that of random position noise: it helps, most of all where labels are few. `plan` runs what is
missing, some five hours of one thread; how runs, searches and the table go is in `few_labels.py`.
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
FORMS: dict[str, dict[str, Any]] = {
    "gaussian": {"size": 0.01},
    "cutoff": {"p": 0.1},
    "r-drop": {"alpha": 1.0},
    "fgm": {"step": 0.3, "passes": 2},
    "freelb": {"step": 0.1, "start": 0.1, "radius": 0.3, "passes": 3, "reduction": "mean"},
}
ABOUT = (
    "100 and 500 labelled texts in all, as even over the classes as their number allows, drawn by the seed; five "
    "seeds; and all texts of R8 with one. MiniLM-L6 with a new head, texts cut to 64 tokens, 40 steps of 8 texts (100 "
    "of 500 texts, 343 of all of R8, which is half an epoch), AdamW with warm-up and decay, LoRA of rank 8 on all "
    "linear layers of the encoder, embeddings frozen; everything but what the row names is the same for every row. A "
    "row with a virtual pass trains on the sum of the clean loss and the noisy ones. What this cannot tell: the "
    "learning rate is searched for LoRA alone, once with few texts and once with all, and is that of every row, and no "
    "row's own number is searched (of the noise on embeddings, those of the papers or near them; steps of FGM and "
    "FreeLB are our guess), so a row may do better with its own. So short a training leaves noise little to prevent, "
    "and with 300 test texts one run is known to some three points."
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


def gaussian(classifier: TextClassifier, _: float) -> list[Callback]:
    """Normal noise, one virtual pass."""
    return [*none(classifier, _), GaussianNoise(**FORMS["gaussian"], **ONE)]


def cutoff(classifier: TextClassifier, _: float) -> list[Callback]:
    """Zeros in the place of tokens, one virtual pass."""
    return [*none(classifier, _), TokenCutoff(**FORMS["cutoff"], **ONE)]


def r_drop(classifier: TextClassifier, _: float) -> list[Callback]:
    """Two passes through dropout that are to agree."""
    return [*none(classifier, _), RDrop(**FORMS["r-drop"])]


def fgm(classifier: TextClassifier, _: float) -> list[Callback]:
    """The clean loss, and that of one step up."""
    return [*none(classifier, _), AdversarialNoise(**FORMS["fgm"])]


def freelb(classifier: TextClassifier, _: float) -> list[Callback]:
    """Three passes around a random start, within three steps of it."""
    return [*none(classifier, _), AdversarialNoise(**FORMS["freelb"])]


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
        "gaussian": Method("+ Gaussian noise: sigma = 0.01, K = 1", gaussian, OWN | ONE | FORMS["gaussian"]),
        "cutoff": Method("+ token cutoff: p = 0.1, K = 1", cutoff, OWN | ONE | FORMS["cutoff"]),
        "r-drop": Method("+ R-Drop: alpha = 1", r_drop, OWN | {"r_drop": FORMS["r-drop"]}),
        "fgm": Method("+ FGM: step 0.3", fgm, OWN | FORMS["fgm"]),
        "freelb": Method("+ FreeLB: step 0.1, 3 passes", freelb, OWN | FORMS["freelb"]),
    },
    examples=(100, 500, 0),
    search_examples=100,
    steps=40,
    base="none",
    longer={500: 100},
    whole={"r8": 343},
    tested=300,
    costs=True,
)

if __name__ == "__main__":
    few_labels.main(STUDY, __doc__)

"""Low-resource fine-tuning: LoRA alone, and with dropout, weight decay, VIB, InfoNCE or a PAC-Bayes term.

    python benchmarks/low_resource.py run --method vib --data r8 --examples 100 --lr 1e-3 --strength 1e-4 [--search]
    python benchmarks/low_resource.py plan [--data r8,20ng] [--methods lora,vib]
    python benchmarks/low_resource.py table [--out docs/low-resource.md]

The claim to test is that of the variational information bottleneck: it helps where labels are few. `plan` runs what is
missing; how runs, searches and the table go is in `few_labels.py`. About 225 runs, and four hours of one core.
"""

from __future__ import annotations

from functools import partial

import few_labels
from few_labels import ENCODER, Method, Study
from lightning.pytorch import Callback

from lightning_peft import LoRA, MutualInformation, PACBayes, Regularization, presets
from lightning_peft.modules import TextClassifier
from lightning_peft.regularizers import Warmup

RANK, ALPHA = 8, 16
ABOUT = (
    "50, 100 and 500 labelled texts in all, as even over the classes as their number allows, drawn by the seed; five "
    "seeds. MiniLM-L6 with a new head, texts cut at 64 tokens, 200 steps of 8 texts, AdamW with warm-up and decay, "
    "LoRA of rank 8 on all linear layers of the encoder; everything but what the row names is the same for every row."
)


def lora(classifier: TextClassifier, _: float) -> list[Callback]:
    """LoRA alone."""
    return [*presets.lora(rank=RANK, alpha=ALPHA, targets=ENCODER)]


def dropout(classifier: TextClassifier, p: float) -> list[Callback]:
    """Dropout on the adapters' inputs."""
    return [*presets.lora(rank=RANK, alpha=ALPHA, dropout=p, targets=ENCODER)]


def weight_decay(classifier: TextClassifier, decay: float) -> list[Callback]:
    """AdamW's decay, of adapters and head, in place of the protocol's."""
    classifier.weight_decay = decay
    return lora(classifier, decay)


def vib(classifier: TextClassifier, beta: float) -> list[Callback]:
    """The paper's bottleneck of 128 numbers and 5 samples before the classifier.

    beta rises over the first half of the run, and not by the epoch as in the paper: at equal steps that would be more
    epochs, and a larger beta, the fewer examples there are.
    """
    rising = Warmup(beta, share=0.5)
    return [*presets.vib(adapter=partial(LoRA, rank=RANK, alpha=ALPHA), beta=rising, growth="none", targets=ENCODER)]


def info_nce(classifier: TextClassifier, weight: float) -> list[Callback]:
    """Information between the pooled features and the labels, by InfoNCE over the eight texts of a step."""
    term = MutualInformation(["pooler.dense"], classes=classifier.model.config.num_labels, weight=weight)
    return [*lora(classifier, weight), Regularization({"info_nce": term})]


def pac_bayes(classifier: TextClassifier, kl_weight: float) -> list[Callback]:
    """The PAC-Bayes objective f_classic with its KL made small: at full weight so few texts say nothing."""
    return [*lora(classifier, kl_weight), Regularization({"pac": PACBayes("f_classic", kl_weight=kl_weight)})]


OWN = {"rank": RANK, "alpha": ALPHA}
STUDY = Study(
    title="Low-resource fine-tuning",
    script=__file__,
    about=ABOUT,
    data={"r8": few_labels.R8, "20ng": few_labels.NEWSGROUPS},
    methods={
        "lora": Method("LoRA", lora, OWN, rates=(1e-3, 2e-3, 4e-3)),
        "dropout": Method("+ dropout", dropout, OWN, strengths=(0.1, 0.2, 0.4), strength="p"),
        "weight-decay": Method("+ weight decay", weight_decay, OWN, strengths=(0.1, 1.0, 10.0), strength="decay"),
        "vib": Method(
            "+ VIB",
            vib,
            OWN | {"features": 128, "beta": "rises over the first half"},
            strengths=(1e-4, 1e-3, 1e-2),
            strength="beta",
        ),
        "info-nce": Method(
            "+ InfoNCE of features and labels", info_nce, OWN, strengths=(0.03, 0.1, 0.3), strength="weight"
        ),
        "pac-bayes": Method(
            "+ PAC-Bayes, f_classic", pac_bayes, OWN, strengths=(1e-4, 1e-3, 1e-2), strength="weight of KL"
        ),
    },
    examples=(50, 100, 500),
    search_examples=100,
    steps=200,
    tested=500,
    base="lora",
)

if __name__ == "__main__":
    few_labels.main(STUDY, __doc__)

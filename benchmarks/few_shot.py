"""Few labelled examples: LoRA, VeRA, RLoRA, and RLoRA with a PAC-Bayes term, on Reuters R8 and 20 Newsgroups.

    python benchmarks/few_shot.py run --method rlora --data r8 --examples 32 --seed 0 --lr 4e-3 [--search] [--trial N]
    python benchmarks/few_shot.py plan [--data r8,20ng] [--methods lora,rlora]
    python benchmarks/few_shot.py table [--out docs/few-shot.md]

`plan` runs what is missing; how runs, searches and the table go is in `few_labels.py`.
"""

from __future__ import annotations

import few_labels
import torch
from few_labels import ENCODER, Method, Study
from lightning.pytorch import Callback

from lightning_peft import PACBayes, Regularization, presets
from lightning_peft.modules import TextClassifier

RANK = 256
VERA_RATES = (2e-3, 8e-3, 3.2e-2)
ABOUT = (
    "8, 16, 32 and 100 labelled texts in all, as even over the classes as their number allows, drawn by the seed; "
    "five seeds. The classes of 20 Newsgroups are the seven groups of its hierarchy (comp, rec, sci, ...): eight "
    "examples cannot tell twenty apart. Texts are cut at 64 tokens. MiniLM-L6 with a new head, 200 steps of 8 texts, "
    "AdamW with warm-up and decay, adapters on all linear layers of the encoder; everything but the adapters is the "
    "same for every row. At its full weight the term's divergence leaves nothing to be learned from so few texts: its "
    "weight is searched."
)


def lora(classifier: TextClassifier, _: float) -> list[Callback]:
    """This package's LoRA."""
    return [*presets.lora(rank=8, alpha=16, targets=ENCODER)]


def vera(classifier: TextClassifier, _: float) -> list[Callback]:
    """HF PEFT's VeRA."""
    from peft import TaskType, VeraConfig, get_peft_model

    linears = [n for n, m in classifier.model.named_modules() if isinstance(m, torch.nn.Linear) and "encoder.l" in n]
    config = VeraConfig(task_type=TaskType.SEQ_CLS, r=RANK, target_modules=linears)
    classifier.model = get_peft_model(classifier.model, config)
    return []


def rlora(classifier: TextClassifier, _: float) -> list[Callback]:
    """RLoRA of the rank that VeRA has."""
    return [*presets.rlora(rank=RANK, targets=ENCODER)]


def rlora_pac(classifier: TextClassifier, kl_weight: float) -> list[Callback]:
    """The same with a PAC-Bayes term."""
    return [*rlora(classifier, kl_weight), Regularization({"pac": PACBayes("f_classic", kl_weight=kl_weight)})]


STUDY = Study(
    title="Few labelled examples",
    script=__file__,
    about=ABOUT,
    data={"r8": few_labels.R8, "20ng": few_labels.NEWSGROUPS_TOP},
    methods={
        "lora": Method("LoRA, r = 8", lora, {"rank": 8, "alpha": 16}, (1e-3, 2e-3, 4e-3)),
        "vera": Method(f"VeRA (HF PEFT), r = {RANK}", vera, {"rank": RANK}, VERA_RATES),
        "rlora": Method(f"RLoRA, r = {RANK}", rlora, {"rank": RANK, "mode": "diag"}, VERA_RATES),
        "rlora-pac": Method(
            f"RLoRA, r = {RANK}, PAC-Bayes",
            rlora_pac,
            {"rank": RANK, "mode": "diag", "objective": "f_classic"},
            strengths=(1e-4, 1e-3, 1e-2),
            strength="weight of KL",
        ),
    },
    examples=(8, 16, 32, 100),
    search_examples=32,
    base="rlora",
)

if __name__ == "__main__":
    few_labels.main(STUDY, __doc__)

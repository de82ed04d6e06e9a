"""Mistakes with noise on embeddings, and with steps that are run several times."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from misuse.setups import LORA, Encoder, Rows, fit
from torch import Tensor, nn

from lightning_peft import (
    AdapterInjection,
    AdversarialNoise,
    GaussianNoise,
    PACBayes,
    RandomPositionNoise,
    RDrop,
    Regularization,
    TokenCutoff,
)


class Reader(Encoder):
    """With embeddings, of which the second is called."""

    def __init__(self, second: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 8)
        if second:
            self.kinds = nn.Embedding(3, 8)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        E = self.tokens((batch > 0).long())
        return self.classifier(self.norm(self.value(self.query(E)))).square().mean()


class Manual(Reader):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Normed(Reader):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(6)


class Lossless(Reader):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"logits": self.tokens((batch > 0).long())}


class Causal(nn.Module):
    """What a transformers model says of itself, without one."""

    config, is_causal = SimpleNamespace(), True

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)

    def get_input_embeddings(self) -> nn.Module:
        return self.words


class Speaks(Reader):
    def __init__(self) -> None:
        super().__init__()
        self.model = Causal()


class Whole(Reader):
    def forward(self, batch: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.norm(self.value(self.query(self.tokens((batch > 0).long())))))
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self(batch).square().mean()


ROWS: Rows = {
    "a share of noise above 1": (lambda: RandomPositionNoise(p=30), ValueError),
    "a scope that there is not": (lambda: RandomPositionNoise(scope="row"), ValueError),  # type: ignore[arg-type]
    "a permutation within an example": (lambda: RandomPositionNoise(sources="permutation"), ValueError),
    "noise of no pass": (lambda: RandomPositionNoise(passes=0), ValueError),
    "noise of a probability in passes of its own": (lambda: RandomPositionNoise(prob=0.5), ValueError),
    "several passes in the place of one": (lambda: GaussianNoise(passes=3), ValueError),
    "one token id to be protected": (lambda: TokenCutoff(protect_ids=2), TypeError),  # type: ignore[arg-type]
    "noise for a model without embeddings": (lambda: fit(Encoder(), RandomPositionNoise()), ValueError),
    "noise where there are two embeddings": (lambda: fit(Reader(second=True), RandomPositionNoise()), ValueError),
    "noise on an embedding that there is not": (
        lambda: fit(Reader(), RandomPositionNoise(embedding=["word_embeddings"])),
        ValueError,
    ),
    "noise on an embedding that is not called": (
        lambda: fit(Reader(second=True), RandomPositionNoise(embedding=["kinds"])),
        RuntimeError,
    ),
    "noise over the batch for a causal model": (
        lambda: fit(Speaks(), RandomPositionNoise(scope="batch")),
        MisconfigurationException,
    ),
    "passes of a module that optimizes by hand": (
        lambda: fit(Manual(), RandomPositionNoise()),
        MisconfigurationException,
    ),
    "passes of a step without a loss": (lambda: fit(Lossless(), RandomPositionNoise()), MisconfigurationException),
    "two callbacks that run the step again": (
        lambda: fit(Reader(), RandomPositionNoise(), AdversarialNoise()),
        MisconfigurationException,
    ),
    "copies of a batch beside batch norm": (
        lambda: fit(Normed(), RandomPositionNoise(execution="batched")),
        MisconfigurationException,
    ),
    "passes apart under a posterior": (
        lambda: fit(
            Reader(), AdapterInjection(LORA), Regularization({"pac": PACBayes(risk="loss")}), AdversarialNoise()
        ),
        MisconfigurationException,
    ),
    "adversarial noise of one pass": (lambda: AdversarialNoise(passes=1), ValueError),
    "a perturbation of no length": (lambda: AdversarialNoise(step=0.0), ValueError),
    "R-Drop that nobody weighs": (lambda: RDrop(alpha=0.0), ValueError),
    "R-Drop of a module with several children": (lambda: fit(Reader(), RDrop()), ValueError),
    "R-Drop without dropout": (lambda: fit(Whole(), RDrop(of="")), UserWarning),
}

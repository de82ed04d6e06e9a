"""How near written texts come to those that were wanted, by torchmetrics and without anything to download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import CHRFScore, SacreBLEUScore

TextMetric = Literal["exact_match", "bleu", "chrf", "rouge1", "rouge2", "rougeL"]
"""Share of texts that are as wanted; sacreBLEU, not smoothed; chrF; F-measures of ROUGE, without stemming."""


class ExactMatch(Metric):
    """Share of texts that are the wanted ones, spaces at both ends aside.

    Example:
        >>> metric = ExactMatch()
        >>> metric.update(["yes", " no"], ["yes", "maybe"])
        >>> metric.compute()
        tensor(0.5000)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    right: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, written: Sequence[str], wanted: Sequence[str]) -> None:
        """Add a batch."""
        # Not in place: states that were moved in inference mode could not be changed in training.
        self.right = self.right + sum(a.strip() == b.strip() for a, b in zip(written, wanted, strict=True))
        self.total = self.total + len(written)

    def compute(self) -> Tensor:
        """The share."""
        return self.right / self.total


class Rouge(Metric):
    """Means of torchmetrics' ROUGE F-measures over all texts, without stemming.

    The sums are kept, and not a number for each text as torchmetrics' own metric does: two such metrics that are both
    empty look alike to a module that lists its parts, and one of them is left out.

    Args:
        keys: which, such as "rougeL".
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    sums: Tensor
    total: Tensor

    def __init__(self, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.keys = keys
        self.add_state("sums", torch.zeros(len(keys)), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, written: Sequence[str], wanted: Sequence[str]) -> None:
        """Add a batch."""
        found = rouge_score(list(written), list(wanted), rouge_keys=self.keys)
        means = torch.stack([torch.as_tensor(found[f"{key}_fmeasure"]) for key in self.keys])
        # Not in place: states that were moved in inference mode could not be changed in training.
        self.sums = self.sums + means.to(self.sums) * len(written)
        self.total = self.total + len(written)

    def compute(self) -> dict[str, Tensor]:
        """The means by name."""
        return dict(zip(self.keys, self.sums / self.total, strict=True))


class TextMetrics(torch.nn.Module):
    """Metrics of written texts by name, each between 0 and 1; larger is better.

    Args:
        names: which.
    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, names: Sequence[TextMetric]) -> None:
        super().__init__()
        if unknown := [name for name in names if name not in get_args(TextMetric)]:
            raise ValueError(f"metrics has {unknown[0]!r}: choose among {', '.join(map(repr, get_args(TextMetric)))}.")
        self.names = tuple(names)
        rouge = tuple(name for name in self.names if name.startswith("rouge"))
        made: dict[str, Metric] = {
            "exact_match": ExactMatch(),
            "bleu": SacreBLEUScore(),
            "chrf": CHRFScore(n_word_order=0),  # chrF; torchmetrics' default is chrF++
            "rouge": Rouge(rouge),
        }
        wanted = {"rouge" if name in rouge else name for name in self.names}
        self.parts = torch.nn.ModuleDict({name: metric for name, metric in made.items() if name in wanted})

    def __len__(self) -> int:
        return len(self.names)

    def reset(self) -> None:
        """Forget all texts."""
        each: Any
        for each in self.parts.values():
            each.reset()

    def update(self, written: Sequence[str], wanted: Sequence[str]) -> None:
        """Add a batch of texts, and those that were wanted."""
        each: Any
        for name, each in self.parts.items():
            # BLEU and chrF take several references for each text.
            each.update(list(written), [[text] for text in wanted] if name in ("bleu", "chrf") else list(wanted))

    def compute(self) -> Mapping[str, Tensor]:
        """All values, over the texts of all processes."""
        found: dict[str, Tensor] = {}
        each: Any
        for name, each in self.parts.items():
            value = each.compute()
            if name == "rouge":
                found |= value
            else:
                found[name] = value
        return {name: found[name] for name in self.names}

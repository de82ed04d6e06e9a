"""The laws of importances and policies find what they are made to find."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft import Budget, Cubic, NormShare, RankBudget, RankPolicy, Site, Taylor
from lightning_peft.testing import (
    IMPORTANCE_LAWS,
    POLICY_LAWS,
    ImportanceTrial,
    PolicyTrial,
    check_importance,
    check_policy,
)


class Signed(Taylor):
    def measure(self, group: list[Site]) -> Tensor:
        return -super().measure(group)


class Writing(Taylor):
    def measure(self, group: list[Site]) -> Tensor:
        for site in group:
            for _, parameter in site.adapter.own_parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)
        return super().measure(group)


class Lingering(Taylor):
    def release(self) -> None:
        pass


class Pooled(Taylor):
    def measure(self, group: list[Site]) -> Tensor:
        now = super().measure(group)
        return now / now.max()


class Forgetful(Taylor):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Pickled(Taylor):
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"when": Budget(rank=1)}


class Remembering(Taylor):
    def track(self, budget: RankBudget) -> None:
        worth = self._worth
        super().track(budget)
        self._worth = worth or self._worth


class Uncut(Taylor):
    def cut(self, budget: RankBudget, kept: Mapping[str, Tensor]) -> None:
        self.track(budget)


class Trusting(Taylor):
    def fold(self, now: list[Tensor], expect_overflow: bool = False, skipped: Tensor | None = None) -> None:
        for worth, new in zip(self._worth, now, strict=True):
            worth.lerp_(new, 1 - self.beta)


@pytest.mark.parametrize(
    ("law", "wrong", "says"),
    [
        ("scores_every_component", Signed, "layer '0' has the scores"),
        ("leaves_training_alone", Writing, "watched, .* becomes another"),
        ("leaves_training_alone", Lingering, "after release the mask of layer '0' still requires a gradient"),
        ("layers_are_measured_alone", Pooled, "alone, layer '[02]' has other scores"),
        ("survives_a_state_dict", Forgetful, "loaded layer '0' has other scores"),
        ("survives_a_state_dict", Pickled, "Budget"),
        ("starts_anew", Remembering, "tracked again layer '0' has other scores"),
        ("follows_a_cut", Uncut, "after a cut layer '0' has other scores"),
        ("leaves_out_what_is_not_finite", Trusting, "after a step that is not finite layer '0' has other scores"),
    ],
)
def test_a_wrong_importance_breaks_its_law(law: str, wrong: type[Taylor], says: str) -> None:
    IMPORTANCE_LAWS[law](ImportanceTrial(Taylor))
    with pytest.raises(Exception, match=says):
        IMPORTANCE_LAWS[law](ImportanceTrial(wrong))


class Threshold(RankPolicy):
    """Closes all that ties."""

    def decide(self, step: int, total: int) -> dict[str, Tensor]:
        masks = super().decide(step, total)
        scores = self.importance.scores()
        worst = min(float(scores[name][~mask].max()) for name, mask in masks.items() if not mask.all())
        return {name: scores[name] > worst for name in masks}


class SoftForEver(RankPolicy):
    def apply(self, masks: Mapping[str, Tensor], step: int, total: int) -> None:
        self.budget.keep(masks, soft=True)


class Drawing(RankPolicy):
    def decide(self, step: int, total: int) -> dict[str, Tensor]:
        masks = super().decide(step, total)
        return {name: mask[torch.randperm(len(mask))] for name, mask in masks.items()}


class Amnesiac(RankPolicy):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Reopening(RankPolicy):
    def track(self, budget: RankBudget) -> None:
        for site in budget.values():
            site.gate.reset_parameters()
        super().track(budget)


class Uncounted(RankPolicy):
    def follow(self, budget: RankBudget, kept: Mapping[str, Tensor]) -> None:
        super().follow(budget, kept)
        self._away = 0


@pytest.mark.parametrize(
    ("law", "wrong", "says"),
    [
        ("ties_are_counted", Threshold, "before any step it would leave 0 components, and the final budget is 6"),
        ("ends_for_good", SoftForEver, "the masks leave 12 components, and 6 are open"),
        ("decides_alike", Drawing, "decides otherwise on"),
        ("resumes", Amnesiac, r"stopped after step \d+ and resumed"),
        ("keeps_what_is_closed", Reopening, "track changes the mask of '[024]'"),
        ("follows_a_cut", Uncounted, "cannot close"),
    ],
)
def test_a_wrong_policy_breaks_its_law(law: str, wrong: type[RankPolicy], says: str) -> None:
    POLICY_LAWS[law](PolicyTrial(lambda final: RankPolicy(Cubic(), NormShare(), final, 2)))
    with pytest.raises(Exception, match=says):
        POLICY_LAWS[law](PolicyTrial(lambda final: wrong(Cubic(), NormShare(), final, 2)))


def test_they_are_told_by_name_without_pytest() -> None:
    with pytest.raises(
        AssertionError, match=r"Signed breaks scores_every_component: layer '0' .*\nFix: return \(L, n\)"
    ):
        check_importance(Signed)
    with pytest.raises(AssertionError, match="Reopening of Cubic and Taylor breaks keeps_what_is_closed: .*\nFix: "):
        check_policy(lambda final: Reopening(Cubic(), Taylor(), final, 2))

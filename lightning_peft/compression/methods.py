"""The methods of a compression: each is a list of callbacks that leave factorised layers with their final ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_peft import presets
from lightning_peft.adapters.factorized import Factorized
from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, Calibration, RankMonitor
from lightning_peft.rank.weighted_svd import WeightedSVD, Weighting

WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


@dataclass(frozen=True)
class Plan:
    """What a method is told.

    Attributes:
        ratio: kept share of the weights of the layers that are factorised.
        targets: patterns of these layers; ``None`` for all but the head.
        batches: of calibration, at most.
        weighting: what the decomposition goes by; ``None`` for the method's own.
        steps: optimizer steps to come.
    """

    ratio: float
    targets: Sequence[str] | None
    batches: int
    weighting: Weighting | None
    steps: int


@dataclass(frozen=True)
class Method:
    """One way to find ranks.

    Attributes:
        title: what a report calls it.
        callbacks: what does it, in a Trainer's order.
        weighting: the weighting that is used if none is asked for; ``None`` where there is none to choose.
        trains: whether it takes optimizer steps of its own.
        heads: whether it trains a new head, too, so that the model need not be trained for its task before.
        steps: optimizer steps if nothing is said.
        rates: learning rates inside and outside the encoder while it trains, and whether they stay what they are.
    """

    title: str
    callbacks: Callable[[Plan], list[Callback]]
    weighting: Weighting | None = None
    trains: bool = False
    heads: bool = False
    steps: int = 0
    rates: tuple[float, float, bool] = (0.0, 0.0, True)


class OnlyCalibrate(Callback):
    """Ends a fit before its first step: calibration is all there is to do."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        trainer.should_stop = True


def uniform(plan: Plan, weighting: Weighting) -> list[Callback]:
    """Every layer keeps the same share of its weight, the first components of a weighted decomposition."""
    return [
        AdapterInjection(Factorized, plan.targets, verbose=False),
        Calibration(WeightedSVD(weighting, ratio=plan.ratio), plan.batches),
        OnlyCalibrate(),
    ]


def learned(plan: Plan) -> list[Callback]:
    """Masks over the components of a weighted decomposition are trained."""
    preset = presets.ars(plan.ratio, weighting=plan.weighting, batches=plan.batches, targets=plan.targets)
    return _working(preset)


def one_round(plan: Plan) -> list[Callback]:
    """Everything is trained, and components are cut out on the way."""
    # A hundred cuts, as the paper's schedule is read; what is cut is cut out at every tenth, so that steps get faster.
    return _working(presets.rankdyna(plan.ratio, interval=max(1, plan.steps // 100), targets=plan.targets, compact=10))


def _working(preset: presets.Preset) -> list[Callback]:
    """A preset without what only watches or saves: there is no logger and no checkpoint here."""
    return [callback for callback in preset if not isinstance(callback, RankMonitor | AdapterCheckpoint)]


def _uniform(weighting: Weighting) -> Callable[[Plan], list[Callback]]:
    return partial(uniform, weighting=weighting)


METHODS: Mapping[str, Method] = {
    "svd": Method("plain SVD, uniform ranks", _uniform("none")),
    "fwsvd": Method("FWSVD, uniform ranks", _uniform("fisher")),
    "asvd": Method("ASVD, uniform ranks", _uniform("activation")),
    "svd-llm": Method("SVD-LLM, uniform ranks", _uniform("whiten")),
    "ars": Method("ARS", learned, "fisher", trains=True, steps=1000, rates=(1e-3, 1e-3, True)),
    "rankdyna": Method("RankDyna", one_round, trains=True, heads=True, steps=1000, rates=(1e-4, 5e-3, False)),
}


def method(name: str) -> Method:
    """A method by its name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r}: choose {', '.join(METHODS)}.")
    return METHODS[name]


def arguments() -> dict[str, Any]:
    """Names and titles, for a command's help."""
    return {name: found.title for name, found in METHODS.items()}

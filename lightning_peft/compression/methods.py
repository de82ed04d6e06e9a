"""The methods of a compression: each is a list of callbacks that leave factorised layers with their final ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

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
        seed: of what is drawn.
    """

    ratio: float
    targets: Sequence[str] | None
    batches: int
    weighting: Weighting | None
    steps: int
    seed: int


@dataclass(frozen=True)
class Training:
    """How an optimizer is set.

    Attributes:
        lr: peak learning rate.
        head_lr: that of a head which is new.
        weight_decay: AdamW's.
        schedule: what the rates do after warm-up.
        clip: norm that gradients are clipped to; ``None`` for none.
    """

    lr: float
    head_lr: float
    weight_decay: float = 0.01
    schedule: Literal["linear", "constant"] = "linear"
    clip: float | None = 1.0


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
        training: how the optimizer is set while it trains; ``None`` for as in fine-tuning.
    """

    title: str
    callbacks: Callable[[Plan], list[Callback]]
    weighting: Weighting | None = None
    trains: bool = False
    heads: bool = False
    steps: int = 0
    training: Training | None = None


class OnlyCalibrate(Callback):
    """Ends a fit before its first step: calibration is all there is to do."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        trainer.should_stop = True


def uniform(plan: Plan, weighting: Weighting) -> list[Callback]:
    """Every layer keeps the same share of its weight, the first components of a weighted decomposition."""
    return [
        AdapterInjection(partial(Factorized, start="exact"), plan.targets, verbose=False),
        Calibration(WeightedSVD(weighting, ratio=plan.ratio), plan.batches),
        OnlyCalibrate(),
    ]


def learned(plan: Plan) -> list[Callback]:
    """Masks over the components of a weighted decomposition are trained."""
    assert plan.weighting is not None
    # "cheapest": a layer that is as cheap dense is dense in the end, and counts as such.
    return _working(
        presets.ars(
            plan.ratio,
            weighting=plan.weighting,
            batches=plan.batches,
            price="cheapest",
            seed=plan.seed,
            targets=plan.targets,
        )
    )


def one_round(plan: Plan) -> list[Callback]:
    """Everything is trained, and components are cut out on the way."""
    # A cut at every hundredth of the run, in the six tenths of it between warm-up and tail; what is cut is cut out at
    # every tenth of them, so that steps get faster.
    return _working(presets.rankdyna(plan.ratio, interval=max(1, plan.steps // 100), targets=plan.targets, compact=10))


def _working(preset: presets.Preset) -> list[Callback]:
    """A preset without what only watches, as there is no logger here, and what saves, which every job has."""
    return [callback for callback in preset if not isinstance(callback, RankMonitor | AdapterCheckpoint)]


def _uniform(weighting: Weighting) -> Callable[[Plan], list[Callback]]:
    return partial(uniform, weighting=weighting)


# Adam at a constant rate, as the paper of ARS has it for the network that draws masks; but for the ready modules'
# warm-up over the first 6 % of the steps, with which the published comparisons were made.
PAPER = Training(1e-3, 1e-3, weight_decay=0.0, schedule="constant", clip=None)

METHODS: Mapping[str, Method] = {
    "svd": Method("plain SVD, uniform ranks", _uniform("none")),
    "fwsvd": Method("FWSVD, uniform ranks", _uniform("fisher")),
    "asvd": Method("ASVD, uniform ranks", _uniform("activation")),
    "svd-llm": Method("SVD-LLM, uniform ranks", _uniform("whiten")),
    "ars": Method("ARS", learned, "fisher", trains=True, steps=1000, training=PAPER),
    "rankdyna": Method("RankDyna", one_round, trains=True, heads=True, steps=1000),
}
DEFAULT = "ars"


def method(name: str) -> Method:
    """A method by its name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r}: choose {', '.join(METHODS)}.")
    return METHODS[name]

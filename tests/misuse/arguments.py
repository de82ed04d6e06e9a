"""Mistakes in arguments."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from misuse.setups import LORA, Encoder, Rows, adapted, fit, pruning
from torch import nn

from lightning_peft import (
    CLUB,
    DEM,
    EVA,
    AdapterInjection,
    Budget,
    Calibration,
    CategoricalCLUB,
    Cubic,
    Distillation,
    DynamicDoRA,
    Factorized,
    GroupImportance,
    Growth,
    LoRA,
    Orthogonality,
    PACBayes,
    RankPolicy,
    RankPruning,
    RankSelection,
    Regularization,
    RLoRA,
    SeparableCritic,
    SoftThreshold,
    SpaRTA,
    Taylor,
    WeightDecomposed,
    WeightedSVD,
    convert,
    eject,
    inject,
    merge,
    presets,
    small_parameters,
    to_hf_peft,
)
from lightning_peft.adapters import adalora, dynamic_dora
from lightning_peft.presets.pac_bayes import prior_split
from lightning_peft.regularizers.objectives import FBBB


class Tied(nn.Module):
    """Its output layer has the weight of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 4)
        self.out = nn.Linear(4, 8, bias=False)
        self.out.weight = self.words.weight


class NoLinear(Encoder):
    """Nothing that is adapted by default."""

    def __init__(self) -> None:
        super().__init__()
        self.query = self.value = self.classifier = None  # type: ignore[assignment]
        self.recurrent = nn.GRU(8, 8)


def quantized() -> nn.Module:
    """A stand-in with the name and the place of torch's own: that one is gone from some builds."""
    kind = type("Linear", (nn.Module,), {"__module__": "torch.ao.nn.quantized"})
    return nn.Sequential(kind(), nn.Linear(8, 8))


def compiled_layer() -> Encoder:
    module = Encoder()
    module.query = torch.compile(module.query, backend="eager")  # type: ignore[assignment]
    return module


def merge_one_of_two_tied() -> None:
    module = Encoder()
    module.value = nn.Linear(8, 8)
    module.value.weight = module.query.weight
    inject(module, LORA, ["query"])
    merge(module)


def under_inference_mode() -> None:
    with torch.inference_mode():
        inject(Encoder(), LORA)


def factorized(*parts: str, **arguments: Any) -> Encoder:
    module = Encoder()
    inject(module, partial(Factorized, **arguments), parts or None)
    return module


def diverged() -> None:
    module = Encoder()
    nn.init.constant_(module.value.weight, torch.nan)
    inject(module, Factorized)


def factorize_one_of_two_tied() -> None:
    module = Encoder()
    module.value = nn.Linear(8, 8)
    module.value.weight = module.query.weight
    inject(module, Factorized, ["query"])


def lora(**arguments: Any) -> object:
    return fit(Encoder(), *presets.lora(**{"rank": 4, **arguments}))


ROWS: Rows = {
    "a rank that is no whole number": (lambda: lora(rank=4.0), TypeError),
    "a rank as text, from a sweep or a file": (lambda: lora(rank="4"), TypeError),
    "a rank of 0": (lambda: lora(rank=0), ValueError),
    "calibration on no batch": (lambda: presets.eva(rank=2, batches=0), ValueError),
    "a cap below the average rank": (lambda: presets.eva(rank=2, rho=0.5), ValueError),
    "a probe's class, not a probe": (lambda: Calibration(EVA), TypeError),  # type: ignore[arg-type]
    "a weighting that is misspelt": (lambda: WeightedSVD("fischer"), ValueError),  # type: ignore[arg-type]
    "a ratio that keeps everything": (lambda: WeightedSVD(ratio=1.0), ValueError),
    "a ratio and a rank": (lambda: WeightedSVD(ratio=0.5, rank=8), ValueError),
    "a share above 1 to convert by": (lambda: convert(adapted(), 8.0), ValueError),
    "adapters to convert that were never trained": (lambda: convert(adapted(), 2), ValueError),
    "a rank above the layer's limit": (lambda: fit(Encoder(), *presets.dynamic_dora(final_rank=8)), ValueError),
    "a negative alpha": (lambda: lora(alpha=-1), ValueError),
    "dropout in per cent": (lambda: lora(dropout=10), ValueError),
    "one pattern as text": (lambda: lora(targets="query"), TypeError),
    "PEFT's `all-linear`": (lambda: lora(targets="all-linear"), TypeError),
    "a target that is a number": (lambda: lora(targets=[0]), TypeError),
    "a target that is a shell pattern": (lambda: lora(targets=["*query"]), ValueError),
    "targets that match nothing": (lambda: lora(targets=["q_proj"]), ValueError),
    "a target that is misspelt": (lambda: lora(targets=["querry"]), ValueError),
    "no target": (lambda: lora(targets=[]), ValueError),
    "a target of another kind": (lambda: lora(targets=["norm"]), ValueError),
    "a target that is quantized": (lambda: inject(quantized(), LORA, ["0"]), ValueError),
    "a target that is compiled by itself": (lambda: fit(compiled_layer(), *presets.lora(rank=4)), ValueError),
    "a head that is not there": (lambda: lora(train=["clasifier"]), ValueError),
    "a head that is adapted and trained": (lambda: lora(targets=["classifier"], train=["classifier"]), ValueError),
    "nothing to adapt": (lambda: fit(NoLinear(), *presets.lora()), ValueError),
    "an adapter in place of a factory": (lambda: AdapterInjection(LoRA(nn.Linear(8, 8))), TypeError),
    "the name of a method in place of a factory": (lambda: AdapterInjection("lora"), TypeError),  # type: ignore[arg-type]
    "a factory that builds something else": (lambda: inject(Encoder(), lambda layer: nn.Identity()), TypeError),  # type: ignore[arg-type, return-value]
    "a list of layers in place of a module": (lambda: inject([nn.Linear(8, 8)], LORA), TypeError),  # type: ignore[arg-type]
    "one layer in place of a module": (lambda: inject(nn.Linear(8, 8), LORA), TypeError),
    "components of no known method": (
        lambda: WeightDecomposed(nn.Linear(8, 8), components="dora"),  # type: ignore[arg-type]
        ValueError,
    ),
    "a final rank and a budget for decomposed layers": (
        lambda: presets.weight_decomposed(final_rank=4, budget=Budget(share=0.5)),
        ValueError,
    ),
    "decomposed layers of components without a gain, removed softly": (
        lambda: fit(
            Encoder(),
            AdapterInjection(partial(WeightDecomposed, rank=4)),
            RankPruning(dynamic_dora.policy(Budget(rank=2))),
        ),
        ValueError,
    ),
    "an adapter's class on a layer that it cannot adapt": (lambda: DynamicDoRA(nn.GRU(4, 4)), TypeError),
    "RLoRA on a convolution": (
        lambda: inject(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)), RLoRA, ["0"]),
        TypeError,
    ),
    "a mode of RLoRA that is misspelt": (lambda: fit(Encoder(), *presets.rlora(4, mode="diagonal")), ValueError),  # type: ignore[arg-type]
    "RLoRA's start in a mode that has none": (lambda: RLoRA(nn.Linear(8, 8), 4, mode="io", d_initial=0.2), ValueError),
    "a key for projections that are shared": (lambda: RLoRA(nn.Linear(8, 8), rank=4, key="query"), ValueError),
    "Kronecker products on a width without small factors": (
        lambda: RLoRA(nn.Linear(8, 8209), rank=4, path="kron"),
        ValueError,
    ),
    "more of SpaRTA's entries than the weight has": (lambda: SpaRTA(nn.Linear(8, 8), k=65), ValueError),
    "SpaRTA's random number of entries, and a number given": (
        lambda: SpaRTA(nn.Linear(8, 8), k=6, sampling="bernoulli"),
        ValueError,
    ),
    "SpaRTA on a weight that another layer has, too": (lambda: inject(Tied(), SpaRTA, ["words"]), ValueError),
    "RLoRA's components by AdaLoRA's importance": (
        lambda: fit(Encoder(), AdapterInjection(partial(RLoRA, rank=4)), RankPruning(adalora.policy(Budget(rank=2)))),
        TypeError,
    ),
    "a transposed convolution as a target": (
        lambda: inject(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 3, 3)), LORA, ["1"]),
        ValueError,
    ),
    "a rank above a depthwise convolution's limit": (
        lambda: inject(nn.Sequential(nn.Conv2d(16, 16, 3, groups=16)), partial(LoRA, rank=16), ["0"]),
        ValueError,
    ),
    "a second injection": (lambda: inject(adapted("query"), LORA, ["value"]), ValueError),
    "injection under `torch.inference_mode`": (under_inference_mode, RuntimeError),
    "one of two tied layers is adapted and merged": (merge_one_of_two_tied, UserWarning),
    "small_parameters before injection": (lambda: small_parameters(Encoder()), ValueError),
    "a budget of nothing": (lambda: Budget(), ValueError),
    "a budget in two units": (lambda: Budget(rank=2, share=0.5), ValueError),
    "a budget's share in per cent": (lambda: Budget(share=50), ValueError),
    "a budget as text": (lambda: Budget(rank="2"), TypeError),  # type: ignore[arg-type]
    "a number in place of a Budget": (lambda: presets.dynamic_dora(budget=0.5), TypeError),  # type: ignore[arg-type]
    "a final rank and a budget": (lambda: presets.dynamic_dora(final_rank=4, budget=Budget(share=0.5)), ValueError),
    "a budget that leaves the start open": (lambda: presets.dynamic_dora(budget=Budget(share=0.5)), ValueError),
    "a budget above the start": (
        lambda: fit(Encoder(), *presets.dynamic_dora(final_rank=5, initial_rank=4)),
        ValueError,
    ),
    "a budget below the floor": (
        lambda: fit(Encoder(), *presets.dynamic_dora(final_rank=1, initial_rank=4, minimum=2)),
        ValueError,
    ),
    "a budget of nearly nothing": (
        lambda: fit(Encoder(), *presets.dynamic_dora(budget=Budget(megabytes=1e-5), initial_rank=4)),
        ValueError,
    ),
    "warmup and tail that leave no window": (
        lambda: presets.dynamic_dora(final_rank=4, warmup=0.5, tail=0.5),
        ValueError,
    ),
    "warmup in steps": (lambda: presets.dynamic_dora(final_rank=4, warmup=100), ValueError),
    "an interval of 0": (lambda: pruning(interval=0, rank=2), ValueError),
    "an interval that is a share": (lambda: pruning(interval=0.1, rank=2), TypeError),
    "beta of 1": (lambda: presets.dynamic_dora(final_rank=4, beta=1.0), ValueError),
    "a negative weight of DEM": (lambda: presets.dynamic_dora(final_rank=4, dem_weight=-0.3), ValueError),
    "a schedule's class in place of a schedule": (
        lambda: RankPolicy(Cubic, Taylor(), Budget(rank=2)),  # type: ignore[arg-type]
        TypeError,
    ),
    "RankPruning with a Budget": (lambda: RankPruning(Budget(rank=2)), TypeError),  # type: ignore[arg-type]
    "soft removal without a gain": (
        lambda: fit(
            Encoder(), AdapterInjection(LORA), RankPruning(RankPolicy(Cubic(), Taylor(), Budget(rank=2), soft=True))
        ),
        ValueError,
    ),
    "a soft threshold on adapters without a gain": (
        lambda: fit(Encoder(), AdapterInjection(LORA), RankPruning(SoftThreshold(3e-4))),
        ValueError,
    ),
    "a soft threshold of 0": (lambda: presets.sora(0.0), ValueError),
    "growth from adapters that are open": (
        lambda: fit(Encoder(), AdapterInjection(LORA), RankPruning(Growth(Cubic(), Taylor(), Budget(rank=2)))),
        ValueError,
    ),
    "growth that is cut as it goes": (
        lambda: RankPruning(Growth(Cubic(), Taylor(), Budget(rank=2)), compact=2),
        ValueError,
    ),
    "components weighed by cost where each counts as one": (
        lambda: RankPolicy(Cubic(), Taylor(), Budget(rank=2), compare="worth_per_cost"),
        ValueError,
    ),
    "growth to a budget that leaves the room open": (lambda: presets.increlora(budget=Budget(share=0.5)), ValueError),
    "a list of terms": (lambda: Regularization([DEM()]), TypeError),  # type: ignore[arg-type]
    "no term": (lambda: Regularization({}), TypeError),
    "a term's class in place of a term": (lambda: Regularization({"dem": DEM}), TypeError),  # type: ignore[dict-item]
    "a term's name that no log can hold": (lambda: Regularization({"loss/dem": DEM()}), ValueError),
    "a misspelt objective": (lambda: PACBayes("f_cubic"), ValueError),  # type: ignore[arg-type]
    "an objective's class in place of an objective": (lambda: PACBayes(FBBB), TypeError),  # type: ignore[arg-type]
    "a misspelt risk": (lambda: PACBayes(risk="accuracy"), ValueError),  # type: ignore[arg-type]
    "noise that is wider than a weight may bear": (lambda: PACBayes(sigma=2.0), ValueError),
    "a prior without a width": (lambda: PACBayes(prior_sigma=0.0), ValueError),
    "a learnt prior that begins beyond its grid": (lambda: PACBayes(prior="learned", prior_sigma=1.0), ValueError),
    "an objective that pays for a learnt prior, and a fixed one": (
        lambda: fit(adapted(), Regularization({"pac": PACBayes("dziugaite_roy")})),
        ValueError,
    ),
    "a posterior over what is not trained": (
        lambda: fit(adapted(), Regularization({"pac": PACBayes(over=["norm"])})),
        ValueError,
    ),
    "a bound for losses without a limit, and no constant": (lambda: PACBayes("unbounded"), ValueError),  # type: ignore[arg-type]
    "a prior's part that leaves nothing to certify": (lambda: prior_split(range(10), 1.0), ValueError),
    "a ratio and a budget": (lambda: presets.rankdyna(0.5, budget=Budget(rank=4)), ValueError),
    "a ratio of 0": (lambda: presets.rankdyna(0.0), ValueError),
    "a ratio that is not reached with a group in every layer": (
        lambda: fit(Encoder(), *presets.rankdyna(0.1)),
        ValueError,
    ),
    "a misspelt aggregation": (lambda: presets.rankdyna(aggregation="sum"), ValueError),  # type: ignore[arg-type]
    "a misspelt score": (lambda: presets.rankdyna(score="cost"), ValueError),  # type: ignore[arg-type]
    "removal that is soft and for good": (
        lambda: RankPolicy(Cubic(), Taylor(), Budget(rank=2), soft=True, irreversible=True),
        ValueError,
    ),
    "importance by the factors of adapters that have others": (
        lambda: fit(
            Encoder(),
            AdapterInjection(LORA),
            RankPruning(RankPolicy(Cubic(), GroupImportance("elementwise_sum"), Budget(rank=2))),
        ),
        TypeError,
    ),
    "`CLUB` without its inner steps": (lambda: CLUB(layer="norm", given="query", inner_steps=0), ValueError),
    "`CLUB` with a negative weight, to maximise it": (lambda: CLUB(-0.1, layer="norm", given="query"), ValueError),
    "`CLUB` given a part of the batch, of unknown width": (
        lambda: CLUB(layer="norm", given=lambda batch: batch["age"]),
        ValueError,
    ),
    "a nuisance label of one class": (lambda: CategoricalCLUB(layer="norm", label="domain", classes=1), ValueError),
    "a critic on sequences": (lambda: SeparableCritic(8, 8)(torch.zeros(2, 5, 8), torch.zeros(2, 8)), ValueError),
    "a misspelt loss of distillation": (lambda: Distillation(loss="ce"), ValueError),  # type: ignore[arg-type]
    "a temperature of 0": (lambda: Distillation(temperature=0), ValueError),
    "a teacher by its name": (lambda: Distillation(teacher="bert-base-uncased"), TypeError),  # type: ignore[arg-type]
    "hidden states as one name": (lambda: Distillation(hidden="encoder"), TypeError),
    "distillation of nothing": (lambda: Distillation(loss=None), ValueError),
    "a misspelt normalizer": (lambda: presets.dynamic_dora(dem_normalizer="paper"), ValueError),  # type: ignore[arg-type]
    "a misspelt mode of AdaLoRA": (lambda: presets.adalora(mode="post"), ValueError),  # type: ignore[arg-type]
    "a target rank and a budget": (lambda: presets.adalora(4, budget=Budget(share=0.5)), ValueError),
    "a budget that leaves AdaLoRA's start open": (lambda: presets.adalora(budget=Budget(share=0.5)), ValueError),
    "a ratio above 1": (lambda: presets.ars(1.5), ValueError),
    "misspelt masks": (lambda: presets.ars(masks="hypernet"), ValueError),  # type: ignore[arg-type]
    "ranks to be learned by a name": (
        lambda: RankSelection("ars"),  # type: ignore[arg-type]
        TypeError,
    ),
    "a negative penalty": (lambda: presets.adalora(orthogonality=-0.5), ValueError),
    "a misspelt form of the penalty": (lambda: Orthogonality(form="frobenius"), ValueError),  # type: ignore[arg-type]
    "a rank that a factorised layer cannot have": (lambda: factorized(rank=7), ValueError),
    "a factorised layer's rank as a share": (lambda: factorized(rank=0.5), TypeError),
    "a misspelt rank of a factorised layer": (lambda: factorized(rank="break-even"), ValueError),
    "an embedding to be factorised": (lambda: inject(nn.Sequential(nn.Embedding(9, 4)), Factorized, ["0"]), TypeError),
    "layers that are factorised already": (lambda: inject(factorized("query"), Factorized, ["value"]), ValueError),
    "one of two tied layers is factorised": (factorize_one_of_two_tied, UserWarning),
    "a factorised layer is to be taken out": (lambda: eject(factorized()), RuntimeError),
    "a factorised layer as a PEFT folder": (lambda: to_hf_peft(factorized(), "folder"), TypeError),
    "a weight of NaN to be factorised": (diverged, ValueError),
    "a budget that factorised layers cannot reach": (
        lambda: fit(
            Encoder(),
            AdapterInjection(Factorized),
            RankPruning(RankPolicy(Cubic(), Taylor(), Budget(parameters=20), minimum=1)),
        ),
        ValueError,
    ),
    "EVA for factorised layers": (
        lambda: fit(Encoder(), AdapterInjection(Factorized), Calibration(EVA(rank=2))),
        RuntimeError,
    ),
}

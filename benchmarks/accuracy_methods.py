"""The methods that `accuracy.py` compares: each puts something trainable into the same classifier.

A method is a function `build(classifier, steps, rank) -> Prepared`; rank is the average that is left at the end. The
classifier, its head, the optimizer, the schedule and the order of batches are the same for all; only the adapters
differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_peft.modules import TextClassifier

ALPHA = {8: 16, 2: 8, 14: 28}
"""alpha of the methods whose paper leaves it open, by rank: scale alpha / r is 2 at ranks 8 and 14 and 4 at rank 2."""
RATES = (1e-3, 2e-3, 4e-3)
ENCODER_LINEARS = r"encoder\.layer\..*"


@dataclass
class Prepared:
    """A classifier made ready: callbacks that drive the method, and what to read from it when it is trained."""

    callbacks: list[Callback] = field(default_factory=list)
    ranks: Callable[[], Mapping[str, int]] = dict
    adapter_bytes: Callable[[], int] | None = None


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        title: what the table calls it.
        build: prepares a fresh classifier, given the number of optimizer steps to come and the final average rank.
        settings: what a reader must know to repeat it, by rank.
        searched: whether the adapters' learning rate is searched; a method without adapters has none.
        seeds: seeds of the final runs; none for what is only searched.
        rates: learning rates that are searched.
    """

    title: str
    build: Callable[[TextClassifier, int, int], Prepared]
    settings: Callable[[int], Mapping[str, Any]]
    searched: bool = True
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = RATES


def frozen(classifier: TextClassifier, steps: int, rank: int) -> Prepared:
    """Nothing but the head trains."""
    _freeze_encoder(classifier)
    return Prepared(adapter_bytes=lambda: sum(p.numel() * 4 for p in classifier.parameters() if p.requires_grad))


def hf_lora(classifier: TextClassifier, steps: int, rank: int) -> Prepared:
    """HF PEFT's LoRA."""
    from peft import LoraConfig, TaskType, get_peft_model

    linears = _encoder_linears(classifier.model)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=ALPHA[rank], lora_dropout=0.0, target_modules=linears
    )
    classifier.model = get_peft_model(classifier.model, config)
    return Prepared(
        ranks=lambda: dict.fromkeys(linears, rank),
        adapter_bytes=lambda: _saved_bytes(classifier.model.save_pretrained),
    )


def hf_adalora(classifier: TextClassifier, steps: int, rank: int) -> Prepared:
    """HF PEFT's AdaLoRA, with its allocator called after every step and its orthogonality penalty in the loss."""
    from peft import AdaLoraConfig, TaskType, get_peft_model

    linears = _encoder_linears(classifier.model)
    config = AdaLoraConfig(
        task_type=TaskType.SEQ_CLS,  # without a task type PEFT bypasses the forward that adds the penalty
        init_r=start_rank(rank),
        target_r=rank,
        lora_alpha=ALPHA[rank],
        lora_dropout=0.0,
        target_modules=linears,
        total_step=steps,
        **_adalora_schedule(steps),
    )
    # The classifier must call the wrapper, not the model inside it: the penalty is added there.
    classifier.model = get_peft_model(classifier.model, config)

    def ranks() -> dict[str, int]:
        pattern = classifier.model.peft_config["default"].rank_pattern
        return {name.split(".lora_E")[0]: sum(kept) for name, kept in pattern.items()}

    return Prepared([AdaLoraAllocation(steps)], ranks, lambda: _saved_bytes(classifier.model.save_pretrained))


class AdaLoraAllocation(Callback):
    """Calls PEFT's allocator once per optimizer step, and refuses to train without the penalty.

    The allocator reads gradients. Lightning clears them before the next backward, so at the end of a batch they are
    still there (clipped, as in PEFT's own documented order: backward, step, allocate, clear).

    Args:
        steps: optimizer steps the schedule was made for.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The schedule must end where training ends."""
        if trainer.estimated_stepping_batches != self.steps:
            raise RuntimeError(f"AdaLoRA was set up for {self.steps} steps, not {trainer.estimated_stepping_batches}.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the first loss, then allocate if the optimizer has stepped."""
        if trainer.global_step == 1:
            task = F.cross_entropy(outputs["logits"], batch["labels"])
            # 36 layers of rank 3 or more near zero: |P P' - I| is about sqrt(3) or more each, times the weight 0.5
            if not outputs["loss"] - task > 0.5:
                raise RuntimeError(f"AdaLoRA's penalty is missing: loss {outputs['loss']}, cross-entropy alone {task}.")
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            pl_module.model.base_model.update_and_allocate(self._step)


def lora(classifier: TextClassifier, steps: int, rank: int) -> Prepared:
    """This package's LoRA."""
    from lightning_peft import presets

    return _ours(classifier, presets.lora(rank=rank, alpha=ALPHA[rank], targets=[ENCODER_LINEARS]))


def dynamic_dora(classifier: TextClassifier, steps: int, rank: int, **changes: Any) -> Prepared:
    """This package's dynamic DoRA, with the preset's settings but for the named changes."""
    from lightning_peft import presets

    return _ours(classifier, presets.dynamic_dora(final_rank=rank, targets=[ENCODER_LINEARS], **changes))


def adalora(classifier: TextClassifier, steps: int, rank: int) -> Prepared:
    """This package's AdaLoRA, on the schedule that PEFT's has here."""
    from lightning_peft import presets

    return _ours(
        classifier,
        presets.adalora(
            final_rank=rank,
            initial_rank=start_rank(rank),
            alpha=ALPHA[rank],
            warmup=0.1,
            tail=0.3,
            targets=[ENCODER_LINEARS],
        ),
    )


def weight_decomposed(classifier: TextClassifier, steps: int, rank: int, **changes: Any) -> Prepared:
    """Weight decomposition whose rank moves by dynamic DoRA's policy, with the named changes."""
    from lightning_peft import presets

    return _ours(classifier, presets.weight_decomposed(final_rank=rank, targets=[ENCODER_LINEARS], **changes))


def sora(classifier: TextClassifier, steps: int, rank: int) -> Prepared:
    """SoRA with a threshold under which half of the gates close that have no gradient: 0.7 is near their median."""
    from lightning_peft import presets

    return _ours(
        classifier,
        presets.sora(0.7 / steps, rank=2 * rank, alpha=2 * ALPHA[rank], targets=[ENCODER_LINEARS]),
    )


def increlora(classifier: TextClassifier, steps: int, rank: int) -> Prepared:
    """IncreLoRA, from one component per layer."""
    from lightning_peft import presets

    return _ours(classifier, presets.increlora(rank, alpha=2 * ALPHA[rank], targets=[ENCODER_LINEARS]))


def elalora(classifier: TextClassifier, steps: int, rank: int) -> Prepared:
    """ElaLoRA, at the final budget from start to end."""
    from lightning_peft import presets

    return _ours(classifier, presets.elalora(rank, alpha=2 * ALPHA[rank], targets=[ENCODER_LINEARS]))


def _eva_of(alpha: Callable[[int], float]) -> Callable[[TextClassifier, int, int], Prepared]:
    """LoRA whose ranks and first directions come from the layers' inputs, with an alpha of the rank."""

    def build(classifier: TextClassifier, steps: int, rank: int) -> Prepared:
        from lightning_peft import presets

        return _ours(classifier, presets.eva(rank, alpha=alpha(rank), compact="at_once", targets=[ENCODER_LINEARS]))

    return build


def _sixteenth(rank: int) -> float:
    """alpha of EVA's released example, 1 at rank 16.

    EVA's directions have length 1 and lie where the inputs are largest; LoRA's random ones have length 0.58 and meet
    an input of d dimensions by about 1 / sqrt(d) of it. At LoRA's alpha a step moves EVA's output many times as far.
    """
    return rank / 16


def _ours(classifier: TextClassifier, callbacks: list[Callback]) -> Prepared:
    from lightning_peft import RankBudget, to_hf_peft

    return Prepared(
        callbacks,
        lambda: RankBudget.of(classifier).ranks(),
        lambda: _saved_bytes(lambda folder: to_hf_peft(classifier, folder, mode="compact")),
    )


def _adalora_schedule(steps: int) -> dict[str, int]:
    """Warm-up 10 %, frozen tail 30 %, an allocation every 10 steps."""
    return {"tinit": round(0.1 * steps), "tfinal": round(0.3 * steps), "deltaT": 10}


def _encoder_linears(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "encoder.layer." in name]


def _freeze_encoder(classifier: TextClassifier) -> None:
    classifier.model.base_model.requires_grad_(False)


def _saved_bytes(save: Callable[[str], Any]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def start_rank(rank: int) -> int:
    """Components per layer at the start of a method that prunes: one and a half times the final average."""
    return ceil(1.5 * rank)


def _double(rank: int) -> int:
    return 2 * rank


def _double_alpha(rank: int) -> int:
    """alpha over twice the rank: the scale of the other methods where a layer has the average rank."""
    return 2 * ALPHA[rank]


def _settings(**own: Any) -> Callable[[int], Mapping[str, Any]]:
    """What all methods on the encoder's linear layers share, and what one adds; a function among it is of the rank."""

    def settings(rank: int) -> Mapping[str, Any]:
        shared = {"rank": rank, "targets": "encoder linears"}
        return shared | {key: value(rank) if callable(value) else value for key, value in own.items()}

    return settings


_EVA = {"dropout": 0.0, "rho": 2, "tau": 0.99, "batches": 64}
METHODS: dict[str, Method] = {
    "frozen": Method("frozen encoder, head only", frozen, lambda rank: {}, searched=False, seeds=(0,)),
    "hf-lora": Method("LoRA (HF PEFT)", hf_lora, _settings(alpha=ALPHA.get, dropout=0.0)),
    "hf-adalora": Method(
        "AdaLoRA (HF PEFT)",
        hf_adalora,
        _settings(
            init=start_rank,
            alpha=ALPHA.get,
            dropout=0.0,
            tinit="10 %",
            tfinal="30 %",
            deltaT=10,
            orthogonality=0.5,
        ),
    ),
    "lora": Method("LoRA", lora, _settings(alpha=ALPHA.get, dropout=0.0)),
    "dynamic-dora": Method("dynamic DoRA", dynamic_dora, _settings(init=start_rank, preset="default")),
    "adalora": Method(
        "AdaLoRA",
        adalora,
        _settings(init=start_rank, alpha=ALPHA.get, dropout=0.0, warmup=0.1, tail=0.3, interval=10, orthogonality=0.5),
    ),
    "weight-decomposed": Method(
        "weight-decomposed, dynamic rank", weight_decomposed, _settings(init=start_rank, preset="default")
    ),
    "eva": Method(
        "EVA ranks, alpha = r / 16",
        _eva_of(_sixteenth),
        _settings(alpha=_sixteenth, **_EVA),
        seeds=(0,),
        rates=(2e-3, 4e-3, 8e-3),
    ),
    "sora": Method(
        "SoRA",
        sora,
        _settings(init=_double, alpha=_double_alpha, dropout=0.0, threshold="0.7 / steps"),
        seeds=(0,),
    ),
    "increlora": Method(
        "IncreLoRA", increlora, _settings(most=_double, alpha=_double_alpha, preset="default"), seeds=(0,)
    ),
    "elalora": Method("ElaLoRA", elalora, _settings(most=_double, alpha=_double_alpha, preset="default"), seeds=(0,)),
}


def _scale_kept(rank: int) -> float:
    """alpha with which a gain moves the update at every rank as far as at 8, where the preset's alpha is the paper's.

    At the start one component's update has the norm (alpha / R) |c| |a| |b|, near 2 (alpha / R) |c| sqrt(d_out / R).
    """
    return 8 * (start_rank(rank) / 12) ** 1.5


def _lora_of(alpha: float) -> Callable[[TextClassifier, int, int], Prepared]:
    def build(classifier: TextClassifier, steps: int, rank: int) -> Prepared:
        from lightning_peft import presets

        return _ours(classifier, presets.lora(rank=rank, alpha=alpha, targets=[ENCODER_LINEARS]))

    return build


def _dora_of(**changes: Any) -> Method:
    return Method(
        "dynamic DoRA, " + ", ".join(f"{name} {value:g}" for name, value in changes.items()),
        lambda classifier, steps, rank: dynamic_dora(classifier, steps, rank, **changes),
        _settings(init=start_rank, preset="default but for", **changes),
        seeds=(),
    )


_SCALED = _settings(init=start_rank, preset="default but for", alpha=_scale_kept, dropout=0.0)
METHODS |= {
    "dynamic-dora-scaled": Method(
        "dynamic DoRA, alpha = 8 (R / 12)^1.5, no dropout",
        lambda classifier, steps, rank: dynamic_dora(classifier, steps, rank, alpha=_scale_kept(rank), dropout=0.0),
        _SCALED,
        rates=(8e-3, 1.6e-2, 3.2e-2),
    ),
    "weight-decomposed-scaled": Method(
        "weight-decomposed, dynamic rank, alpha = 8 (R / 12)^1.5, no dropout",
        lambda classifier, steps, rank: weight_decomposed(
            classifier, steps, rank, alpha=_scale_kept(rank), dropout=0.0
        ),
        _SCALED,
        rates=(8e-3, 1.6e-2, 3.2e-2),
    ),
    # Searched only: what one setting is worth on the held-out tenth.
    "dynamic-dora-dry": _dora_of(dropout=0.0),
    "dynamic-dora-dry-scale-2": _dora_of(dropout=0.0, alpha=2.0),
    "eva-alpha-of-lora": Method(
        "EVA ranks, alpha of LoRA", _eva_of(ALPHA.__getitem__), _settings(alpha=ALPHA.get, **_EVA), seeds=()
    ),
    "lora-alpha-2": Method("LoRA, alpha 2", _lora_of(2.0), _settings(alpha=2.0, dropout=0.0), seeds=()),
}

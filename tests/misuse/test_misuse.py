"""Wrong set-ups, as users make them: a Trainer, a module, and a sentence that names the thing and says the fix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import (
    DEM,
    AdapterFileError,
    AdapterInjection,
    Budget,
    Cubic,
    DynamicDoRA,
    LoRA,
    RankMonitor,
    RankPolicy,
    RankPruning,
    Regularization,
    Taylor,
    inject,
    presets,
)


class Encoder(LightningModule):
    """A small module with names as a hub's encoder has them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.query, self.value, self.norm = nn.Linear(8, 8), nn.Linear(8, 6), nn.LayerNorm(6)
            self.classifier = nn.Linear(6, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss: Tensor = self.classifier(self.norm(self.value(self.query(batch)))).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


class Manual(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class HeadOnly(Encoder):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.classifier.parameters(), lr=1e-3)


class NoLoss(Encoder):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"logits": self.classifier(self.value(batch))}


class NoLinear(Encoder):
    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.conv = nn.Conv1d(8, 8, 1)


LORA = partial(LoRA, rank=4)


def fit(module: LightningModule, *callbacks: Callback, ckpt_path: Path | None = None, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_epochs": 1, **options},
    )
    trainer.fit(module, DataLoader(torch.randn(24, 8), batch_size=2), ckpt_path=ckpt_path, weights_only=True)  # type: ignore[arg-type]
    return trainer


def pruning(**budget: Any) -> RankPruning:
    return RankPruning(RankPolicy(Cubic(), Taylor(), Budget(**budget), interval=2))


def adapted(*parts: str) -> Encoder:
    module = Encoder()
    inject(module, LORA, parts)
    return module


TABLE: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "targets that match nothing": (
        lambda: fit(Encoder(), *presets.lora(rank=4, targets=["q_proj", "querry"])),
        ValueError,
        r"targets=\['q_proj'\] matches no layer; the nearest names are 'query', 'value', 'classifier'.",
    ),
    "a target of another kind": (
        lambda: fit(Encoder(), *presets.lora(rank=4, targets=["norm"])),
        ValueError,
        r"targets=\['norm'\] matches 'norm', which cannot be adapted: LayerNorm is not a Linear, Conv1D or Embedding l",
    ),
    "one pattern as a string": (
        lambda: fit(Encoder(), *presets.lora(rank=4, targets="query")),
        TypeError,
        r"targets must be a list of patterns, not one string. Write targets=\['query'\].",
    ),
    "a head that is not there": (
        lambda: fit(Encoder(), *presets.lora(rank=4, train=["clasifier"])),
        ValueError,
        r"train=\['clasifier'\] matches no module or parameter that is not adapted; the nearest names are 'classifier'",
    ),
    "nothing to adapt": (
        lambda: fit(NoLinear(), *presets.lora()),
        ValueError,
        "NoLinear has no linear layer to adapt. If it builds its layers later, inject then; other layers can be named",
    ),
    "a rank above the layer's limit": (
        lambda: fit(Encoder(), *presets.dynamic_dora(final_rank=8)),
        ValueError,
        "layer 'query': rank=12 is not possible on a layer of 8 inputs and 8 outputs: give a rank from 1 to 8, or leav",
    ),
    "a second injection": (
        lambda: inject(adapted("query"), LORA, ["value"]),
        ValueError,
        "Encoder has adapters already, the first at 'query': call eject first, or inject all layers in one call.",
    ),
    "adapters that the optimizer does not have": (
        lambda: fit(HeadOnly(), *presets.lora(rank=4)),
        MisconfigurationException,
        "'A' of the adapter at 'query' is in no optimizer, so it would not be trained. Let configure_optimizers take e",
    ),
    "pruning without injection": (
        lambda: fit(Encoder(), pruning(rank=2)),
        MisconfigurationException,
        "RankPruning found no adapter to prune. Put AdapterInjection before it in the Trainer's callbacks, or call inj",
    ),
    "watching without injection": (
        lambda: fit(Encoder(), RankMonitor()),
        MisconfigurationException,
        "RankMonitor found no adapter to watch. Put AdapterInjection before it in the Trainer's callbacks",
    ),
    "terms without injection": (
        lambda: fit(Encoder(), Regularization({"dem": DEM()})),
        RuntimeError,
        "DEM found no low-rank adapter in the module; inject adapters first.",
    ),
    "pruning before injection": (
        lambda: fit(Encoder(), pruning(rank=2), AdapterInjection(LORA)),
        MisconfigurationException,
        r"RankPruning comes before AdapterInjection in the Trainer's callbacks; put AdapterInjection first: callbacks=",
    ),
    "terms before injection": (
        lambda: fit(Encoder(), Regularization({"dem": DEM()}), AdapterInjection(LORA)),
        MisconfigurationException,
        "Regularization comes before AdapterInjection in the Trainer's callbacks; put AdapterInjection first",
    ),
    "two callbacks with terms": (
        lambda: fit(adapted("query"), Regularization({"one": DEM()}), Regularization({"two": DEM()})),
        MisconfigurationException,
        "there are 2 Regularization callbacks; give all terms to one",
    ),
    "a budget below the floor": (
        lambda: fit(Encoder(), *presets.dynamic_dora(final_rank=1, initial_rank=4, minimum=2)),
        ValueError,
        r"Budget\(rank=1\) is 2 components for 2 layers, below the floor of 4 \(2 components kept in every layer",
    ),
    "a budget of nearly nothing": (
        lambda: fit(Encoder(), *presets.dynamic_dora(budget=Budget(megabytes=1e-5), initial_rank=4)),
        ValueError,
        r"Budget\(megabytes=1e-05\) is 0 parameters for 2 layers, below the floor of 16",
    ),
    "a budget above the capacity": (
        lambda: fit(Encoder(), *presets.dynamic_dora(final_rank=5, initial_rank=4)),
        ValueError,
        r"Budget\(rank=5\) is 10 components, more than the 8 that the adapters have at full rank. Lower the budget or",
    ),
    "two budgets": (
        lambda: presets.dynamic_dora(final_rank=4, budget=Budget(share=0.5)),
        ValueError,
        r"give final_rank or budget, not both. Got final_rank=4, budget=Budget\(share=0.5\).",
    ),
    "a budget that leaves the start open": (
        lambda: presets.dynamic_dora(budget=Budget(share=0.5)),
        ValueError,
        r"Budget\(share=0.5\) does not say how many components to start with; give initial_rank as well.",
    ),
    "shares that leave no window": (
        lambda: presets.dynamic_dora(final_rank=4, warmup=0.5, tail=0.5),
        ValueError,
        "warmup and tail are shares of the run that leave a window to prune in: .* Got warmup=0.5, tail=0.5.",
    ),
    "soft removal without a gain": (
        lambda: fit(
            Encoder(), AdapterInjection(LORA), RankPruning(RankPolicy(Cubic(), Taylor(), Budget(rank=2), soft=True))
        ),
        ValueError,
        "soft removal zeroes a component's gain, and the adapter at 'query' has none; use soft=False.",
    ),
    "no number of steps": (
        lambda: fit(Encoder(), *presets.dynamic_dora(final_rank=2), max_epochs=-1),
        MisconfigurationException,
        "RankPruning needs the number of optimizer steps, and the Trainer expects inf. Set max_steps, or max_epochs",
    ),
    "pruning where only the module knows its steps": (
        lambda: fit(Manual(), AdapterInjection(LORA), pruning(rank=2)),
        MisconfigurationException,
        "Manual optimizes by hand, so only it knows how many optimizer steps an epoch has, .* Set max_steps, counted",
    ),
    "manual optimization": (
        lambda: fit(Manual(), AdapterInjection(LORA), Regularization({"dem": DEM()})),
        MisconfigurationException,
        r"Manual optimizes by hand \(automatic_optimization=False\).*call lightning_peft.regularized\(loss, terms",
    ),
    "a step that returns no loss": (
        lambda: fit(NoLoss(), AdapterInjection(LORA), Regularization({"dem": DEM()})),
        MisconfigurationException,
        "training_step of NoLoss must return a scalar loss, or a dictionary with one under .* Got a dict of logits.",
    ),
}


@pytest.mark.parametrize(("wrong", "error", "says"), TABLE.values(), ids=TABLE.keys())
def test_a_wrong_set_up_is_told_in_a_sentence(wrong: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        wrong()


def saved(folder: Path) -> Path:
    trainer = fit(Encoder(), *presets.dynamic_dora(final_rank=2), max_steps=12)
    trainer.save_checkpoint(folder / "some.ckpt")
    return folder / "some.ckpt"


def another_base(path: Path) -> None:
    fit(Encoder(seed=1), *presets.dynamic_dora(final_rank=2), ckpt_path=path)


def other_adapters(path: Path) -> None:
    fit(Encoder(), *presets.dynamic_dora(final_rank=3), ckpt_path=path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    fit(Encoder(), *presets.dynamic_dora(final_rank=2), ckpt_path=path)


def tampered(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["state_dict"]["query.A"][0, 0] += 1
    torch.save(content, path)
    fit(Encoder(), *presets.dynamic_dora(final_rank=2), ckpt_path=path)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (another_base, "was made for another base model: 'query.base.bias' differs"),
        (other_adapters, r"holds other adapters than this model has: at 'query' it has DynamicDoRA\(rank=3"),
        (truncated, r"some.ckpt cannot be read: it is cut short, damaged, or holds more than tensors"),
        (tampered, "was changed after it was written: its contents do not match their digest. Use another copy."),
    ],
)
def test_a_wrong_checkpoint_is_told_in_a_sentence(wrong: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(AdapterFileError, match=says):
        wrong(path)


def test_stopping_before_the_last_cut_is_a_warning() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = True

    with pytest.warns(
        UserWarning, match="Training stopped at step 1 of 12, before the rank schedule's last cut at step 6"
    ):
        fit(Encoder(), *presets.dynamic_dora(final_rank=2), Stop())


def test_the_methods_own_class_is_named() -> None:
    with pytest.raises(
        TypeError, match="DynamicDoRA cannot adapt this layer: Conv1d is not a Linear, Conv1D or Embedding"
    ):
        DynamicDoRA(nn.Conv1d(4, 4, 1))

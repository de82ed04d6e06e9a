"""Two learning rates in one adapter: asked for by its class, followed by modules, told where nobody follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lightning_peft import Adapter, AdapterInjection, LoRA, inject
from lightning_peft.adapters.lora import LoRA as Kind
from lightning_peft.modules.optimization import adamw
from lightning_peft.surgery import adapters, split_by_rate


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA whose B trains 16 times as fast."""
    monkeypatch.setattr(Kind, "rates", lambda self: {"B": 16.0})


def net() -> nn.Module:
    made = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    inject(made, lambda layer: LoRA(layer, rank=2), targets=["0", "2"], train=["4"])
    return made


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


@pytest.mark.usefixtures("faster")
def test_a_group_is_split_and_the_rest_is_copied() -> None:
    module = net()
    found = split_by_rate(
        module, [{"name": "all", "params": trainable(module), "lr": 0.01, "weight_decay": 0.3}, {"params": [], "lr": 1}]
    )
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in found] == [("all", 0.01, 0.3), ("all x 16", 0.16, 0.3)]
    fast = {id(adapter.B) for adapter in adapters(module).values()}
    assert {id(p) for p in found[1]["params"]} == fast
    assert {id(p) for p in found[0]["params"]} == {id(p) for p in trainable(module)} - fast


def test_without_a_wish_nothing_changes() -> None:
    module = net()
    group = {"params": trainable(module), "lr": 0.01, "betas": (0.5, 0.9)}
    assert split_by_rate(module, [group]) == [group]
    assert split_by_rate(module, [{"params": trainable(module)}]) == [{"params": trainable(module)}]


@pytest.mark.usefixtures("faster")
def test_a_group_without_a_rate_cannot_be_split() -> None:
    module = net()
    with pytest.raises(ValueError, match="asks for 16 times a learning rate, and its parameter group has no 'lr'"):
        split_by_rate(module, [{"params": trainable(module)}])


class Module(L.LightningModule):
    def __init__(self, configure: Callable[[Module], Any]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        self.configure = configure
        self.seen: list[list[float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
        loss: Tensor = self.net(batch).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def fit(configure: Callable[[Module], Any]) -> Module:
    module = Module(configure)
    L.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[AdapterInjection(lambda layer: LoRA(layer, rank=2), verbose=False)],
    ).fit(module, DataLoader(torch.randn(16, 4), batch_size=4))  # type: ignore[arg-type]  # fmt: skip
    return module


@pytest.mark.usefixtures("faster")
def test_property_two_groups_are_there_and_scheduled() -> None:
    """The modules' own optimizer: both rise, both fall, at one ratio."""
    groups = [{"name": "model", "lr": 0.01}]
    seen = fit(
        lambda module: adamw(
            module, [{**groups[0], "params": trainable(module)}], 0.0, warmup=0.5, schedule="linear", advice="-"
        )
    ).seen
    assert len(seen) == 4
    assert len({rates[0] for rates in seen}) > 2
    assert all(fast == pytest.approx(16 * slow) for slow, fast in seen)


def one_rate(module: Module) -> Any:
    optimizer = torch.optim.SGD(trainable(module), lr=0.01)
    return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, lambda step: step / 10)}  # starts at 0


def split(module: Module) -> Any:
    optimizer = torch.optim.SGD(split_by_rate(module, [{"params": trainable(module), "lr": 0.01}]))
    return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, lambda step: step / 10)}


@pytest.mark.usefixtures("faster")
def test_who_does_not_follow_is_told() -> None:
    with pytest.warns(UserWarning, match=r"'net\.0' asks for 16 times the learning rate for its 'B', and the optimiz"):
        fit(one_rate)


@pytest.mark.usefixtures("faster")
def test_who_follows_is_not_told() -> None:
    fit(split)  # a warning would be an error


def test_who_is_not_asked_is_not_told() -> None:
    fit(one_rate)


def test_by_default_nobody_asks() -> None:
    assert all(Adapter.rates(adapter) == {} for adapter in adapters(net()).values())

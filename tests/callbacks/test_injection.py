from __future__ import annotations

import copy
import logging
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import Adapter, AdapterInjection, DynamicDoRA, LoRA, inject
from lightning_peft.surgery import adapters

LORA = partial(LoRA, rank=2)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


class Module(LightningModule):
    """Somebody's module: it knows nothing of adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module = network()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return (self(batch) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class InConfigureModel(Module):
    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.net = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.net is None:
            self.net = network()


class InSetup(Module):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            self.net = network()


class Reader(nn.Module):
    """A layer's owner that never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": 3,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})


def data(batches: int = 4) -> DataLoader[Tensor]:
    return DataLoader(torch.linspace(-1, 1, batches * 4 * 8).view(batches * 4, 8), batch_size=4)  # type: ignore[arg-type]


def base_of(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if ".base." in name}


@pytest.mark.parametrize("kind", [Module, InConfigureModel, InSetup])
def test_adapters_are_there_before_the_optimizer_whenever_the_layers_are_built(kind: type[Module]) -> None:
    seen: list[set[str]] = []

    class Watched(kind):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> torch.optim.Optimizer:
            seen.append({name for name, p in self.named_parameters() if p.requires_grad})
            optimizer: torch.optim.Optimizer = super().configure_optimizers()
            return optimizer

    module, injection = Watched(), AdapterInjection(LORA)
    trainer(injection).fit(module, data())
    trained = {"net.0.A", "net.0.B", "net.2.A", "net.2.B", "net.4.weight", "net.4.bias"}
    assert seen == [trained]
    assert injection.injection is not None
    assert injection.injection.adapted == ("net.0", "net.2")
    assert all(adapter.B.any() for adapter in adapters(module).values())  # type: ignore[operator, union-attr]
    assert not {"setup", "configure_model"} & set(vars(module))


def test_the_base_is_as_it_was_after_training() -> None:
    module = Module()
    before = copy.deepcopy(module.net.state_dict())
    trainer(AdapterInjection(LORA)).fit(module, data())
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        layer, part = name.split(".")
        assert torch.equal(module.net.state_dict()[f"{layer}.base.{part}"], before[name])
    assert not torch.equal(module.net.state_dict()["4.weight"], before["4.weight"])


@pytest.mark.parametrize("kind", [Module, InConfigureModel, InSetup])
def test_every_entry_point_finds_adapters_and_none_adds_more(kind: type[Module]) -> None:
    class Evaluated(kind):  # type: ignore[misc, valid-type]
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val", (self(batch) - 1).square().mean())

        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self(batch)

    module = Evaluated()
    run = trainer(AdapterInjection(LORA))
    run.validate(module, data(), verbose=False)
    found = adapters(module)
    assert set(found) == {"net.0", "net.2"}
    run.fit(module, data(), data())
    run.test(module, data(), verbose=False)
    run.predict(module, data())
    other = trainer(AdapterInjection(partial(DynamicDoRA, rank=3)))
    other.fit(module, data(), data())
    assert all(one is other for one, other in zip(adapters(module).values(), found.values(), strict=True))
    assert sum(isinstance(child, Adapter) for child in module.modules()) == 2


def test_adapters_of_the_users_own_are_left_alone() -> None:
    module, injection = Module(), AdapterInjection(LORA)
    inject(module, partial(DynamicDoRA, rank=3), ["net.0"])
    trainer(injection).fit(module, data())
    assert list(adapters(module)) == ["net.0"]
    assert injection.injection is None


def test_it_says_what_was_adapted_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    run, module = trainer(AdapterInjection(LORA)), Module()
    run.fit(module, data())
    run.predict(module, data())
    trainer(AdapterInjection(LORA, verbose=False)).fit(Module(), data())
    assert caplog.text.count("Adapted 2 layers with 64 trainable parameters:") == 1
    assert "Trained beside them: net.4 (9 parameters)." in caplog.text


def test_targets_and_train_are_those_of_inject() -> None:
    module = Module()
    trainer(AdapterInjection(LORA, targets=["net.2"], train=["net.0.bias"])).fit(module, data())
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"net.2.A", "net.2.B", "net.0.bias"}
    with pytest.raises(ValueError, match=r"targets=\['q_proj'\] matches no layer; the nearest names are"):
        trainer(AdapterInjection(LORA, targets=["q_proj"])).fit(Module(), data())


def test_a_parameter_in_no_optimizer_is_named() -> None:
    class Early(Module):
        """Collects its parameters before the adapters are there."""

        def __init__(self) -> None:
            super().__init__()
            self.mine = list(self.net.parameters())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.mine, lr=0.1)

    with pytest.raises(
        MisconfigurationException,
        match="'A' of the adapter at 'net.0' is in no optimizer, so it would not be trained. Let configure_optimizers",
    ):
        trainer(AdapterInjection(LORA)).fit(Early(), data())


def test_a_layer_that_is_read_and_not_called_is_adapted_all_the_same() -> None:
    module = Module()
    module.net = nn.Sequential(Reader(), nn.Linear(8, 1))
    trainer(AdapterInjection(LORA)).fit(module, data())  # warnings are errors: nobody is idle
    adapter = adapters(module)["net.0.layer"]
    assert adapter.B.any()  # type: ignore[operator, union-attr]
    x = torch.randn(3, 8)
    torch.testing.assert_close(module.net[0](x), F.linear(x, adapter.effective_weight(), adapter.bias))


class Hidden(nn.Module):
    """Calls a layer through a list that is no ModuleList: what stands in the layer's place is never reached."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.layers = [self.layer]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0](x)
        return y


def test_an_adapter_that_nobody_reaches_is_a_warning_with_its_name() -> None:
    module = Module()
    module.net = nn.Sequential(Hidden(), nn.Linear(8, 8), nn.Linear(8, 1))
    with pytest.warns(
        UserWarning, match=r"1 adapters took no part in the first loss: net.0.layer. The model neither calls"
    ):
        trainer(AdapterInjection(LORA)).fit(module, data())


def test_many_of_them_are_counted() -> None:
    module = Module()
    module.net = nn.Sequential(*(Hidden() for _ in range(7)), nn.Linear(8, 1))
    with pytest.warns(UserWarning, match=r"7 adapters took no part .*: net.0.layer, .*net.4.layer, \.\.\.\. The model"):
        trainer(AdapterInjection(LORA)).fit(module, data())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_first_batch_without_a_loss_is_not_held_against_the_adapters(accumulate: int) -> None:
    class Skips(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            return None if batch_idx < 2 else super().training_step(batch, batch_idx)

    trainer(AdapterInjection(LORA), max_steps=4, accumulate_grad_batches=accumulate).fit(Skips(), data(12))
    module = Skips()
    module.net = nn.Sequential(Hidden(), nn.Linear(8, 8), nn.Linear(8, 1))
    with pytest.warns(UserWarning, match="1 adapters took no part in the first loss"):
        trainer(AdapterInjection(LORA), max_steps=4, accumulate_grad_batches=accumulate).fit(module, data(12))


def test_an_adapter_that_its_owner_froze_is_not_idle() -> None:
    module = Module()
    inject(module, LORA)
    adapters(module)["net.0"].requires_grad_(False)
    trainer(AdapterInjection(LORA)).fit(module, data())


def test_callbacks_that_copy_the_module_come_after() -> None:
    average = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    with pytest.raises(
        MisconfigurationException,
        match="StochasticWeightAveraging comes before AdapterInjection in the Trainer's callb",
    ):
        trainer(average, AdapterInjection(LORA)).fit(Module(), data())
    module = Module()
    trainer(AdapterInjection(LORA), StochasticWeightAveraging(0.1, 1), max_steps=-1, max_epochs=3).fit(module, data())
    assert all(adapter.B.any() for adapter in adapters(module).values())  # type: ignore[operator, union-attr]


def test_it_trains_as_inject_by_hand_does() -> None:
    """The callback's twin: bitwise the same run."""
    results = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        module = Module()
        if by_hand:
            inject(module, LORA)
        trainer(*([] if by_hand else [AdapterInjection(LORA)])).fit(module, data())
        results.append(module.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())

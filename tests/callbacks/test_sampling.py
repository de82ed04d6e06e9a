"""PosteriorSampling: predictions as averages over drawn networks, in every entry point but fit."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.modeling_outputs import SequenceClassifierOutput

from lightning_peft import (
    AdapterInjection,
    LoRA,
    PACBayes,
    PosteriorSampling,
    Regularization,
    inject,
    posterior_predict,
)
from lightning_peft.prediction import mean_log_probability
from lightning_peft.regularizers.posterior import Posterior

LORA = partial(LoRA, rank=2)


class Net(L.LightningModule):
    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        return {"loss": nn.functional.cross_entropy(logits, batch[1]), "logits": logits}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/nll", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/nll", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.02)


def data() -> DataLoader[Any]:
    g = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(20, 4, generator=g), torch.randint(0, 3, (20,), generator=g)), 8)


def trainer(*callbacks: Any, **options: Any) -> L.Trainer:
    terms = [AdapterInjection(LORA), Regularization({"pac": PACBayes(sigma=0.3)})]
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[*terms, *callbacks], **options,
    )  # fmt: skip


def adapted() -> Net:
    module = Net()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        inject(module, LORA)
    return module


def predicted(module: Net, *callbacks: Any) -> Tensor:
    found = trainer(*callbacks).predict(module, data())
    assert found is not None
    return torch.cat(found)  # type: ignore[arg-type]


def test_predictions_are_the_average_by_hand() -> None:
    module = adapted()
    found = predicted(module, PosteriorSampling(samples=3, seed=5))
    posterior: Any = module.peft_terms.pac.posterior  # type: ignore[union-attr]
    generator, expected = torch.Generator().manual_seed(5), []
    for x, _ in data():
        draws = []
        for _ in range(3):
            with posterior.sampled(module, generator), torch.no_grad():
                draws.append(module.net(x).softmax(-1))
        expected.append(torch.stack(draws).mean(0))
    torch.testing.assert_close(found.exp(), torch.cat(expected))
    assert float((found.exp().sum(-1) - 1).abs().max()) < 1e-6
    mean = predicted(module)
    with torch.no_grad():
        torch.testing.assert_close(mean, torch.cat([module.net(x) for x, _ in data()]))
    assert float((mean.softmax(-1) - found.exp()).abs().max()) > 0.01


def test_it_begins_anew_and_leaves_everything_as_it_was() -> None:
    module = adapted()
    torch.manual_seed(0)
    predicted(module)
    state = torch.get_rng_state()  # loaders draw
    torch.manual_seed(0)
    first = predicted(module, PosteriorSampling(samples=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, predicted(module, PosteriorSampling(samples=2)))
    assert not torch.equal(first, predicted(module, PosteriorSampling(samples=2, seed=1)))
    assert "forward" not in module.net.__dict__


def test_validation_and_test_use_it_and_a_fit_does_not() -> None:
    module = adapted()
    sampling = PosteriorSampling(samples=4, of="net")
    values = {}
    for name, callbacks in {"mean": [], "drawn": [sampling]}.items():
        (tested,) = trainer(*callbacks).test(module, data(), verbose=False)
        (validated,) = trainer(*callbacks).validate(module, data(), verbose=False)
        assert tested["test/nll"] == validated["val/nll"]
        values[name] = tested["test/nll"]
    assert values["mean"] != values["drawn"]
    logged = []
    for callbacks in ([], [PosteriorSampling(samples=4)]):
        fresh, run = adapted(), trainer(*callbacks)
        torch.manual_seed(0)
        run.fit(fresh, data(), data())
        logged.append(float(run.callback_metrics["val/nll"]))
    assert logged[0] == logged[1]


def test_outputs_keep_their_kind() -> None:
    module = adapted()
    posterior = Posterior(module, sigma=0.3)
    x = torch.randn(5, 4)

    def call() -> SequenceClassifierOutput:
        logits = module.net(x)
        return SequenceClassifierOutput(loss=logits.square().mean(), logits=logits)

    with torch.no_grad():
        found = posterior_predict(call, module, posterior, 2, torch.Generator().manual_seed(0))
        plain = posterior_predict(lambda: module.net(x), module, posterior, 2, torch.Generator().manual_seed(0))
        as_dict = posterior_predict(
            lambda: {"logits": module.net(x), "n": 3}, module, posterior, 2, torch.Generator().manual_seed(0)
        )
    assert isinstance(found, SequenceClassifierOutput)
    assert torch.equal(found.logits, plain)
    assert torch.equal(found["logits"], as_dict["logits"])
    assert as_dict["n"] == 3
    assert found.loss.dim() == 0
    with pytest.raises(ValueError, match="no logits to average in what the module returns: got NoneType"):
        posterior_predict(lambda: {"x": 1}, module, posterior, 1)
    with pytest.raises(ValueError, match="at least 1. Got 0"):
        posterior_predict(call, module, posterior, 0)


def test_extreme_logits_do_not_overflow() -> None:
    found = mean_log_probability([torch.tensor([1e4, 0.0]), torch.tensor([0.0, 1e4])]).exp()
    assert found.tolist() == [0.5, 0.5]


def test_what_is_wrong_is_told() -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="Two has 2 children with parameters, net, other, so there is no telling"):
        predicted(Two(), PosteriorSampling())
    with pytest.raises(ValueError, match="there is no module 'nett' in Net"):
        predicted(adapted(), PosteriorSampling(of="nett"))
    bare = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[AdapterInjection(LORA), PosteriorSampling()],
    )  # fmt: skip
    with pytest.raises(MisconfigurationException, match="and Net has none. Have one PACBayes term"):
        bare.predict(Net(), data())
    with pytest.raises(ValueError, match="samples is how many networks are drawn for a batch, at least 1. Got 0."):
        PosteriorSampling(samples=0)

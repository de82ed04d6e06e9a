"""PEFT's own losses are terms: equal to calling PEFT by hand, and each once."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from peft_models import Job, base, fit, lora
from torch import Tensor, nn

from lightning_peft import DEM, Adoption, Regularization
from lightning_peft.interop.losses import KaSA

CONFIGS = {
    "kasa": lambda: lora(kasa_config=peft.KasaConfig(beta=0.1, gamma=0.05)),
    "monteclora": lambda: lora(monteclora_config=peft.MontecloraConfig(kl_loss_weight=1e-3)),
}
pytestmark = pytest.mark.skipif(not hasattr(peft, "KasaConfig"), reason="this PEFT has no KaSA; 0.21 is the first")
METHODS = {"kasa": "_get_kasa_loss", "monteclora": "_get_monteclora_loss"}


def build(kind: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return get_peft_model(base(), CONFIGS[kind]())


class ByHand(Job):
    """Adds PEFT's loss as its documentation says."""

    def __init__(self, kind: str) -> None:
        super().__init__(model=build(kind))
        self.kind = kind

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + getattr(self.model.base_model, METHODS[self.kind])()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_to_calling_peft_by_hand(kind: str, accumulate: int) -> None:
    wanted, job = ByHand(kind), Job(model=build(kind))
    fit(wanted, Adoption(losses=False), accumulate_grad_batches=accumulate)
    trainer = fit(job, Adoption(), accumulate_grad_batches=accumulate)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(job.state_dict()[name], tensor), name
    assert trainer.callback_metrics[f"loss/{kind}"] > 0
    assert set(trainer.callback_metrics) == {"loss/task", f"loss/{kind}"}
    plain = Job(model=build(kind))
    fit(plain, Adoption(losses=False), accumulate_grad_batches=accumulate)
    assert any(not torch.equal(plain.state_dict()[name], tensor) for name, tensor in wanted.state_dict().items())


def test_beside_terms_of_the_user_and_once() -> None:
    wanted, job = ByHand("kasa"), Job(model=build("kasa"))
    fit(wanted, Adoption(losses=False))
    given = Regularization({"mine": KaSA()})
    trainer = fit(job, Adoption(), given)
    assert "loss/kasa" not in trainer.callback_metrics
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(job.state_dict()[name], tensor)
    both = Regularization({"dem": DEM(0.1)})
    trainer = fit(Job(model=build("kasa")), Adoption(), both)
    assert {"loss/dem", "loss/kasa"} <= set(trainer.callback_metrics)
    assert list(both.terms) == ["dem"]  # taken out again


def test_explicit_term_without_such_an_adapter() -> None:
    with pytest.raises(RuntimeError, match="KaSA found no layer of an active PEFT adapter"):
        KaSA()(nn.Linear(2, 2), None, None)

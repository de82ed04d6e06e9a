"""Certificates on two processes: the figure that one has, each example counted once, and one file."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from hosts import STRATEGIES, Host, Sharded, vectors
from torch.utils.data import Subset

from lightning_peft import AdapterInjection, LoRA, PACBayes, Regularization, RiskCertificate
from lightning_peft.testing.processes import run_processes

pytestmark = pytest.mark.dist

LORA = partial(LoRA, rank=2)
EXAMPLES = 83  # in batches of eight: eleven, of which the last has three; one process has one batch more


class Frozen(L.Callback):
    """No step moves anything: whatever the order of sums in training, the same Q is certified everywhere."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0


class Classifier(Host):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        return {"loss": torch.nn.functional.cross_entropy(logits, batch[1]), "logits": logits}


class ShardedClassifier(Classifier, Sharded):
    pass


def certify(kinds: list[str], unit: str, world: int, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for kind in kinds:
        torch.manual_seed(5)
        model = (ShardedClassifier if kind == "fsdp2" else Classifier)()
        path = folder / f"{kind}-{unit}-{world}.json"
        made = RiskCertificate(Subset(vectors(), range(EXAMPLES)), 2, unit, batch_size=8, path=path)  # type: ignore[arg-type]
        term = PACBayes(examples=96, sigma=0.3, prior_sigma=0.5)
        trainer = L.Trainer(
            accelerator="cpu", devices=world, strategy=STRATEGIES[kind](world), use_distributed_sampler=False,
            logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            max_steps=2, callbacks=[AdapterInjection(LORA, train=[]), Regularization({"pac": term}), Frozen(), made],
        )  # fmt: skip
        trainer.fit(model)
        assert made.certificate is not None
        found[kind] = dataclasses.asdict(made.certificate)
    return found


@pytest.mark.parametrize("unit", ["batch", "pass"])
def test_two_processes_certify_what_one_does(unit: str, tmp_path: Path) -> None:
    (alone,) = run_processes(1, certify, ["single"], unit, 1, tmp_path)
    reference = alone["single"]
    assert reference["examples"] == EXAMPLES
    assert 0 < reference["errors"] < 2 * EXAMPLES
    for both in run_processes(2, certify, ["ddp", "fsdp2"], unit, 2, tmp_path):
        for kind in ("ddp", "fsdp2"):
            assert both[kind] == reference, kind
    assert len(list(tmp_path.glob("*.json"))) == 3

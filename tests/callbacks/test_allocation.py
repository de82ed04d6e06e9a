"""PEFT's AdaLoRA, driven by one callback: as by hand, resumable in its last phase, its penalty once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import AdaLoraConfig, get_peft_model
from peft_models import STEPS, Job, base, build, data, fit
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_peft import (
    AdapterCheckpoint,
    Adoption,
    Budget,
    Cubic,
    RankAllocation,
    RankBudget,
    RankMonitor,
    RankPolicy,
    RankPruning,
    Taylor,
)
from lightning_peft.interop.losses import AdaLoRAOrthogonality

pytestmark = pytest.mark.filterwarnings("ignore:.*Checkpoint directory")


def by_hand(steps: int = STEPS, penalty: bool = True) -> Any:
    """The loop that PEFT's documentation gives, with the penalty that it leaves out for a model of no task."""
    model = build("adalora")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        loader = data()
        while step < steps:
            for x, y in loader:
                step += 1
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                if penalty:
                    loss = loss + AdaLoRAOrthogonality()(model, None, None)
                loss.backward()
                optimizer.step()
                model.base_model.update_and_allocate(step)
    return model


def test_driven_as_by_hand() -> None:
    wanted = by_hand()
    job = Job("adalora")
    fit(job, RankAllocation())
    for name, parameter in wanted.named_parameters():
        assert torch.equal(job.model.get_parameter(name), parameter), name
    pattern = job.model.peft_config["default"].rank_pattern
    assert pattern == wanted.peft_config["default"].rank_pattern
    assert sum(sum(row) for row in pattern.values()) == 4


def test_accumulated_micro_batches_are_one_step() -> None:
    calls: list[int] = []
    model = get_peft_model(
        base(), AdaLoraConfig(init_r=4, target_r=2, total_step=12, target_modules=["query", "value"])
    )
    update = model.base_model.update_and_allocate
    object.__setattr__(model.base_model, "update_and_allocate", lambda step: (calls.append(step), update(step)))
    fit(Job(model=model), RankAllocation(), accumulate_grad_batches=2)
    assert calls == list(range(1, 13))


@pytest.mark.parametrize("stop", [10, 21])  # amid the cuts, and in the last phase
@pytest.mark.parametrize("adopted", [False, True])
def test_resume_is_exact(stop: int, adopted: bool, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        mine = [Adoption(verbose=False), RankAllocation(), RankMonitor()] if adopted else [RankAllocation()]
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="{step}")
        return [*mine, AdapterCheckpoint(), saving]

    whole, resumed = Job("adalora"), Job("adalora")
    fit(whole, *callbacks(), enable_checkpointing=True)
    fit(resumed, *callbacks(), ckpt_path=tmp_path / f"step={stop}.ckpt", enable_checkpointing=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    pattern = whole.model.peft_config["default"].rank_pattern
    assert resumed.model.peft_config["default"].rank_pattern == pattern
    if adopted:
        assert sum(RankBudget.of(resumed).ranks().values()) == 4


def test_peft_alone_cannot_go_on_in_the_last_phase() -> None:
    """What the callback is for: the model's state has no rank pattern, and no averages."""
    state = by_hand(steps=16).state_dict()
    fresh = build("adalora")
    fresh.load_state_dict(state)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'keys'"):
        fresh.base_model.update_and_allocate(21)


class Bert(Job):
    """Lets the model compute the loss, where PEFT adds its penalty, and validates."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = BertForSequenceClassification(
                BertConfig(
                    vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                    max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
                )
            )  # fmt: skip
            config = AdaLoraConfig(
                task_type="SEQ_CLS", init_r=3, target_r=2, total_step=STEPS, target_modules=["query", "value"]
            )
            super().__init__(model=get_peft_model(model, config))
        self.seen: list[tuple[float, float]] = []
        self.valid: list[tuple[float, float]] = []

    def _loss(self, batch: Any) -> tuple[torch.Tensor, float]:
        out = self.model(input_ids=batch[0], labels=batch[1])
        return out.loss, nn.functional.cross_entropy(out.logits, batch[1]).item()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, task = self._loss(batch)
        self.seen.append((loss.item(), task))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, task = self._loss(batch)
        self.valid.append((loss.item(), task))

    def val_dataloader(self) -> Any:
        return data(shuffle=False)


@pytest.mark.parametrize("driver", [RankAllocation, Adoption])
def test_penalty_is_in_the_training_loss_once_and_never_at_evaluation(driver: Any) -> None:
    job = Bert()
    x, y = next(iter(data()))
    job.model.train()
    plain = job.model(input_ids=x, labels=y)
    penalty = plain.loss.item() - nn.functional.cross_entropy(plain.logits, y).item()
    term = AdaLoRAOrthogonality()(job, None, None)
    assert penalty > 0.5  # PEFT's own, which is there at evaluation too
    assert term.item() == pytest.approx(penalty, abs=1e-6)
    totals: list[float] = []

    mine = RankAllocation(warmup=0.0, tail=0.25) if driver is RankAllocation else Adoption(verbose=False)
    trainer = fit(job, mine, _watch(totals), max_epochs=1)
    assert all(loss == task for loss, task in job.seen + job.valid)  # what PEFT adds is left out
    assert len(job.valid) > 0
    assert totals[0] == pytest.approx(penalty, abs=1e-6)
    assert trainer.callback_metrics["loss/adalora_orthogonality"] == pytest.approx(totals[-1], abs=1e-6)
    again = job.model(input_ids=x, labels=y)  # and PEFT's own forward is back
    assert again.loss.item() > nn.functional.cross_entropy(again.logits, y).item() + 0.1


def _watch(totals: list[float]) -> Any:
    class Watch(Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
            totals.append(loss.item() - pl_module.seen[-1][1])

    return Watch()


def test_penalty_matches_pefts_gradient() -> None:
    job = Bert()
    with torch.no_grad():
        for name, p in job.model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    x, y = next(iter(data()))
    out = job.model(input_ids=x, labels=y)
    theirs = out.loss - nn.functional.cross_entropy(out.logits, y)
    parameters = [p for n, p in job.model.named_parameters() if "lora_A" in n or "lora_B" in n]
    wanted = torch.autograd.grad(theirs, parameters)
    got = torch.autograd.grad(AdaLoRAOrthogonality()(job, None, None), parameters)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


def test_an_unused_layer_and_shares_of_the_run() -> None:
    class Unused(Job):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            net = self.model.base_model.model
            return nn.functional.cross_entropy(net.classifier(net.value(net.words(batch[0]).mean(1)[:, :12])), batch[1])

    job = Unused("adalora")
    fit(job, RankAllocation(warmup=0.1, tail=0.3, losses=False), max_epochs=1)
    config = job.model.peft_config["default"]
    assert (config.total_step, config.tinit, config.tfinal) == (8, 0, 2)
    assert sum(sum(row) for row in config.rank_pattern.values()) == 4


def test_what_is_refused() -> None:
    def told(kind: str = "adalora", model: Any = None, *others: Any, **options: Any) -> str:
        with pytest.raises(MisconfigurationException) as error:
            fit(Job(kind, model), *others, RankAllocation(), **options)
        return str(error.value)

    assert "found none in Job. Build one with get_peft_model" in told("lora")
    assert "was made for total_step=24 and the Trainer takes 8 optimizer steps" in told(max_epochs=1)
    same = AdaLoraConfig(init_r=2, target_r=2, total_step=STEPS, target_modules=["query"])
    assert "starts with 2 components and is to end with 2" in told("", get_peft_model(base(), same))
    pruning = RankPruning(RankPolicy(Cubic(), Taylor(), Budget(rank=2)))
    assert "the two would undo each other" in told("adalora", None, pruning)
    with pytest.raises(MisconfigurationException, match="warm-up of 6 and tail of 3 steps leave nothing of the 8"):
        fit(Job("adalora"), RankAllocation(warmup=0.8, tail=0.4), max_epochs=1)
    with pytest.raises(ValueError, match="tail is a share of the run, in .0, 1.. Got 1.5"):
        RankAllocation(tail=1.5)

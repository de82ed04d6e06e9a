"""Noise on two processes: each draws its own, all have one posterior, and what cannot work says so."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from hosts import STRATEGIES, Host, Sharded, ShardedAroundAdapters
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    LoRA,
    PACBayes,
    Regularization,
    adapter_state_dict,
    inject,
)
from lightning_peft.testing.processes import run_processes

pytestmark = pytest.mark.dist

LORA = partial(LoRA, rank=2)


class Noted(Host):
    """Writes down what stands in a parameter's place, and the divergence of every step."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(self.net[0][0].A.detach().tolist())  # type: ignore[index,union-attr]
        return super().training_step(batch, batch_idx)


class NotedAround(Noted, ShardedAroundAdapters):
    """With adapters of another start on every process."""

    adapter = LORA

    def shard(self, **options: Any) -> None:
        torch.manual_seed(self.global_rank)
        super().shard(**options)


class Reentrant(Host):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.net, x.requires_grad_(), use_reentrant=True)  # type: ignore[assignment]
        return y


class EachItsOwn(L.Callback):
    """Adapters of another start on every process, before anything is made of them."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        torch.manual_seed(trainer.global_rank)
        inject(pl_module, LORA)


class Divergence(L.Callback):
    def __init__(self) -> None:
        self.kl: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.kl.append(float(pl_module.peft_terms["pac"].figures()["kl"]))  # type: ignore[index,union-attr,operator]


def run(kind: str, model: L.LightningModule, *first: L.Callback, **options: Any) -> dict[str, Any]:
    model.seen = []  # type: ignore[assignment]
    term, kl = PACBayes("f_quad", risk="loss", sigma=0.05, **options), Divergence()
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=STRATEGIES[kind](2), use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, max_steps=5,
        callbacks=[*first, AdapterInjection(LORA), Regularization({"pac": term}), AdapterCheckpoint(), kl],
    )  # fmt: skip
    trainer.fit(model)
    assert term.posterior is not None
    return {
        "seen": model.seen,
        "kl": kl.kl,
        "prior": term.posterior.prior_mean.tolist(),
        "offset": term.posterior.offset.detach().tolist(),
        "examples": term.examples,
    }


def train(jobs: list[str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    made: dict[str, Any] = {
        "ddp": lambda: run("ddp", Noted()),
        "ddp alike": lambda: run("ddp", Noted(), streams="alike"),
        "ddp start": lambda: run("ddp", Noted(), EachItsOwn()),
        "fsdp2 start": lambda: run("fsdp2 around", NotedAround()),
        "fsdp2 head": lambda: run("fsdp2", Sharded()),
        "fsdp2 no head": lambda: run("fsdp2", Sharded(), over=["A", "B"])["kl"],
        "ddp reentrant": lambda: run("ddp", Reentrant()),
    }
    found: dict[str, Any] = {}
    for job in jobs:
        torch.manual_seed(5)
        try:
            found[job] = made[job]()
        except Exception as error:
            found[job] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    jobs = ["ddp", "ddp alike", "ddp start", "fsdp2 start", "fsdp2 head", "fsdp2 no head", "ddp reentrant"]
    return run_processes(2, train, jobs, timeout=300)


@pytest.mark.parametrize("job", ["ddp", "ddp alike", "ddp start", "fsdp2 start"])
def test_processes_have_one_posterior_and_draws_of_their_own(job: str, results: list[dict[str, Any]]) -> None:
    first, second = (each[job] for each in results)
    assert isinstance(first, dict), first
    assert len(first["kl"]) == 5
    for key in ("kl", "prior", "offset"):
        assert first[key] == second[key]
    pairs = [one == other for one, other in zip(first["seen"], second["seen"], strict=True)]
    assert pairs == [job == "ddp alike"] * 5
    assert first["examples"] == 96  # of both


def test_what_is_in_q_is_whole(results: list[dict[str, Any]]) -> None:
    for each in results:
        assert "'net.2.weight' is split over processes, and a posterior is over whole parameters." in each["fsdp2 head"]
        assert len(each["fsdp2 no head"]) == 5


def test_reentrant_checkpointing_is_refused_under_ddp(results: list[dict[str, Any]]) -> None:
    for each in results:
        assert "the term 'pac' has parameters in every layer that is computed again" in each["ddp reentrant"]


class Saves(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == 3:  # between the micro-batches of a step
            trainer.save_checkpoint(self.path)


def stop_and_go_on(kind: str, path: Path) -> list[str]:
    """What differs between a run and the rest of it, on this process."""
    torch.set_num_threads(1)

    def go(seed: int, *extra: L.Callback, ckpt_path: Path | None = None) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model = NotedAround() if kind == "fsdp2 around" else Noted()
        model.seen = []  # type: ignore[assignment]
        term = PACBayes("f_lambda", risk="loss", sigma=0.05, prior="per_tensor")
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy=STRATEGIES[kind](2), use_distributed_sampler=False, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, max_epochs=1,
            accumulate_grad_batches=2,
            callbacks=[AdapterInjection(LORA), Regularization({"pac": term}), AdapterCheckpoint(), *extra],
        )  # fmt: skip
        trainer.fit(model, ckpt_path=ckpt_path)
        noise = {f"noise {i}": torch.tensor(value) for i, value in enumerate(reversed(model.seen)) if i < 9}
        return noise | {name: value.clone() for name, value in adapter_state_dict(model).items()}

    whole, rest = go(5, Saves(path)), go(9, ckpt_path=path)
    assert whole.keys() == rest.keys()
    assert len([name for name in whole if name.startswith("noise")]) == 9
    return [name for name, value in whole.items() if not torch.equal(value, rest[name])]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2 around"])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_interrupted_is_uninterrupted(kind: str, tmp_path: Path) -> None:
    assert run_processes(2, stop_and_go_on, kind, tmp_path / "stop.ckpt") == [[], []]

"""Terms of pairs on two processes: equal to one process on the same global batches, resumed bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from hosts import STRATEGIES, Host, Job, Sharded, change, train_all
from torch.utils.data import DataLoader

from lightning_peft import (
    CLUB,
    VIB,
    AdapterCheckpoint,
    AdapterInjection,
    CategoricalCLUB,
    LoRA,
    Regularization,
    Regularizer,
    adapter_state_dict,
)
from lightning_peft.distributed import whole
from lightning_peft.testing.processes import run_processes

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")]

LORA = partial(LoRA, rank=2)


def clubs() -> dict[str, Regularizer]:
    given, label = (lambda batch: batch[0]), (lambda batch: batch[1])
    return {
        "club": CLUB(0.1, layer=r"net\.1", given=r"net\.0", hidden=8, inner_steps=2),
        "sampled": CLUB(0.1, layer=r"net\.1", given=given, given_features=16, hidden=8, negatives="sample"),
        "labels": CategoricalCLUB(0.1, layer=r"net\.1", label=label, classes=4, hidden=8, negatives="sample"),
    }


def bounds() -> dict[str, Regularizer]:
    return {
        "vib": VIB(r"net\.2", features=3, beta=0.01, growth="none", samples=2),
    }


TERMS: dict[str, Callable[[], dict[str, Regularizer]]] = {"upper bounds": clubs, "lower bounds": bounds}


def callbacks(name: str) -> list[L.Callback]:
    return [AdapterInjection(LORA), Regularization(TERMS[name]()), AdapterCheckpoint()]


JOBS = {name: Job(partial(callbacks, name), trainer={"max_epochs": 1}) for name in TERMS}
KINDS = ["ddp", "fsdp2"]


@pytest.fixture(scope="module")
def alone() -> dict[Any, Any]:
    (results,) = run_processes(1, train_all, [("single", name) for name in JOBS], JOBS, 1)
    assert all(isinstance(result, dict) for result in results.values()), results
    return results


@pytest.fixture(scope="module")
def together() -> list[dict[Any, Any]]:
    return run_processes(2, train_all, [(kind, name) for kind in KINDS for name in JOBS], JOBS, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", JOBS)
def test_two_processes_are_one(kind: str, name: str, alone: dict[Any, Any], together: list[dict[Any, Any]]) -> None:
    for each in together:
        result = each[kind, name]
        assert isinstance(result, dict), result
        assert change(result, alone["single", name]) < 1e-6


class Saves(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == 5:  # between the micro-batches of a step
            trainer.save_checkpoint(self.path)


def fit(model: L.LightningModule, kind: str, terms: dict[str, Regularizer], *extra: L.Callback, **options: Any) -> None:
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=STRATEGIES[kind](2), use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=[AdapterInjection(LORA), Regularization(terms), AdapterCheckpoint(), *extra],
    )  # fmt: skip
    trainer.fit(model, **options)


def stop_and_go_on(kind: str, folder: Path) -> list[str]:
    """What differs between a run and the rest of it, on this process."""
    torch.set_num_threads(1)

    def go(seed: int, *extra: L.Callback, ckpt_path: Path | None = None) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = Sharded() if kind == "fsdp2" else Host()
        terms = {**clubs(), **bounds()}
        fit(model, kind, terms, *extra, ckpt_path=ckpt_path)
        found: dict[str, Any] = {name: whole(value).clone() for name, value in adapter_state_dict(model).items()}
        for name, term in terms.items():
            progress = term.progress()
            found[f"{name} draws"] = torch.tensor(progress["draws"])
            for i, entry in ((progress.get("optimizer") or {}).get("state") or {}).items():
                found |= {f"{name} optimizer {i} {key}": value.clone() for key, value in entry.items()}
        return found

    path = folder / f"{kind}.ckpt"
    one, rest = go(5, Saves(path)), go(9, ckpt_path=path)
    assert one.keys() == rest.keys()
    assert len([name for name in one if "optimizer" in name]) == 3 * (8 + 8 + 4)
    return [name for name, value in one.items() if not torch.equal(value, rest[name])]


def resumed(folder: Path) -> dict[str, list[str]]:
    return {kind: stop_and_go_on(kind, folder) for kind in KINDS}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_interrupted_is_uninterrupted(tmp_path: Path) -> None:
    assert run_processes(2, resumed, tmp_path) == [{kind: [] for kind in KINDS}] * 2


class Uneven(Host):
    """The second process has a smaller batch, at the third step."""

    def train_dataloader(self) -> DataLoader[Any]:
        loader = super().train_dataloader()
        if self.global_rank == 1:
            loader.batch_sampler[2].pop()  # type: ignore[index]
        return loader


def refusal() -> str:
    torch.set_num_threads(1)
    model = Uneven()
    with pytest.raises(RuntimeError) as told:
        fit(model, "ddp", clubs())
    return f"{model.global_step} steps: {told.value}"


def test_batches_of_unequal_sizes_are_refused_on_all_processes() -> None:
    for told in run_processes(2, refusal, timeout=60):
        assert told.startswith("1 steps: this term compares the examples of all processes, and their batches are of")
        assert "(4, 33) on process 0, (3, 33) on process 1. Give every process as many: drop_last=True" in told

"""Learned masks on two processes: the masks, ranks and weights of one, and a stop that leaves no trace."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from hosts import STRATEGIES, Host, Job, ShardedAroundAdapters, change, train_all

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    BudgetPenalty,
    Factorized,
    MaskAlignment,
    RankSelection,
    Regularization,
    UntilTail,
    adapter_state_dict,
)
from lightning_peft.adapters import ars
from lightning_peft.testing.processes import run_processes

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:masks have learned to keep"),
]

FACTORIZED = partial(Factorized, trained=False)


class ShardedAroundFactors(ShardedAroundAdapters):
    """FSDP2: the factors are sharded as the weights would be, gates and what draws stay whole."""

    adapter = FACTORIZED


def method(masks: Any = "hypernetwork", compact: Any = "never") -> list[L.Callback]:
    """Draws that differ from the start, a tail in which the head goes on, and an event amid the run."""
    return [
        AdapterInjection(FACTORIZED),
        RankSelection(ars.policy(0.5, masks, tail=0.25, interval=6, shift=-0.2), compact),
        Regularization({"ars_budget": BudgetPenalty(0.5, UntilTail(16.0, 0.25)),
                        "ars_align": MaskAlignment(UntilTail(10.0, 0.25))}),
        AdapterCheckpoint(),
    ]  # fmt: skip


JOBS = {
    "hypernetwork": Job(method, around=ShardedAroundFactors),
    "monotone": Job(partial(method, "monotone"), around=ShardedAroundFactors),
    "cut": Job(partial(method, compact="final"), around=ShardedAroundFactors),
}


@cache
def results(world: int, *kinds: str) -> list[dict[Any, Any]]:
    runs = [(kind, name) for kind in kinds for name in JOBS]
    return run_processes(world, train_all, runs, JOBS, world, timeout=600)


@pytest.mark.parametrize(("name", "kind"), [
    ("hypernetwork", "ddp"), ("hypernetwork", "fsdp2 around"), ("monotone", "ddp"), ("cut", "ddp")
])  # fmt: skip
def test_two_processes_are_one(name: str, kind: str) -> None:
    alone = results(1, "single", "half")[0]["single", name]
    assert isinstance(alone, dict), alone
    for both in results(2, "ddp", "fsdp2 around"):
        result = both[kind, name]
        assert isinstance(result, dict), result
        assert result["events"] == alone["events"]
        assert result["masks"] == alone["masks"]
        assert change(result, alone) < 1e-5


def test_it_could_fail() -> None:
    alone = results(1, "single", "half")[0]
    assert change(alone["half", "hypernetwork"], alone["single", "hypernetwork"]) > 1e-3


def test_sharded_factors_are_not_cut() -> None:
    for both in results(2, "ddp", "fsdp2 around"):
        assert "RankSelection(compact=...) cuts parameters while training" in both["fsdp2 around", "cut"]


class Saves(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step in (5, 6, 10):  # of 12: between events, at one, in the tail
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def stop_and_go_on(kind: str, folder: Path) -> dict[int, list[str]]:
    """What differs between a run and those that were resumed, by step."""
    torch.set_num_threads(1)

    def run(seed: int, *extra: L.Callback, ckpt_path: Path | None = None) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = ShardedAroundFactors() if kind == "fsdp2 around" else Host()
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy=STRATEGIES[kind](2), use_distributed_sampler=False, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, max_epochs=1,
            callbacks=[*method(), *extra],
        )  # fmt: skip
        trainer.fit(model, ckpt_path=ckpt_path)
        state = adapter_state_dict(model)
        return {n: v.to_local() if hasattr(v, "to_local") else v for n, v in state.items()}

    whole = run(5, Saves(folder))
    found = {}
    for step in (5, 6, 10):
        rest = run(9, ckpt_path=folder / f"{step}.ckpt")
        found[step] = [name for name, value in whole.items() if not torch.equal(value, rest[name])]
    return found


@pytest.mark.parametrize("kind", ["ddp", "fsdp2 around"])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_interrupted_is_uninterrupted(kind: str, tmp_path: Path) -> None:
    assert run_processes(2, stop_and_go_on, kind, tmp_path) == [{5: [], 6: [], 10: []}] * 2

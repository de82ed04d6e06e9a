"""Weighted decompositions on two processes: those of one process on the same global batches, and the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from hosts import STRATEGIES, Host, Sharded

from lightning_peft import (
    AdapterInjection,
    Calibration,
    Factorized,
    RankBudget,
    WeightedSVD,
    inject,
    small_parameters,
)
from lightning_peft.adapters.factorized import Start
from lightning_peft.distributed import fingerprint, is_shard, whole
from lightning_peft.testing.processes import run_processes

pytestmark = pytest.mark.dist

WEIGHTINGS = ("none", "fisher", "taylor", "activation", "whiten")
Run = tuple[str, str, bool, Start]


TARGETS, HEAD = ["0.0", "1.0"], ["2"]


class ShardedFactors(Sharded):
    """A layer is decomposed while it is whole, and its factors are split as it would have been."""

    trained, start = True, "svd"

    def shard(self, **options: Any) -> None:
        inject(self, partial(Factorized, trained=self.trained, start=self.start), TARGETS, HEAD)  # type: ignore[arg-type]
        super().shard(ignored_params=set(small_parameters(self)), **options)


class Start(L.Callback):
    """What the first step finds."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        budget = RankBudget.of(pl_module)
        self.found: dict[str, Any] = {"ranks": budget.ranks(), "sharded": set(), "bits": {}, "s": {}, "weights": {}}
        for name, site in budget.items():
            adapter: Any = site.adapter
            self.found["sharded"].add(is_shard(adapter.U) and is_shard(adapter.Vh))
            U, s, Vh = whole(adapter.U.detach()), site.gate.value().detach(), whole(adapter.Vh.detach())
            self.found["bits"][name] = [int(fingerprint(part.contiguous())) for part in (U, s, Vh)]
            self.found["s"][name] = s.numpy()
            self.found["weights"][name] = (U * s @ Vh).numpy()


def calibrate(kind: str, weighting: Any, trained: bool, at: Start, world: int) -> dict[str, Any]:
    torch.manual_seed(5)
    model, start = ShardedFactors() if kind == "fsdp2" else Host(), Start()
    model.trained, model.start = trained, at  # type: ignore[assignment]
    # Adapters that are there it leaves as they are.
    injection = AdapterInjection(partial(Factorized, trained=trained, start=at), TARGETS, HEAD, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=STRATEGIES[kind](world), use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, max_steps=1,
        callbacks=[injection, Calibration(WeightedSVD(weighting, ratio=0.6), batches=3), start],
    )  # fmt: skip
    trainer.fit(model)
    return start.found


def calibrate_all(runs: Sequence[Run], world: int) -> dict[Run, dict[str, Any]]:
    torch.set_num_threads(1)
    return {run: calibrate(*run, world) for run in runs}


def test_two_processes_find_what_one_finds() -> None:
    (alone,) = run_processes(1, calibrate_all, [("single", weighting, True, "svd") for weighting in WEIGHTINGS], 1)
    runs: list[Run] = [(kind, weighting, True, "exact") for kind in ("ddp", "fsdp2") for weighting in WEIGHTINGS]
    runs += [("ddp", "none", True, "svd"), ("fsdp2", "fisher", True, "svd")]
    runs += [("fsdp2", "fisher", False, "svd"), ("fsdp2", "whiten", False, "exact")]  # all before the head is frozen
    first, second = run_processes(2, calibrate_all, runs, 2)
    for run in runs:
        kind, weighting, *_ = run
        reference = alone["single", weighting, True, "svd"]
        assert first[run]["bits"] == second[run]["bits"], run
        assert first[run]["ranks"] == second[run]["ranks"] == reference["ranks"], run
        assert first[run]["sharded"] == {kind == "fsdp2"}
        for name, weight in reference["weights"].items():
            assert abs(first[run]["weights"][name] - weight).max() < 1e-4 * abs(weight).max(), (run, name)
            assert abs(first[run]["s"][name] - reference["s"][name]).max() < 1e-4 * reference["s"][name].max()
    # The weightings differ, so that the comparison says something.
    found = [alone["single", weighting, True, "svd"]["weights"]["net.0.0"] for weighting in WEIGHTINGS]
    for i, one in enumerate(found):
        assert all(abs(one - other).max() > 1e-2 * abs(one).max() for other in found[:i])

"""Calibration on two processes: cut at once, resumed, and refused where it cannot be."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from hosts import STRATEGIES, Host, Job, Sharded, change, train_all

from lightning_peft import adapter_state_dict, presets
from lightning_peft.testing.processes import run_processes

pytestmark = pytest.mark.dist

JOBS = {
    "masked": Job(partial(presets.eva, rank=2)),
    "cut": Job(partial(presets.eva, rank=2, compact="at_once")),
    "gradients": Job(partial(presets.gora, rank=2)),
}


def test_cut_at_once_is_what_the_masks_train() -> None:
    (alone,) = run_processes(1, train_all, [("single", "masked")], JOBS, 1)
    masks = {name: [m for m in mask if m] for name, mask in alone["single", "masked"]["masks"].items()}
    for both in run_processes(2, train_all, [("ddp", "cut"), ("fsdp2", "cut"), ("fsdp1", "gradients")], JOBS, 2):
        result = both["ddp", "cut"]
        assert isinstance(result, dict), result
        assert result["masks"] == {name: mask for name, mask in masks.items() if mask}
        head = [name for name in result["weights"] if name.startswith("net.2")]
        part = {"weights": {name: result["weights"][name] for name in head}}
        assert len(head) == 2
        assert change(part, {"weights": {n: alone["single", "masked"]["weights"][n] for n in head}}) < 1e-5
        assert "Calibration(compact='at_once') cuts parameters while training" in both["fsdp2", "cut"]
        assert "GoRA reads the base's weights, which CpuFSDPStrategy has in flat slices" in both["fsdp1", "gradients"]


class Saves(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 5:
            trainer.save_checkpoint(self.path)


def stop_and_go_on(kind: str, path: Path) -> list[str]:
    """What differs between a run and one that was resumed at its fifth step."""
    states = []
    for resumed in (False, True):
        torch.manual_seed(9 if resumed else 5)
        model = Sharded() if kind == "fsdp2" else Host()
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy=STRATEGIES[kind](2), use_distributed_sampler=False, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, max_epochs=1,
            callbacks=[*presets.eva(rank=2), *([] if resumed else [Saves(path)])],
        )  # fmt: skip
        trainer.fit(model, ckpt_path=path if resumed else None)
        state = adapter_state_dict(model)
        states.append({n: v.to_local() if hasattr(v, "to_local") else v for n, v in state.items()})
    return [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_interrupted_is_uninterrupted(kind: str, tmp_path: Path) -> None:
    assert run_processes(2, stop_and_go_on, kind, tmp_path / "stop.ckpt") == [[], []]

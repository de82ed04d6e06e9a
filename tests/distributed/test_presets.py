"""Every preset on two processes: the masks and weights of one process, and a stop at an event that leaves no trace."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from hosts import ROUNDINGS, Host, Job, ShardedAroundAdapters, change, train_all
from lightning.pytorch.strategies import DDPStrategy
from presets.every import NAMES as ALL
from presets.every import adapts_models, has_posterior, injection_of, releases_base, small
from torch import Tensor, nn

from lightning_peft import RankPruning, adapter_state_dict
from lightning_peft.testing.processes import run_processes

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:masks have learned to keep"),  # runs are short
]


NAMES = [name for name in ALL if not adapts_models(name)]  # these are in test_prompts.py, on a model of text


def job(name: str) -> Job:
    """The preset without what tells processes apart by more than rounding: dropout, which draws anew for every batch,
    of which a process has half, and statistics of batches, by which rounding turns the vectors of a decomposition.
    Noise is the same on every process. Masks are drawn without a network: Adam divides by its gradients, which are
    nearly 0 (see test_selection.py); and more by the task's loss than by their penalty, the same whatever the batch.
    """
    injection = injection_of(name)
    own = {"adapter": staticmethod(injection.adapter), "beside": injection.train}
    around = type("Around", (ShardedAroundAdapters,), own)
    options = {"dropout": 0.0, "weighting": "none", "masks": "monotone", "budget_weight": 0.5, "streams": "alike"}
    return Job(partial(small, name, **options), around=around)


JOBS = {name: job(name) for name in NAMES}


@cache
def results(world: int, *kinds: str) -> list[dict[Any, Any]]:
    runs = [(sharded(kind, name), name) for kind in kinds for name in JOBS]
    return run_processes(world, train_all, runs, JOBS, world, timeout=600)


def sharded(kind: str, name: str) -> str:
    """What takes a weight apart comes before what shards it, and so does what has noise."""
    return f"{kind} around" if kind == "fsdp2" and (releases_base(name) or has_posterior(name)) else kind


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one(name: str, kind: str) -> None:
    alone = results(1, "single", "half")[0]["single", name]
    assert isinstance(alone, dict), alone
    for both in results(2, "ddp", "fsdp2"):
        result = both[sharded(kind, name), name]
        assert isinstance(result, dict), result
        assert result["events"] == alone["events"]
        assert result["masks"] == alone["masks"]
        assert change(result, alone) < ROUNDINGS


@pytest.mark.parametrize("name", NAMES)
def test_it_could_fail(name: str) -> None:
    """A run that has lost half of every batch is another one."""
    alone = results(1, "single", "half")[0]
    assert change(alone["half", name], alone["single", name]) > 1e-3


class Restless(Host):
    """With noise on its inputs: whoever goes on must draw what the uninterrupted run draws."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0] + 0.1 * torch.randn_like(batch[0])), batch[1])


class SaveInMidRun(L.Callback):
    """Writes one checkpoint: right after an event that is not the last; where a method has none, after step 6."""

    def __init__(self, path: Path) -> None:
        self.path, self.step, self.at_event = path, 0, False

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        prunings = pruning_of(trainer)
        if self.step or trainer.global_step < 6 or any(p.event_step != trainer.global_step for p in prunings):
            return
        self.step, self.at_event = trainer.global_step, any(not pruning.settled for pruning in prunings)
        trainer.save_checkpoint(self.path)


def pruning_of(trainer: L.Trainer) -> list[RankPruning]:
    return [each for each in trainer.callbacks if isinstance(each, RankPruning)]  # type: ignore[attr-defined]


def fit(name: str, seed: int, *extra: L.Callback, ckpt_path: Path | None = None) -> dict[str, Any]:
    """Train with dropout, and return all that this process is left with."""
    torch.manual_seed(seed)
    module = Restless()
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", devices=2, strategy=DDPStrategy(), use_distributed_sampler=False,
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[*small(name, dropout=0.1), *extra],
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt_path)
    return {
        "step": trainer.global_step,
        "random numbers": torch.get_rng_state(),
        **flat("weights", {key: value.detach().clone() for key, value in adapter_state_dict(module).items()}),
        **flat("optimizer", trainer.optimizers[0].state_dict()["state"]),
        **flat("policy", [pruning.state_dict() for pruning in pruning_of(trainer)]),
    }


def flat(prefix: str, value: Any) -> dict[str, Any]:
    """What is nested, by the path to it."""
    if isinstance(value, Mapping | list):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        return {path: leaf for key, part in pairs for path, leaf in flat(f"{prefix}.{key}", part).items()}
    return {prefix: value}


def interrupt_all(folder: Path) -> dict[str, dict[str, Any]]:
    """A run of every preset, and the rest of it from its checkpoint: what is different."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for name in NAMES:
        try:
            stop = SaveInMidRun(folder / f"{name}.ckpt")
            whole = fit(name, 3, stop)
            rest = fit(name, 77, ckpt_path=stop.path)
            different = [key for key in {**whole, **rest} if not equal(whole.get(key), rest.get(key))]
            moved = not equal_weights(whole, torch.load(stop.path, weights_only=True)["state_dict"])
            found[name] = {"stop": stop.step, "at event": stop.at_event, "different": different, "moved": moved}
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    return found


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def equal_weights(run: Mapping[str, Any], saved: Mapping[str, Tensor]) -> bool:
    return all(equal(run[f"weights.{key}"], value) for key, value in saved.items())


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_processes(2, interrupt_all, tmp_path_factory.mktemp("stops"), timeout=600)


@pytest.mark.parametrize("name", NAMES)
def test_interrupted_at_an_event_is_uninterrupted(name: str, interrupted: list[dict[str, dict[str, Any]]]) -> None:
    for process in interrupted:
        result = process[name]
        assert "error" not in result, result["error"]
        assert 6 <= result["stop"] < 24
        assert result["at event"] == any(isinstance(each, RankPruning) for each in small(name))
        assert result["different"] == []
        assert result["moved"]  # there was something left to train

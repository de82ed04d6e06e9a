"""Terms of pairs on two processes: equal to one process on the same global batches, resumed bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from hosts import STRATEGIES, Host, Sharded
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft import (
    CLUB,
    VIB,
    AdapterCheckpoint,
    AdapterInjection,
    CategoricalCLUB,
    LoRA,
    MutualInformation,
    Regularization,
    Regularizer,
    SeparableCritic,
    adapter_state_dict,
)
from lightning_peft.distributed import Processes, whole
from lightning_peft.testing.processes import run_processes

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

KINDS = ["ddp", "fsdp2"]


def clubs() -> dict[str, Regularizer]:
    given, label = (lambda batch: batch[0]), (lambda batch: batch[1])
    return {
        "club": CLUB(0.1, layer=r"net\.1", given=r"net\.0", hidden=8, inner_steps=2),
        "sampled": CLUB(0.1, layer=r"net\.1", given=given, given_features=16, hidden=8, negatives="sample"),
        "labels": CategoricalCLUB(0.1, layer=r"net\.1", label=label, classes=4, hidden=8, negatives="sample"),
    }


def others() -> dict[str, Regularizer]:
    small = partial(SeparableCritic, hidden=8, width=4)
    return {
        "dv": MutualInformation([r"net\.1"], weight=0.1, estimator="dv", classes=4, critic=small),
        "cosines": MutualInformation([r"net\.1"], weight=0.1, classes=4),
        "layers": MutualInformation([r"net\.1"], of=r"net\.0", weight=0.1, critic=small, nats=1),
        "vib": VIB(r"net\.2", features=3, beta=0.01, growth="none", samples=2),
    }


def without_adapters() -> dict[str, Regularizer]:
    return {"club": clubs()["club"], "dv": others()["dv"]}


TERMS: dict[str, Callable[[], dict[str, Regularizer]]] = {
    "club": clubs,
    "mutual information and vib": others,
    "without adapters": without_adapters,
}


class Descent(Host):
    """Adam makes whole steps of what rounding leaves of a gradient that is zero: of a bias, say, that adds to all."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


class ShardedDescent(Descent, Sharded):
    pass


def fit(
    kind: str,
    terms: dict[str, Regularizer],
    *extra: L.Callback,
    adapts: bool = True,
    host: type[Host] | None = None,
    **options: Any,
) -> L.LightningModule:
    # What terms and adapters start from is another draw on each process, of which the first one's counts.
    torch.manual_seed(options.pop("seed", 5) + int(os.environ["RANK"]))
    model = (host or (ShardedDescent if kind == "fsdp2" else Descent))()
    world = 1 if kind == "single" else 2
    ckpt_path = options.pop("ckpt_path", None)
    ours: list[L.Callback] = [AdapterInjection(partial(LoRA, rank=2)), AdapterCheckpoint()] if adapts else []
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=STRATEGIES[kind](world), use_distributed_sampler=False,
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, max_epochs=1,
        limit_train_batches=8,
        callbacks=[*ours, Regularization(terms), *extra],
        **options,
    )  # fmt: skip
    trainer.fit(model, ckpt_path=ckpt_path)
    return model


class Own(Processes):
    def gather(self, tensor: Tensor) -> Tensor:
        return tensor


class Apart(L.Callback):
    """Each process has its own rows alone; gradients are averaged as ever."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for term in pl_module.peft_terms.values():  # type: ignore[operator,union-attr]
            term.everyone = Own()


def trained(runs: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    torch.set_num_threads(1)
    found = {}
    for kind, name in runs:
        extra = [Apart()] if kind.endswith("apart") else []
        adapts = name != "without adapters"
        model = fit(kind.removesuffix(" apart"), TERMS[name](), *extra, adapts=adapts)
        state = adapter_state_dict(model)
        found[kind, name] = {key: whole(value).float().numpy() for key, value in state.items()}
    return found


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest one of any two numbers; weights are between 0.01 and 3."""
    assert one.keys() == other.keys()
    infinite = {key for key, value in one.items() if not np.isfinite(value).all()}
    assert all(np.array_equal(one[key], other[key]) for key in infinite)  # a moving average that nobody moves
    return max(float(abs(value - other[key]).max()) for key, value in one.items() if key not in infinite)


@pytest.fixture(scope="module")
def alone() -> dict[Any, Any]:
    (results,) = run_processes(1, trained, [("single", name) for name in TERMS])
    return results  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def together() -> list[dict[Any, Any]]:
    return run_processes(2, trained, [(kind, name) for name in TERMS for kind in [*KINDS, "ddp apart"]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TERMS)
def test_two_processes_are_one(kind: str, name: str, alone: dict[Any, Any], together: list[dict[Any, Any]]) -> None:
    """To 1e-6, with all that terms own: critics, q, the moving average, the bottleneck and its prior."""
    for each in together:
        assert difference(each[kind, name], alone["single", name]) < 1e-6
        owners = {key.split(".")[1] for key in each[kind, name] if key.startswith("peft_terms.")}
        assert owners == set(TERMS[name]()) - {"vib"}  # whose parameters are the head's


@pytest.mark.parametrize("name", TERMS)
def test_without_the_others_rows_they_are_not(name: str, alone: dict[Any, Any], together: list[dict[Any, Any]]) -> None:
    for each in together:
        assert difference(each["ddp apart", name], alone["single", name]) > 1e-3


class Saves(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == 5:  # between the micro-batches of a step
            trainer.save_checkpoint(self.path)


def stop_and_go_on(folder: Path) -> list[str]:
    """What differs between a run and the rest of it, on this process."""
    torch.set_num_threads(1)

    def go(kind: str, seed: int, *extra: L.Callback, ckpt_path: Path | None = None) -> dict[str, Tensor]:
        terms = {**clubs(), **others()}
        host = Sharded if kind == "fsdp2" else Host
        model = fit(kind, terms, *extra, host=host, seed=seed, ckpt_path=ckpt_path, accumulate_grad_batches=2)
        found = {f"{kind} {name}": whole(value).clone() for name, value in adapter_state_dict(model).items()}
        for name, term in terms.items():
            progress = term.progress()
            found[f"{kind} {name} draws"] = torch.tensor(progress["draws"])
            for i, entry in (progress.get("optimizer") or {"state": {}})["state"].items():
                found |= {f"{kind} {name} optimizer {i} {key}": value.clone() for key, value in entry.items()}
        return found

    differs = []
    for kind in KINDS:
        path = folder / f"{kind}.ckpt"
        one, rest = go(kind, 5, Saves(path)), go(kind, 9, ckpt_path=path)
        assert one.keys() == rest.keys()
        assert len([name for name in one if "optimizer" in name]) == 3 * (8 + 8 + 4)
        assert any("log_moving" in name for name in one)
        differs += [name for name, value in one.items() if not torch.equal(value, rest[name])]
    return differs


def test_interrupted_is_uninterrupted(tmp_path: Path) -> None:
    """Weights, critics, q and its optimizer, the moving average, and each term's own random numbers."""
    assert run_processes(2, stop_and_go_on, tmp_path) == [[], []]


class Uneven(Host):
    """The second process has a smaller batch, at the third step."""

    def train_dataloader(self) -> DataLoader[Any]:
        loader = super().train_dataloader()
        if self.global_rank == 1:
            loader.batch_sampler[2].pop()  # type: ignore[index]
        return loader


def refusals() -> list[str]:
    torch.set_num_threads(1)
    found = []
    for terms in (clubs(), {"dv": others()["dv"]}):
        with pytest.raises(RuntimeError) as told:
            fit("ddp", terms, host=Uneven)
        found.append(str(told.value))
    return found


def test_batches_of_unequal_sizes_are_refused_on_all_processes() -> None:
    for told in run_processes(2, refusals, timeout=60):
        for sentence in told:
            assert "and their batches are of unequal sizes: (4, " in sentence
            assert " on process 0, (3, " in sentence

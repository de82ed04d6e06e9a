"""Factorised layers on two processes: one process's result; under FSDP2 the factors are sharded and the gates whole."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import pytest
import torch
from hosts import ROUNDINGS, STRATEGIES, Block, Host, Job, ShardedAroundAdapters, change, train_all
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    Budget,
    Cubic,
    Factorized,
    RankBudget,
    RankPolicy,
    RankPruning,
    Taylor,
    adapter_state_dict,
    inject,
    load,
    small_parameters,
)
from lightning_peft.distributed import like, rank, whole
from lightning_peft.testing.processes import run_processes

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def callbacks(trained: bool = True, compact: Literal["never", "final"] = "never") -> list[L.Callback]:
    """Everything is trained, or the head and a bias alone; components are removed in parameters."""
    train = [".*"] if trained else ["2", "0.0.bias"]
    policy = RankPolicy(Cubic(0.1, 0.2), Taylor(), Budget(share=0.3), 3, minimum=1)
    return [
        AdapterInjection(partial(Factorized, trained=trained), train=train),
        RankPruning(policy),
        AdapterCheckpoint(),
    ]


class Around(ShardedAroundAdapters):
    """FSDP2: factors are sharded, all that is small is whole."""

    def shard(self, **options: Any) -> None:
        inject(self, Factorized, train=[".*"])
        super(ShardedAroundAdapters, self).shard(ignored_params=set(small_parameters(self)), **options)


class AroundFrozen(ShardedAroundAdapters):
    """Frozen factors, which only their masks change; and every linear layer is a unit, also what is left of one."""

    units = (Block, nn.Linear)

    def shard(self, **options: Any) -> None:
        inject(self, partial(Factorized, trained=False), train=["2", "0.0.bias"])
        super(ShardedAroundAdapters, self).shard(ignored_params=set(small_parameters(self)), **options)


JOBS = {
    "trained": Job(callbacks, around=Around),
    "frozen": Job(partial(callbacks, trained=False), around=AroundFrozen),
    "accumulated and clipped": Job(
        callbacks, around=Around, trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "max_epochs": 3}
    ),
    "too late": Job(callbacks),
    "cut": Job(partial(callbacks, compact="final")),
}


def test_two_processes_give_what_one_gives() -> None:
    names = [name for name in JOBS if name != "too late"]
    (alone,) = run_processes(1, train_all, [(kind, name) for kind in ("single", "half") for name in names], JOBS, 1)
    runs = [(kind, name) for kind in ("ddp", "fsdp1 nested", "fsdp2 around") for name in names]
    runs = [(kind, name) for kind, name in runs if kind == "ddp" or name != "cut"]
    for both in run_processes(2, train_all, [*runs, ("fsdp2", "too late")], JOBS, 2):
        for kind, name in runs:
            result, reference = both[kind, name], alone["single", name]
            assert isinstance(result, dict), result
            assert len(reference["events"]) > 3
            assert 0 < sum(map(sum, reference["masks"].values())) < 16 + 32
            assert result["events"] == reference["events"], (kind, name)
            assert change(result, reference) < ROUNDINGS, (kind, name)
            assert change(alone["half", name], reference) > 1e-3  # what a wrong mean would do
        assert "inject in configure_model, before fully_shard" in both["fsdp2", "too late"]


def what_is_where(path: Path) -> dict[str, Any]:
    """A short fit under FSDP2: which parameters are in pieces, what a checkpoint holds, where a resumed run ends."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for resumed in (False, True):
        torch.manual_seed(9 if resumed else 5)
        model = Around()
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy=STRATEGIES["fsdp2"](2), use_distributed_sampler=False, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, max_epochs=2,
            callbacks=[*callbacks(), *([] if resumed else [Saves(path)])],
        )  # fmt: skip
        trainer.fit(model, ckpt_path=path if resumed else None)
        pieces = {name: p.to_local().shape for name, p in model.named_parameters() if isinstance(p, DTensor)}
        found["resumed" if resumed else "through"] = {
            name: whole(value.detach()).tolist() for name, value in adapter_state_dict(model).items()
        }
        found["pieces"] = {name: tuple(shape) for name, shape in pieces.items()}
        found["whole"] = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
        found["optimizer"] = {
            p.shape for p, state in trainer.optimizers[0].state.items() if not isinstance(state["exp_avg"], DTensor)
        }
    return found


class Saves(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 10:  # between two events
            trainer.save_checkpoint(self.path)


def test_factors_are_sharded_and_a_file_holds_them_whole(tmp_path: Path) -> None:
    path = tmp_path / "stop.ckpt"
    every = run_processes(2, what_is_where, path)
    for number, found in enumerate(every):
        assert found["pieces"] == {
            "net.0.0.U": (17 - number, 16),
            "net.0.0.Vh": (8, 16),
            "net.1.0.U": (16, 32),
            "net.1.0.Vh": (16, 33),
        }
        assert "net.0.0.gate.gain" in found["whole"]
        assert found["through"] == found["resumed"]
        assert torch.Size((33, 16)) not in found["optimizer"]  # nor is the optimizer's state of them whole
    assert every[0]["through"] == every[1]["through"]
    one = load(Host(), path)  # in one process, from a run of two
    assert tuple(one.get_parameter("net.0.0.U").shape) == (33, 16)
    assert RankBudget.of(one).spent < 16 + 32


def start_apart(fix: bool) -> str:
    """Two processes whose decompositions differ, as on two kinds of machine: what a fit says."""
    torch.set_num_threads(1)

    class Apart(Around):
        def shard(self, **options: Any) -> None:
            if rank() == 1 and not fix:
                with torch.no_grad():
                    linear = self.net[0][0]  # type: ignore[index]
                    linear.weight[0, 0] += 1e-6
            super().shard(**options)

    model = Apart()
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=STRATEGIES["fsdp2"](2), use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, max_steps=1,
        callbacks=callbacks(),
    )  # fmt: skip
    try:
        trainer.fit(model)
    except RuntimeError as error:
        return str(error)
    return "trained"


def test_starts_that_differ_are_told() -> None:
    """Each process would keep its part of another decomposition, and nothing could tell later."""
    says = "the adapter of net.0.0 at its start differs between processes"
    for fix, expected in ((True, "trained"), (False, says)):
        assert [told[: len(expected)] for told in run_processes(2, start_apart, fix)] == [expected, expected]


def fill_pieces() -> bool:
    """`fill` of sharded factors takes sharded ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    host = nn.Sequential(nn.Linear(6, 8))
    inject(host, partial(Factorized, rank=3), targets=["0"])
    fully_shard(host, mesh=init_device_mesh("cpu", (2,)), ignored_params=set(small_parameters(host)))
    adapter = host[0]
    assert isinstance(adapter, Factorized)
    U, s, Vh = torch.arange(24.0).view(8, 3), torch.ones(3), torch.arange(18.0).view(3, 6)
    adapter.fill(like(U, adapter.U), s, like(Vh, adapter.Vh))
    x = torch.ones(2, 6)
    return torch.allclose(host(x), x @ (U @ Vh).mT + adapter.bias)


def test_sharded_factors_are_filled() -> None:
    assert run_processes(2, fill_pieces) == [True, True]

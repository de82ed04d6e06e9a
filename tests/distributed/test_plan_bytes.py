"""What two processes really hand to each other, byte by byte, is what the plan says."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import Budget, DynamicDoRA, Factorized, RankBudget, inject, plan, presets, small_parameters
from lightning_peft.adapters.base import AdapterFactory
from lightning_peft.planning.figures import Strategy
from lightning_peft.testing.processes import run_processes

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
]
WIDTH, RANK = 48, 6
LOW_RANK = partial(DynamicDoRA, rank=RANK, dropout=0.0)
FACTORS = partial(Factorized, trained=False)  # in the place of the base, and sharded as it would be
Sent = dict[str, dict[str, list[int]]]


class Block(nn.Module):
    """Frozen but for its adapters; 65 rows are more than two processes can share equally."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 65), nn.Linear(65, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).relu())
        return y


def build(norm: type[nn.Module]) -> nn.ModuleDict:
    """Two blocks, a norm, which has buffers if it is a BatchNorm1d, and a head."""
    return nn.ModuleDict({"net": nn.Sequential(Block(), Block(), norm(WIDTH), nn.Linear(WIDTH, 4))})


def adapted(norm: type[nn.Module], factory: AdapterFactory = LOW_RANK) -> nn.ModuleDict:
    holder = build(norm)
    inject(holder, factory)
    return holder


class Wire(TorchDispatchMode):
    """Notes what this process calls collective operations with: bytes, by phase of the run and operation."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "setup"
        self.sent: Sent = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if func.namespace == "c10d" and sizes:
            name = func.overloadpacket.__name__.strip("_")
            # A gather is also called with the tensors of its result, which are as large or larger.
            size = min(sizes) if name.startswith("allgather") else sum(sizes)
            self.sent.setdefault(self.phase, {}).setdefault(name, []).append(size)
        return func(*args, **(kwargs or {}))


class Watch(L.Callback):
    """Listens from before the strategy wraps the module until the last batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wire = Wire()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.wire.__enter__()

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.wire.phase = str(trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.wire.__exit__(None, None, None)
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(self.wire.sent))


class Job(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = build(nn.BatchNorm1d)["net"]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(96, WIDTH), torch.zeros(96, dtype=torch.long)), 4)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])


def test_bytes_under_ddp(tmp_path: Path) -> None:
    L.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy=DDPStrategy(start_method="fork"), logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, accumulate_grad_batches=2,
        callbacks=[*presets.dynamic_dora(final_rank=4, interval=2, dropout=0.0), Watch(tmp_path)],
    ).fit(Job())  # fmt: skip
    with torch.device("meta"):
        shapes = adapted(nn.BatchNorm1d)
    found = plan(shapes, 2, final=Budget(rank=4), accumulate=2)
    assert found.start.buffers == 4 * (4 * RANK + 2 * WIDTH) + 8  # masks, mean and variance; a counter
    for rank in range(2):
        sent: Sent = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.startup - 8 in sent["setup"]["broadcast"]  # by type: floats here, the counter by itself
        masks = []
        for step in range(6):
            assert sent[str(step)]["allreduce"] == [found.start.gradients]  # once, though it has two batches
            # Not ours: the Trainer's 8 bytes before every batch, and DDP's sizes of its buckets after the first step.
            large = [size for size in sent[str(step)]["broadcast"] if size > (60 if step == 1 else 8)]
            assert large[0] == found.start.buffers - 8
            masks += [size for size in sent[str(step)]["broadcast"] if size == found.event]
        assert len(masks) == 2  # pruning events
    assert found.start.all_reduce == found.start.gradients  # 2 (N - 1) / N of them, for N = 2


def sharded(rank: int, kind: str, factory: AdapterFactory, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        net = adapted(nn.LayerNorm, factory)["net"]
        small = set(small_parameters(net))
        for site in RankBudget.of(net).values():
            site.gate.mask.requires_grad_(factory is FACTORS)  # so that backward goes through them
        model: nn.Module = net
        if kind == "fsdp2":
            mesh = init_device_mesh("cpu", (2,))
            for unit in (net[0], net[1], net[2], net):
                fully_shard(unit, mesh=mesh, ignored_params=small)
        else:
            model = FullyShardedDataParallel(
                net, device_id=torch.device("cpu"), ignored_states=list(small), use_orig_params=True,
                auto_wrap_policy=ModuleWrapPolicy({Block, nn.LayerNorm}),
                mixed_precision=MixedPrecision(torch.bfloat16, torch.bfloat16, torch.bfloat16),
            )  # fmt: skip
        wire = Wire()
        with wire:
            for wire.phase in ("0", "1"):
                with torch.autocast("cpu", torch.bfloat16, enabled=kind == "fsdp1"):
                    loss = model(torch.randn(4, WIDTH)).sum()
                loss.backward()
        (folder / f"{rank}.json").write_text(json.dumps(wire.sent))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "factory"),
    [("fsdp2", LOW_RANK), ("fsdp1", LOW_RANK), ("fsdp2", FACTORS)],
    ids=["fsdp2", "fsdp1", "factors"],
)
def test_bytes_under_sharding(kind: Strategy, factory: AdapterFactory, tmp_path: Path) -> None:
    multiprocessing.start_processes(sharded, (kind, factory, tmp_path), nprocs=2, start_method="fork")
    with torch.device("meta"):
        shapes = adapted(nn.LayerNorm, factory)
    found = plan(shapes, 2, strategy=kind, precision="bf16-mixed")
    for rank in range(2):
        sent: Sent = json.loads((tmp_path / f"{rank}.json").read_text())
        for step in ("0", "1"):
            assert len(sent[step]) == 1  # a frozen base sends no gradient
            (name, gathers), *_ = sent[step].items()
            assert name.startswith("allgather")
            gathered = sum(gathers)  # N - 1 = 1 other process gets it
            assert gathered == pytest.approx(found.gather_forward + found.gather_backward, rel=0.01), sent


class WatchLater(Watch):
    """Listens from `on_fit_start` on, when the base is sharded."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pass

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.wire.__enter__()


class ShardedJob(Job):
    """FSDP2, with all that is trained left whole."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build(nn.LayerNorm)["net"]

    def configure_model(self) -> None:
        inject(self, partial(DynamicDoRA, rank=RANK, dropout=0.0))
        small = set(small_parameters(self))
        for unit in (*self.net.children(), self.net):
            fully_shard(unit, mesh=self.device_mesh["data_parallel"], ignored_params=small)


def train_sharded(folder: Path) -> None:
    L.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy=ModelParallelStrategy(2, 1), logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, accumulate_grad_batches=2,
        callbacks=[WatchLater(folder), *presets.dynamic_dora(final_rank=4, interval=2, dropout=0.0)],
    ).fit(ShardedJob())  # fmt: skip


def test_bytes_of_a_sharded_trainer(tmp_path: Path) -> None:
    run_processes(2, train_sharded, tmp_path)
    with torch.device("meta"):
        shapes = adapted(nn.LayerNorm)
    found = plan(shapes, 2, strategy="fsdp2", final=Budget(rank=4), accumulate=2)
    for rank in range(2):
        sent: Sent = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.startup in sent["setup"]["broadcast"]
        masks = []
        for step in range(6):
            (reduced,) = sent[str(step)]["allreduce"]  # with one number a tensor, that says whether it has a gradient
            assert reduced == pytest.approx(found.start.gradients, rel=0.01)
            gathered = sum(sent[str(step)]["allgather_base"])
            assert gathered == pytest.approx(found.gather_forward + found.gather_backward, rel=0.01)
            masks += [size for size in sent[str(step)]["broadcast"] if size > 8]
        assert masks == pytest.approx([found.event] * 2, rel=0.01)

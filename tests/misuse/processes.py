"""Mistakes that only several processes can make: each row is run by two, and each of them must be told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_peft import (
    CLUB,
    DEM,
    AdapterCheckpoint,
    AdapterInjection,
    Budget,
    Cubic,
    Factorized,
    LoRA,
    RankBudget,
    RankMonitor,
    RankPolicy,
    RankPruning,
    Regularization,
    RLoRA,
    Taylor,
    inject,
    small_parameters,
)
from lightning_peft.testing.processes import CpuFSDPStrategy

LORA = partial(LoRA, rank=4)


class Net(LightningModule):
    """Two layers and a head; every process has data of its own."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss: Tensor = self.net(batch).square().mean()
        return loss

    def train_dataloader(self) -> DataLoader[Tensor]:
        generator = torch.Generator().manual_seed(self.trainer.global_rank)
        return DataLoader(torch.randn(16, 8, generator=generator), batch_size=2)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class InjectsByHand(Net):
    """FSDP2: adapters are in before the module shards itself, and are left whole."""

    def configure_model(self) -> None:
        if isinstance(next(self.parameters()), DTensor):
            return
        inject(self, LORA)
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"], ignored_params=set(small_parameters(self)))


class ForgetsIgnored(Net):
    """FSDP2: adapters are sharded with the rest."""

    def configure_model(self) -> None:
        if isinstance(next(self.parameters()), DTensor):
            return
        inject(self, LORA)
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class ShardsItself(Net):
    def configure_model(self) -> None:
        if not isinstance(next(self.parameters()), DTensor):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class BackwardByHand(InjectsByHand):
    """Manual optimization that goes past Lightning: no hook sees this backward."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        super().training_step(batch, batch_idx).backward()
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]


class Skips(ShardsItself):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return None if batch_idx == 3 else super().training_step(batch, batch_idx)


class WrapsByHand(Net):
    """FSDP1, wrapped in configure_model before adapters are there."""

    def configure_model(self) -> None:
        if not isinstance(self.net, FullyShardedDataParallel):
            self.net = FullyShardedDataParallel(self.net, device_id=torch.device("cpu"), use_orig_params=True)  # type: ignore[assignment]


class WrapsAdapters(Net):
    """FSDP1, wrapped in configure_model with the adapters inside."""

    def configure_model(self) -> None:
        if not isinstance(self.net, FullyShardedDataParallel):
            inject(self, LORA)
            self.net = FullyShardedDataParallel(self.net, device_id=torch.device("cpu"), use_orig_params=True)  # type: ignore[assignment]


class Uneven(Net):
    """One process has more batches than the other."""

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randn(16 + 2 * self.trainer.global_rank, 8), batch_size=2)  # type: ignore[arg-type]


class Short(Net):
    """The last batch of one process is smaller."""

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randn(16 - self.trainer.global_rank, 8), batch_size=2)  # type: ignore[arg-type]


class Ignored(Net):
    """DDP is told to leave an adapter alone."""

    def setup(self, stage: str) -> None:
        inject(self, LORA)
        self._ddp_params_and_buffers_to_ignore = ["net.0.A"]


class Unlike(Net):
    """Other layers are adapted on each process."""

    def configure_model(self) -> None:
        inject(self, LORA, [str(self.trainer.global_rank)])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"], ignored_params=set(small_parameters(self)))


class DrawsApart(Net):
    """Projections are drawn from another seed on each process."""

    def configure_model(self) -> None:
        inject(self, partial(RLoRA, rank=4, seed=self.trainer.global_rank))


class StartsApart(Net):
    """The layers that are taken apart are not the same on each process."""

    def configure_model(self) -> None:
        with torch.no_grad():
            self.net[0].weight[0, 0] += self.trainer.global_rank  # type: ignore[index, operator, union-attr]
        inject(self, Factorized)
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"], ignored_params=set(small_parameters(self)))


class Do(Callback):
    """Does something at a hook; the module, the rank and the optimizers are handed over."""

    def __init__(self, hook: str, action: Callable[[Net, int, Any], None]) -> None:
        setattr(self, hook, lambda trainer, module, *_: action(module, trainer.global_rank, trainer))


class AtStep(Callback):
    """Does something on one process, after a step."""

    def __init__(self, step: int, action: Callable[[Net], None]) -> None:
        self.step, self.action = step, action

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == 1:
            self.action(pl_module)  # type: ignore[arg-type]


def inject_late(module: Net, rank: int, trainer: Trainer) -> None:
    inject(module, LORA)
    for optimizer in trainer.optimizers:
        optimizer.add_param_group({"params": [p for a in RankBudget.of(module).values() for p in [a.adapter.A]]})
        optimizer.add_param_group({"params": [p for a in RankBudget.of(module).values() for p in [a.adapter.B]]})


def thaw(module: Net, rank: int, trainer: Trainer) -> None:
    layer = module.net[0].base
    layer.requires_grad_(True)
    trainer.optimizers[0].add_param_group({"params": list(layer.parameters())})


def close_one(module: Net) -> None:
    RankBudget.of(module)["net.0"].gate.mask[0] = 0


def move_one(module: Net) -> None:
    RankBudget.of(module)["net.0"].adapter.B[0, 0] += 1e-7


def pruning() -> RankPruning:
    return RankPruning(RankPolicy(Cubic(), Taylor(), Budget(rank=2), interval=3))


def fsdp2(tensor_parallel: int = 1) -> ModelParallelStrategy:
    return ModelParallelStrategy(2 // tensor_parallel, tensor_parallel)


def fit(module: Callable[[], Net], strategy: Callable[[], Strategy], *callbacks: Callable[[], Callback]) -> None:
    torch.manual_seed(5)
    Trainer(
        max_epochs=2, accelerator="cpu", devices=2, strategy=strategy(), use_distributed_sampler=False, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[callback() for callback in callbacks],
    ).fit(module())  # fmt: skip


def injection() -> AdapterInjection:
    return AdapterInjection(LORA, verbose=False)


def late(hook: str) -> Callable[[], Callback]:
    return lambda: Do(hook, inject_late)


AVERAGES = (
    "under ModelParallelStrategy nobody averages the adapters' gradients. Put AdapterInjection first in the Trainer's "
    "callbacks; adapters that are there it leaves as they are."
)
LATE = (
    "'net.0.A' came into the module after DDP had wrapped it, so its gradients would not be averaged and processes "
    "would drift apart. Inject adapters in __init__, setup or configure_model, or let AdapterInjection do it."
)


def apart(what: str, when: str) -> str:
    return (
        f"{what!r} is not the same on all processes {when}: training has come apart. Whatever changes adapters, masks "
        "or requires_grad must do so on every process alike, and before the strategy wraps the module."
    )


ROWS: dict[str, tuple[Callable[[], None], str]] = {
    "DDP: adapters are injected in `on_fit_start`": (
        lambda: fit(Net, DDPStrategy, late("on_fit_start"), pruning),
        LATE,
    ),
    "DDP: adapters are injected in `on_fit_start`, and only checkpoints are ours": (
        lambda: fit(Net, DDPStrategy, late("on_fit_start"), AdapterCheckpoint),
        LATE,
    ),
    "DDP: adapters are injected in `on_train_start`, by a callback after ours": (
        lambda: fit(Net, DDPStrategy, AdapterCheckpoint, late("on_train_start")),
        LATE,
    ),
    "DDP: a layer is thawed in `on_train_start`": (
        lambda: fit(Net, DDPStrategy, injection, lambda: Do("on_train_start", thaw)),
        apart("net.0.base.weight", "after step 1"),
    ),
    "DDP: a layer is thawed in the second epoch, as `BackboneFinetuning` does": (
        lambda: fit(
            Net,
            DDPStrategy,
            injection,
            lambda: Do("on_train_epoch_start", lambda m, r, t: thaw(m, r, t) if t.current_epoch else None),
        ),
        apart("net.0.base.weight", "after step 9"),
    ),
    "DDP: an adapter is among `_ddp_params_and_buffers_to_ignore`": (
        lambda: fit(Ignored, DDPStrategy, injection),
        "'net.0.A' is trained and among the parameters that DDP is told to ignore (_ddp_params_and_buffers_to_ignore), "
        "so processes would drift apart. Take it out of that list.",
    ),
    "a weight is changed on one process only": (
        lambda: fit(Net, DDPStrategy, injection, pruning, lambda: AtStep(2, move_one)),
        apart("net.0.B", "at the pruning event of step 4"),
    ),
    "processes have different numbers of batches": (
        lambda: fit(Uneven, DDPStrategy, injection, pruning),
        "the processes expect different numbers of optimizer steps, 16, 18, so their rank schedules would part. Give "
        "each as many batches as the others: leave use_distributed_sampler on, or set max_steps.",
    ),
    "FSDP2: other layers are adapted on each process": (
        lambda: fit(Unlike, fsdp2, injection),
        "'net.0.A' is not trained in the same way on all processes: they have other adapters, or froze other "
        "parameters. Call inject and requires_grad_ on every process alike, whatever its rank.",
    ),
    "a term of pairs, and batches of unequal sizes": (
        lambda: fit(
            Short, DDPStrategy, injection, lambda: Regularization({"club": CLUB(layer="net.1", given="net.0")})
        ),
        "this term compares the examples of all processes, and their batches are of unequal sizes: (2, 8) on process "
        "0, (1, 8) on process 1. Give every process as many: drop_last=True, or a sampler that shares them evenly.",
    ),
    "constants are drawn from another seed on each process": (
        lambda: fit(DrawsApart, DDPStrategy, injection),
        "the adapter at 'net.0' derives other constants on some processes than on others, as its digest tells: give "
        "all of them the same seed and key, and run the same version everywhere.",
    ),
    "FSDP2: a mask is changed on one process only": (
        lambda: fit(ShardsItself, fsdp2, injection, pruning, lambda: AtStep(2, close_one)),
        apart("net.0.gate.mask", "at the pruning event of step 4"),
    ),
    "FSDP2: a weight is changed on one process only": (
        lambda: fit(ShardsItself, fsdp2, injection, lambda: AtStep(2, move_one)),
        apart("net.0.B", "after step 9"),
    ),
    "FSDP2: adapters are sharded with the rest": (
        lambda: fit(ForgetsIgnored, fsdp2, injection),
        "'net.0.A' is split over processes by fully_shard, and adapters are to stay whole. Pass "
        "ignored_params=set(small_parameters(self)) to every call of fully_shard, or let AdapterInjection inject after "
        "configure_model.",
    ),
    "FSDP2: layers are factorised after they were sharded": (
        lambda: fit(ShardsItself, fsdp2, lambda: AdapterInjection(Factorized)),
        "layer 'net.0': the layer's weight is split over processes already, and it takes a whole one to factorise it: "
        "inject in configure_model, before fully_shard.",
    ),
    "FSDP2: what is factorised is not the same on all processes": (
        lambda: fit(StartsApart, fsdp2, injection),
        "the adapter of net.0 at its start differs between processes, and each has kept its own part: their weights, "
        "or what decomposes them, are not the same. Inject in one process, save a checkpoint, load it in "
        "configure_model.",
    ),
    "FSDP2: `inject` by hand, and only `RankPruning`": (lambda: fit(InjectsByHand, fsdp2, pruning), AVERAGES),
    "FSDP2: `inject` by hand, and only `Regularization`": (
        lambda: fit(InjectsByHand, fsdp2, lambda: Regularization({"dem": DEM()})),
        AVERAGES,
    ),
    "FSDP2: `inject` by hand, and only `AdapterCheckpoint`": (
        lambda: fit(InjectsByHand, fsdp2, AdapterCheckpoint),
        AVERAGES,
    ),
    "FSDP2: `inject` by hand, and only `RankMonitor`": (lambda: fit(InjectsByHand, fsdp2, RankMonitor), AVERAGES),
    "FSDP2: manual optimization calls `loss.backward()`, not `self.manual_backward(loss)`": (
        lambda: fit(BackwardByHand, fsdp2, injection),
        apart("net.0.B", "after step 1"),
    ),
    "`training_step` returns None to skip a batch": (
        lambda: fit(Skips, fsdp2, injection),
        "Skipping the `training_step` by returning None in distributed training is not supported. It is recommended "
        "that you rewrite your training logic to avoid having to skip the step in the first place.",
    ),
    "FSDP2: layers are split by tensor parallelism, which is the default": (
        lambda: fit(ShardsItself, ModelParallelStrategy, injection),
        "ModelParallelStrategy splits layers over 2 processes (tensor parallelism), and adapters need whole ones. "
        "Shard by FSDP2 alone: ModelParallelStrategy(data_parallel_size=<all processes>, tensor_parallel_size=1).",
    ),
    "FSDP2: `AdapterCheckpoint(full=True)`": (
        lambda: fit(ShardsItself, fsdp2, injection, lambda: AdapterCheckpoint(full=True)),
        "AdapterCheckpoint(full=True) would gather the base that ModelParallelStrategy shards into one file. Leave "
        "full=False: the base is frozen, and its own files hold it.",
    ),
    "FSDP1: layers are wrapped in `configure_model` before adapters are there": (
        lambda: fit(WrapsByHand, CpuFSDPStrategy, injection),
        "configure_model of WrapsByHand has wrapped its layers in FSDP1, and adapters must be in before that. Leave "
        "the wrapping to FSDPStrategy, or call inject there first and wrap with "
        "ignored_states=small_parameters(self).",
    ),
    "FSDP1: adapters are wrapped in `configure_model` without `ignored_states`": (
        lambda: fit(WrapsAdapters, CpuFSDPStrategy, injection),
        "'net.0.A' is part of a flat parameter of FSDP1, and what is trained is to stay whole. Pass "
        "ignored_states=small_parameters(self) where you wrap, or leave the wrapping to FSDPStrategy.",
    ),
    "FSDP1: `use_orig_params=False`": (
        lambda: fit(Net, lambda: CpuFSDPStrategy(use_orig_params=False), injection),
        "FSDPStrategy(use_orig_params=False) hides parameters inside flat ones, and adapters are to stay whole. Leave "
        "use_orig_params at True.",
    ),
    "FSDP1: `ignored_modules`": (
        lambda: fit(Net, lambda: CpuFSDPStrategy(ignored_modules=[]), injection),
        "FSDPStrategy has ignored_modules, which excludes the list of parameters that adapters need there; pass the "
        "parameters of these modules as ignored_states.",
    ),
}


def kind(sentence: str) -> str:
    """The class of what says it."""
    if sentence.startswith("layer "):
        return "ValueError"
    state = ("on all processes", "between processes", "of all processes", "Skipping")
    return "RuntimeError" if any(part in sentence for part in state) else "MisconfigurationException"

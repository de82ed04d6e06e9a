"""Every strategy writes one file of adapters, and any strategy with any number of processes goes on from it."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import (
    AdapterFileError,
    DynamicDoRA,
    RankBudget,
    RankPruning,
    adapter_state_dict,
    inject,
    load,
    presets,
    small_parameters,
)
from lightning_peft.checkpoint import ENTRY
from lightning_peft.rank import clean_name
from lightning_peft.testing.processes import CpuFSDPStrategy, run_processes

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # the runs that resume save nothing
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

BATCHES, WIDTH = 6, 512


class Net(L.LightningModule):
    """A base that is much larger than its adapters, and a head beside them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(),
                                     nn.Linear(WIDTH, 3))  # fmt: skip

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("steps left", 100.0 - self.trainer.global_step)

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])  # type: ignore[no-any-return]

    def train_dataloader(self) -> DataLoader[Any]:
        n, generator = 4 * BATCHES * self.trainer.world_size, torch.Generator().manual_seed(0)
        x, y = torch.randn(n, 8, generator=generator), torch.randint(0, 3, (n,), generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=self.trainer.training)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ShardsItself(Net):
    """FSDP2 with the head sharded too."""

    def configure_model(self) -> None:
        if not isinstance(next(self.parameters()), DTensor):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[2], mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class InjectsThenShards(Net):
    """FSDP2 with adapters and the head whole."""

    def configure_model(self) -> None:
        if not isinstance(self.net[0].base.weight if hasattr(self.net[0], "base") else None, DTensor):
            inject(self, partial(DynamicDoRA, rank=3))
            small = set(small_parameters(self))
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"], ignored_params=small)


KINDS: dict[str, tuple[type[Net], Any]] = {
    "one": (Net, lambda world: "auto"),
    "ddp": (Net, lambda world: DDPStrategy()),
    "fsdp2": (ShardsItself, lambda world: ModelParallelStrategy(world, 1)),
    "fsdp2-full": (InjectsThenShards, lambda world: ModelParallelStrategy(world, 1, save_distributed_checkpoint=False)),
    "fsdp1": (Net, lambda world: CpuFSDPStrategy(state_dict_type="sharded", auto_wrap_policy={nn.Linear})),
    "fsdp1-full": (Net, lambda world: CpuFSDPStrategy(state_dict_type="full")),
}


def make(kind: str, world: int, *extra: L.Callback, **options: Any) -> tuple[Net, L.Trainer]:
    torch.manual_seed(5)
    module, strategy = KINDS[kind]
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy(world), logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, enable_checkpointing=any(
            isinstance(callback, ModelCheckpoint) for callback in extra),
        callbacks=[*presets.dynamic_dora(final_rank=2, interval=2), *extra], **({"max_epochs": 2} | options),
    )  # fmt: skip
    return module(), trainer


def state(module: Net) -> dict[str, Tensor]:
    """What is trained, whole."""
    return {n: v.full_tensor() if isinstance(v, DTensor) else v.clone() for n, v in adapter_state_dict(module).items()}


def worth(trainer: L.Trainer) -> dict[str, Tensor]:
    pruning = next(c for c in trainer.callbacks if isinstance(c, RankPruning))
    found: dict[str, Tensor] = pruning.policy.state_dict()["importance"]["worth"]
    return found


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [n for n in {**a, **b} if n not in a or n not in b or not torch.equal(a[n].cpu(), b[n].cpu())]


def work(kind: str, folder: Path) -> dict[str, Any]:
    """All that a user does with checkpoints, under one strategy."""
    savers = [
        ModelCheckpoint(folder, "best-{step}", monitor="steps left", save_top_k=1, save_last=True),
        ModelCheckpoint(folder, "{step}", every_n_train_steps=7, save_top_k=-1),
        ModelCheckpoint(folder, "weights-{step}", every_n_train_steps=8, save_top_k=-1, save_weights_only=True),
    ]
    module, trainer = make(kind, 2, *savers)
    trainer.fit(module)
    trainer.save_checkpoint(folder / "after.ckpt")
    refused = ""
    (folder / "folder.ckpt").mkdir(exist_ok=True)
    try:
        trainer.save_checkpoint(folder / "folder.ckpt")
    except IsADirectoryError as error:
        refused = str(error)
    left = state(module)

    again, trainer = make(kind, 2)
    trainer.fit(again, ckpt_path=folder / "step=7.ckpt")

    seen: dict[str, Any] = {}
    for entry in ("validate", "test", "predict"):
        fresh, trainer = make(kind, 2, use_distributed_sampler=False)
        call = getattr(trainer, entry)
        given = {} if entry == "predict" else {"verbose": False}
        result = call(fresh, ckpt_path=folder / "after.ckpt", **given)
        seen[entry] = differences(left, state(fresh))
        if entry == "predict":
            bare = load(Net(), folder / "after.ckpt")
            batches = [batch[0] for batch in trainer.predict_loop._combined_loader.flattened[0]]  # type: ignore[union-attr]
            with torch.no_grad():
                expected = torch.cat([bare.eval().net(x) for x in batches])
            seen["apart"] = float((torch.cat(result) - expected).abs().max() / expected.abs().max())
    foreign = ""
    torch.save({"state_dict": Net().state_dict(), "pytorch-lightning_version": L.__version__}, folder / "foreign.ckpt")
    fresh, trainer = make(kind, 2)
    try:
        trainer.validate(fresh, ckpt_path=folder / "foreign.ckpt", verbose=False)
    except AdapterFileError as error:
        foreign = str(error)
    return {"left": left, "resumed": differences(left, state(again)), "refused": refused, "foreign": foreign, **seen}


@pytest.mark.parametrize("kind", list(KINDS)[1:])
def test_every_strategy_writes_and_reads_one_plain_file(tmp_path: Path, kind: str) -> None:
    for result in run_processes(2, work, kind, tmp_path):
        assert result["validate"] == result["test"] == result["predict"] == result["resumed"] == []
        # FSDP's weights lie elsewhere in memory, and kernels of the same product may be chosen by that.
        assert result["apart"] <= (1e-6 if kind.startswith("fsdp") else 0), "predictions of a model in a bare script"
        assert ("could not be written" if kind == "ddp" else "older sharded checkpoint") in result["refused"]
        assert "was not written by AdapterCheckpoint" in result["foreign"]
    names = {path.name for path in tmp_path.glob("*.ckpt") if path.is_file()}
    assert names == {
        "best-step=12.ckpt",
        "last.ckpt",
        "after.ckpt",
        "step=7.ckpt",
        "weights-step=8.ckpt",
        "foreign.ckpt",
    }
    inject(plain := Net(), partial(DynamicDoRA, rank=3))
    keys = adapter_state_dict(plain).keys()
    for name in names - {"foreign.ckpt"}:
        saved = torch.load(tmp_path / name, weights_only=True)
        assert saved["state_dict"].keys() == keys
        assert not [key for key in keys if ".base." in key]
        assert saved["state_dict"]["net.4.weight"].shape == (3, WIDTH)
        assert (tmp_path / name).stat().st_size < WIDTH * WIDTH * 4 / 2, "half of what the base would take"
        assert RankBudget.of(load(Net(), tmp_path / name)).ranks() == saved[ENTRY]["ranks"]
    for name in ("best-step=12.ckpt", "last.ckpt", "after.ckpt"):
        bare = adapter_state_dict(load(Net(), tmp_path / name))
        assert differences(result["left"], bare) == []


class SaveAmidStep(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == 9:  # 4 steps and one micro-batch
            trainer.save_checkpoint(self.path)


class Compare(L.Callback):
    """Holds what was restored against the file, right before the first batch."""

    def __init__(self, path: Path) -> None:
        self.saved = torch.load(path, weights_only=True)
        self.different: list[str] = ["nothing was compared"]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self.different != ["nothing was compared"]:
            return
        saved = self.saved
        self.different = differences(saved["state_dict"], state(pl_module))  # type: ignore[arg-type]
        here = trainer.strategy.optimizer_state(trainer.optimizers[0])
        (there,) = saved["optimizer_states"]
        for i in {**there["state"], **here["state"]}:
            self.different += [f"optimizer {i} {key}" for key in differences(there["state"][i], here["state"][i])]
        if there["param_groups"] != here["param_groups"]:
            self.different.append("groups")
        self.different += differences(
            saved["callbacks"]["RankPruning"]["policy"]["importance"]["worth"], worth(trainer)
        )
        (scheduler,) = saved["lr_schedulers"]
        if trainer.lr_scheduler_configs[0].scheduler.state_dict() != scheduler:
            self.different.append("schedule")
        if trainer.global_step != saved["global_step"] or trainer.global_step != 4:
            self.different.append("step")
        gradients = saved["lightning_peft_gradients"]
        for name, p in ((clean_name(name), p) for name, p in pl_module.named_parameters()):
            if p.requires_grad:
                mean = gradients["sharded"].get(name)
                if mean is None:
                    mean = torch.stack([held[name] for held in gradients["ranks"]]).mean(0)
                assert p.grad is not None
                now = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
                if dist.is_initialized() and not isinstance(p.grad, DTensor):
                    dist.all_reduce(now)
                    now /= dist.get_world_size()
                if not torch.allclose(now, mean, rtol=1e-6, atol=0):
                    self.different.append(f"gradient {name}")


def save(kind: str, world: int, path: Path) -> None:
    module, trainer = make(kind, world, SaveAmidStep(path), accumulate_grad_batches=2, max_epochs=4)
    trainer.fit(module)


def go_on(kind: str, world: int, paths: list[Path]) -> list[tuple[list[str], list[str], int, dict[str, int]]]:
    results = []
    for path in paths:
        compare = Compare(path)
        module, trainer = make(kind, world, compare, accumulate_grad_batches=2, max_epochs=4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, ckpt_path=path)
        said = [str(w.message) for w in caught if "processes and goes on" in str(w.message)]
        finite = all(bool(value.isfinite().all()) for value in state(module).values())
        results.append((compare.different, said, trainer.global_step if finite else -1, RankBudget.of(module).ranks()))
        if kind == "fsdp2":
            assert isinstance(module.net[4].weight, DTensor), "the head is sharded again"
    return results


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("written")
    paths = {}
    for kind, world in (("one", 1), ("ddp", 2), ("fsdp1", 2), ("fsdp2", 2)):
        paths[f"{kind} {world}"] = folder / f"{kind}-{world}.ckpt"
        run_processes(world, save, kind, world, paths[f"{kind} {world}"])
    return paths


@pytest.mark.parametrize(("kind", "world", "sources"), [
    ("one", 1, ["ddp 2", "fsdp1 2", "fsdp2 2"]),
    ("ddp", 2, ["one 1", "fsdp2 2"]),
    ("ddp", 4, ["ddp 2"]),
    ("fsdp2", 2, ["one 1", "ddp 2", "fsdp1 2"]),
    ("fsdp2", 4, ["fsdp2 2"]),
    ("fsdp1", 2, ["one 1", "fsdp2 2"]),
])  # fmt: skip
def test_strategy_and_world_size_may_change(
    written: dict[str, Path], kind: str, world: int, sources: list[str]
) -> None:
    answers = run_processes(world, go_on, kind, world, [written[source] for source in sources])
    for rank, results in enumerate(answers):
        for source, (different, said, steps, ranks) in zip(sources, results, strict=True):
            assert different == [], source
            assert steps == 12
            assert sum(ranks.values()) == 4
            old = int(source.split()[1])
            assert said == ([] if old == world or rank else [
                f"This checkpoint was written by {old} processes and goes on with {world}: random numbers start anew, "
                "and each process goes on after as many batches as one had taken. Weights, masks, optimizer and "
                "schedules go on where they stood."
            ])  # fmt: skip

"""What the distributed tests train: modules of several shapes under every strategy, on the same global batches.

Not a test file: `pythonpath` in setup.cfg lets the tests of this folder import it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import DynamicDoRA, RankBudget, RankPruning, inject, small_parameters
from lightning_peft.distributed import whole
from lightning_peft.rank.budget import clean_name
from lightning_peft.surgery import trained
from lightning_peft.testing.processes import CpuFSDPPrecision, CpuFSDPStrategy

GLOBAL_BATCH = 8
BATCHES = 12


class Block(nn.Sequential):
    """What is a unit of its own when the module shards itself."""


class Stack(nn.Sequential):
    """Layers one after the other; with `checkpointing` their activations are computed again in the backward."""

    checkpointing = False
    computed = 0  # how often a layer was

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            compute = partial(self._compute, layer)
            x = checkpoint(compute, x, use_reentrant=False) if self.checkpointing else compute(x)  # type: ignore[assignment]
        return x

    def _compute(self, layer: nn.Module, x: Tensor) -> Tensor:
        self.computed += 1
        y: Tensor = layer(x)
        return y


def mlp() -> nn.Module:
    """Two blocks and a head; 33 rows cannot be shared evenly."""
    return Stack(Block(nn.Linear(16, 33), nn.Tanh()), Block(nn.Linear(33, 32), nn.Tanh()), nn.Linear(32, 4))


def vectors() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    count = GLOBAL_BATCH * BATCHES
    x, y = torch.randn(count, 16, generator=generator), torch.randint(0, 4, (count,), generator=generator)
    return TensorDataset(x, y)


class Host(L.LightningModule):
    """A plain classifier that knows nothing of adapters; the same start and the same global batches everywhere."""

    def __init__(
        self,
        build: Callable[[], nn.Module] = mlp,
        data: Callable[[], TensorDataset] = vectors,
        checkpointing: bool = False,
        backend: str | None = None,
        rows: int | None = None,
    ) -> None:
        super().__init__()
        self.data, self.rows = data, rows
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = build()
        if checkpointing:
            self.net.checkpointing = True  # type: ignore[assignment]
        if backend is not None:
            for block in self.net.children():
                block.compile(backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        size = GLOBAL_BATCH // world
        batches = [list(range(i, i + GLOBAL_BATCH)) for i in range(0, GLOBAL_BATCH * BATCHES, GLOBAL_BATCH)]
        mine = [batch[rank * size : (rank + 1) * size][: self.rows] for batch in batches]
        return DataLoader(self.data(), batch_sampler=mine)  # type: ignore[arg-type]  # a list is iterable

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Sharded(Host):
    """The same under FSDP2, as a user writes it who knows nothing of adapters: all is sharded, also the head."""

    units: tuple[type[nn.Module], ...] = (Block, nn.TransformerEncoderLayer)
    policy: Any = None

    def configure_model(self) -> None:
        if not any(isinstance(p, DTensor) for p in self.parameters()):
            self.shard()

    def shard(self, **options: Any) -> None:
        options["mesh"] = self.device_mesh["data_parallel"]  # type: ignore[index]
        if self.policy is not None:
            options["mp_policy"] = self.policy
        for unit in [m for m in self.net.modules() if isinstance(m, self.units)]:
            fully_shard(unit, **options)
        fully_shard(self.net, **options)


class ShardedAroundAdapters(Sharded):
    """FSDP2 with adapters known: what is trained is left whole, the head too."""

    adapter: Any = partial(DynamicDoRA, rank=6, dropout=0.0)
    beside: Sequence[str] | None = None

    def shard(self, **options: Any) -> None:
        inject(self, self.adapter, train=self.beside)
        super().shard(ignored_params=set(small_parameters(self)), **options)


STRATEGIES: dict[str, Callable[[int], Any]] = {
    "single": lambda world: "auto",
    "single again": lambda world: "auto",
    "half": lambda world: "auto",  # a single process that has lost half of every batch, to see what that would do
    "ddp": lambda world: DDPStrategy(),
    "ddp find_unused": lambda world: DDPStrategy(find_unused_parameters=True),
    "ddp static": lambda world: DDPStrategy(static_graph=True),
    "fsdp1": lambda world: CpuFSDPStrategy(),
    "fsdp1 nested": lambda world: CpuFSDPStrategy(auto_wrap_policy={Block, nn.Linear, nn.Conv1d}),
    "fsdp2": lambda world: ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1),
    "fsdp2 around": lambda world: ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1),
}


@dataclass(frozen=True)
class Job:
    """One training run: the same on one process and on many.

    Attributes:
        callbacks: makes the callbacks, anew for each run.
        host: arguments of :class:`Host`.
        trainer: arguments of the Trainer.
        precision: for Trainer, by name.
        sharded: the class that is trained under FSDP2.
        around: the same where adapters are known.
    """

    callbacks: Callable[[], Sequence[L.Callback]]
    host: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    precision: str = "32-true"
    sharded: type[Host] = Sharded
    around: type[Host] = ShardedAroundAdapters


class Diary(L.Callback):
    """Writes down the masks right after each event."""

    def __init__(self) -> None:
        self.events: dict[int, dict[str, list[bool]]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        prunings = [c for c in trainer.callbacks if isinstance(c, RankPruning)]  # type: ignore[attr-defined]
        if prunings and prunings[0].event_step == trainer.global_step > 0:
            masks = {name: site.gate.open().tolist() for name, site in RankBudget.of(pl_module).items()}
            self.events[trainer.global_step] = masks


def train(kind: str, job: Job, world: int, nodes: int = 1) -> dict[str, Any]:
    """One fit in this process; everything that it has trained, whole, and the masks after every event."""
    torch.manual_seed(5)
    host = {"fsdp2": job.sharded, "fsdp2 around": job.around}.get(kind, Host)
    model = host(**job.host, **({"rows": GLOBAL_BATCH // 2} if kind == "half" else {}))
    precision: dict[str, Any] = {"precision": job.precision}
    if kind.startswith("fsdp1") and job.precision != "32-true":
        precision = {"plugins": [CpuFSDPPrecision(job.precision)]}
    elif job.precision == "16-mixed":
        precision = {"plugins": [MixedPrecision("16-mixed", "cpu")]}  # by name Lightning makes it bf16 on a CPU
    diary = Diary()
    torch._dynamo.reset()  # what an earlier run has compiled would serve this one
    graphs = counters["stats"]["unique_graphs"]
    trainer = L.Trainer(
        accelerator="cpu", num_nodes=nodes, devices=world // nodes, strategy=STRATEGIES[kind](world),
        use_distributed_sampler=False, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[*job.callbacks(), diary],
        **{"max_epochs": 2, **precision, **job.trainer},
    )  # fmt: skip
    trainer.fit(model)
    return {
        "steps": trainer.global_step,
        "computed": getattr(model.net, "computed", 0),
        "graphs": counters["stats"]["unique_graphs"] - graphs,
        "events": diary.events,
        "masks": {name: site.gate.mask.tolist() for name, site in RankBudget.of(model).items()},
        "weights": {clean_name(name): whole(p.detach()).float().numpy() for name, p in trained(model).items()},
        "mask dtypes": {str(site.gate.mask.dtype) for site in RankBudget.of(model).values()},
    }


def train_all(runs: Sequence[tuple[str, str]], jobs: dict[str, Job], world: int, nodes: int = 1) -> dict[Any, Any]:
    """Several fits, one after the other in the same processes: (strategy, job) -> result, or the error as text."""
    torch.set_num_threads(1)
    results: dict[Any, Any] = {}
    for kind, name in runs:
        try:
            results[kind, name] = train(kind, jobs[name], world, nodes)
        except Exception as error:
            results[kind, name] = f"{type(error).__name__}: {error}"
    return results


ROUNDINGS = 64 * 2.0**-24
"""How far float32 weights may be from those of one process, which adds up in another order.

Kernels round by the processor: up to 30 roundings were seen. A lost half of a batch, or lost term, is above 1e-3.
"""


def change(result: dict[str, Any], reference: dict[str, Any]) -> float:
    """The largest difference of two runs' weights: max |w - w'| / max |w'| per tensor, of all tensors the largest."""
    assert result["weights"].keys() == reference["weights"].keys()
    pairs = [(result["weights"][name], value) for name, value in reference["weights"].items()]
    return max(float(abs(mine - value).max() / abs(value).max()) for mine, value in pairs)

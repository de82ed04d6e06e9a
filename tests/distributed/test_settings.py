"""What people set beside the table of docs/exactness.md: other methods, terms, layers, averages, dtypes, DDP flags."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from hosts import (
    BATCHES,
    GLOBAL_BATCH,
    ROUNDINGS,
    Block,
    Job,
    Sharded,
    ShardedAroundAdapters,
    Stack,
    change,
    mlp,
    train_all,
)
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import TensorDataset
from transformers import BertConfig, BertForSequenceClassification
from transformers.models.bert.modeling_bert import BertLayer

from lightning_peft import (
    DEM,
    AdapterInjection,
    Budget,
    Cubic,
    LoRA,
    Orthogonality,
    RankPolicy,
    RankPruning,
    Regularization,
    Regularizer,
    Taylor,
    UntilTail,
    WeightDecomposed,
    presets,
)
from lightning_peft.testing.processes import run_processes

pytestmark = [
    pytest.mark.dist,
    # torch: its compiler looks at the gradient of whatever goes into a graph
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified"),
    # Lightning: said of the base, whose sharded copy is wide; the adapters are as narrow as asked for
    pytest.mark.filterwarnings("ignore:FSDP with `bf16-true` enables computation in lower precision"),
    # torch: random numbers on a sharded tensor, drawn when Lightning materialises the base
    pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support on cpu"),
    # torch: what its code generator imports
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    # torch: attention's nested tensors are for inference, which these layers are not used for
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]

BF16 = 2.0**-8
EVERYWHERE = ("ddp", "fsdp1", "fsdp1 nested", "fsdp2")


def dora(dropout: float = 0.0, **options: Any) -> list[L.Callback]:
    return presets.dynamic_dora(final_rank=4, interval=3, dropout=dropout, **options)


def decomposed(**options: Any) -> list[L.Callback]:
    return presets.weight_decomposed(final_rank=4, interval=3, dropout=0.0, **options)


def taylor() -> list[L.Callback]:
    policy = RankPolicy(Cubic(0.1, 0.4), Taylor(), Budget(rank=4), interval=3)
    return [AdapterInjection(partial(LoRA, rank=6)), RankPruning(policy)]


class Leash(Regularizer):
    """A term with a trained scale of its own."""

    def __init__(self) -> None:
        super().__init__(0.1)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
        size = torch.stack([p.square().sum() for n, p in module.named_parameters() if n.endswith(".A")]).sum()
        return size * self.scale.exp() - self.scale


def terms() -> list[L.Callback]:
    added = {"dem": DEM(UntilTail(0.3, 0.5)), "orthogonality": Orthogonality(0.1), "leash": Leash()}
    return [*dora()[:2], Regularization(added)]


def beside(average: Callable[[], L.Callback]) -> list[L.Callback]:
    # Three epochs without a gain of 10 in the loss, which nothing can have: training ends after the fourth.
    return [*dora(), average(), EarlyStopping("loss", min_delta=10.0, patience=3, check_on_train_epoch_end=True)]


def stopped() -> list[L.Callback]:
    return [*dora(), EarlyStopping("loss", min_delta=10.0, patience=3, check_on_train_epoch_end=True)]


class Overflow(L.Callback):
    """Makes the gradients of one step infinite, on the second process alone."""

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 5:
            loss.register_hook(lambda gradient: gradient * float("inf"))


def overflowing() -> list[L.Callback]:
    return [*dora(), Overflow()]


def tokens() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    count = GLOBAL_BATCH * BATCHES
    ids, labels = (torch.randint(0, n, s, generator=generator) for n, s in ((20, (count, 5)), (4, (count,))))
    return TensorDataset(ids, labels)


def sequences() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    count = GLOBAL_BATCH * BATCHES
    return TensorDataset(
        torch.randn(count, 5, 16, generator=generator), torch.randint(0, 4, (count,), generator=generator)
    )


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def embedding() -> nn.Module:
    return Stack(nn.Embedding(20, 16), Mean(), Block(nn.Linear(16, 32), nn.Tanh()), nn.Linear(32, 4))


def attention() -> nn.Module:
    layers = [nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)]
    return Stack(*layers, Mean(), nn.Linear(16, 4))


class LastMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1)


def convolutions() -> nn.Module:
    # Narrow, and few places to sum a gradient over: Adam makes much of how a sum that nearly cancels is rounded.
    first = nn.Conv1d(5, 12, 3, stride=2, padding=1, padding_mode="reflect")
    return Stack(
        Block(first, nn.Tanh()), Block(nn.Conv1d(12, 16, 5, stride=2), nn.Tanh()), LastMean(), nn.Linear(16, 4)
    )


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=4,
        )  # fmt: skip
        self.bert = BertForSequenceClassification(config)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.bert(ids).logits
        return logits


class ShardedBert(Sharded):
    units = (BertLayer,)


class Narrow(Sharded):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


class AroundDecomposed(ShardedAroundAdapters):
    adapter = partial(WeightDecomposed, rank=6, alpha=8.0, dropout=0.0, components="dynamic_dora")


class FromMeta(Sharded):
    """Built without memory and sharded; then the module itself gives it memory and its weights."""

    def shard(self, **options: Any) -> None:
        weights = self.net.state_dict()
        with torch.device("meta"):
            self.net = mlp()
        super().shard(**options)
        self.net.to_empty(device="cpu")
        set_model_state_dict(self.net, weights, options=StateDictOptions(full_state_dict=True))


class LeftOnMeta(Sharded):
    """Built without memory and sharded; Lightning gives it memory, adapters included, and every layer starts anew."""

    def shard(self, **options: Any) -> None:
        with torch.device("meta"):
            self.net = mlp()
        super().shard(**options)


@dataclass(frozen=True)
class Setting:
    """A job, the strategies that it is tried under, and how far from one process it may end up."""

    job: Job
    kinds: tuple[str, ...]
    bound: float = ROUNDINGS


SETTINGS: dict[str, Setting] = {
    "plain": Setting(Job(dora), ("ddp find_unused", "ddp static", "fsdp1 nested")),
    "LoRA scored by Taylor": Setting(Job(taylor), EVERYWHERE),
    "LoRA scored by Taylor, bf16-mixed": Setting(Job(taylor, precision="bf16-mixed"), EVERYWHERE, 8 * BF16),
    "terms": Setting(Job(terms), EVERYWHERE),
    "terms, accumulated and clipped": Setting(
        Job(terms, trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": 4}), EVERYWHERE
    ),
    "clipped by value": Setting(
        Job(dora, trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}), EVERYWHERE
    ),
    "BERT": Setting(Job(dora, {"build": Bert, "data": tokens}, sharded=ShardedBert), ("ddp", "fsdp1", "fsdp2")),
    "attention": Setting(Job(dora, {"build": attention, "data": sequences}), ("ddp", "fsdp1", "fsdp2 around")),
    "convolutions": Setting(
        Job(dora, {"build": convolutions, "data": sequences}), ("ddp", "fsdp1 nested", "fsdp2")
    ),
    "embedding": Setting(
        Job(partial(dora, targets=["0", "2.0"]), {"build": embedding, "data": tokens}), ("ddp", "fsdp1", "fsdp2")
    ),
    "decomposed": Setting(Job(decomposed), ("fsdp1 nested",)),  # a base that is whole in its own forward alone
    "decomposed attention": Setting(
        Job(decomposed, {"build": attention, "data": sequences}, around=AroundDecomposed), ("fsdp1", "fsdp2 around")
    ),
    "decomposed convolutions": Setting(
        Job(decomposed, {"build": convolutions, "data": sequences}), ("ddp", "fsdp1 nested", "fsdp2")
    ),
    "decomposed embedding": Setting(
        Job(partial(decomposed, targets=["0", "2.0"]), {"build": embedding, "data": tokens}), ("fsdp1", "fsdp2")
    ),
    "decomposed, from meta": Setting(Job(decomposed, sharded=FromMeta), ("fsdp2",)),
    "early stopping": Setting(Job(stopped, trainer={"max_epochs": 8}), EVERYWHERE),
    "averages": Setting(Job(partial(beside, WeightAveraging), trainer={"max_epochs": 8}), ("ddp",)),
    "moving averages": Setting(Job(partial(beside, EMAWeightAveraging), trainer={"max_epochs": 8}), ("ddp",)),
    "bf16-true": Setting(Job(dora, precision="bf16-true"), ("ddp", "fsdp1", "fsdp2"), 16 * BF16),
    "narrow units": Setting(Job(dora, sharded=Narrow), ("fsdp2",), 8 * BF16),
    "meta": Setting(Job(dora, sharded=FromMeta), ("fsdp2",)),
}  # fmt: skip

ALIKE: dict[str, tuple[Job, tuple[str, ...]]] = {
    "dropout": (Job(partial(dora, 0.3)), ("ddp", "fsdp1", "fsdp2", "fsdp2 around")),
    "overflow": (Job(overflowing, precision="16-mixed"), ("ddp", "fsdp1", "fsdp2 around")),
    "left on meta": (Job(dora, sharded=LeftOnMeta), ("fsdp2",)),
}

REFUSED: dict[tuple[str, str], str] = {
    (
        "fsdp1",
        "averages",
    ): "WeightAveraging averages a copy of the whole module, and CpuFSDPStrategy shards it. Average",
    ("fsdp2", "moving averages"): "EMAWeightAveraging averages a copy of the whole module, and ModelParallelStrategy",
    ("fsdp2", "attention"): "layer 'net.0.self_attn.in_proj' is part of an attention that is sharded already",
}

JOBS = {name: setting.job for name, setting in SETTINGS.items()} | {name: job for name, (job, _) in ALIKE.items()}


@cache
def alone() -> dict[Any, Any]:
    (results,) = run_processes(1, train_all, [("single", name) for name in JOBS], JOBS, 1, timeout=900)
    return results  # type: ignore[no-any-return]


@cache
def together() -> list[dict[Any, Any]]:
    runs = [(kind, name) for name, setting in SETTINGS.items() for kind in setting.kinds]
    runs += [(kind, name) for name, (_, kinds) in ALIKE.items() for kind in kinds]
    runs += list(REFUSED)
    return run_processes(2, train_all, runs, JOBS, 2, timeout=900)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, each in SETTINGS.items() for kind in each.kinds])
def test_two_processes_give_what_one_gives(name: str, kind: str) -> None:
    reference = alone()["single", name]
    first, second = (result[kind, name] for result in together())
    assert isinstance(reference, dict), reference
    assert isinstance(first, dict), first
    assert first["steps"] == second["steps"] == reference["steps"]
    assert len(reference["events"]) >= 3
    assert first["events"] == second["events"] == reference["events"]
    assert first["mask dtypes"] == {"torch.float32"}
    assert change(second, first) == 0.0
    assert change(first, reference) <= SETTINGS[name].bound


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, kinds) in ALIKE.items() for kind in kinds])
def test_processes_agree_where_each_draws_for_itself(name: str, kind: str) -> None:
    first, second = (result[kind, name] for result in together())
    assert isinstance(first, dict), first
    assert len(first["events"]) >= 3
    assert first["events"] == second["events"]
    assert sum(map(sum, first["masks"].values())) == 8
    assert change(second, first) == 0.0


@pytest.mark.parametrize("kind", ALIKE["overflow"][1])
def test_an_overflow_on_one_process_skips_the_step_on_all(kind: str) -> None:
    # One process alone does not overflow. That the two still agree is what the test above says.
    assert change(together()[0][kind, "overflow"], alone()["single", "overflow"]) > 4 * 2**-11


@pytest.mark.parametrize(("kind", "name"), REFUSED)
def test_what_cannot_be_is_refused_with_a_sentence(kind: str, name: str) -> None:
    for result in together():
        assert REFUSED[kind, name] in str(result[kind, name])


def test_settings_do_something() -> None:
    """Each moves the weights away from the plain run's, so that a setting that is ignored would be seen."""
    plain = alone()["single", "plain"]
    for name in ("terms", "clipped by value", "averages", "moving averages", "bf16-true", "dropout"):
        other = alone()["single", name]
        shared = {key: value for key, value in other["weights"].items() if key in plain["weights"]}
        assert change({"weights": shared}, plain) > 1e-3, name
    assert alone()["single", "averages"]["steps"] == 4 * BATCHES
    assert alone()["single", "terms"]["weights"]["peft_terms.leash.scale"] != 0.5


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile generates C++ here, and there is no compiler")
def test_compiled_code_gives_what_one_process_gives() -> None:
    jobs = {"compiled": Job(dora, {"backend": "inductor"})}
    (single,) = run_processes(1, train_all, [("single", "compiled")], jobs, 1)
    runs = [("ddp", "compiled"), ("fsdp2", "compiled")]
    first, _ = run_processes(2, train_all, runs, jobs, 2, timeout=600)
    reference = single["single", "compiled"]
    assert isinstance(reference, dict), reference
    for run in runs:
        assert isinstance(first[run], dict), first[run]
        assert first[run]["events"] == reference["events"]
        assert change(first[run], reference) <= ROUNDINGS

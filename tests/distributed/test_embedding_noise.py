"""Noise on two processes: that of one on the whole batch; and one backward, whatever the passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from hosts import BATCHES, GLOBAL_BATCH, Block, Job, Sharded, ShardedAroundAdapters, Stack, change, train_all
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_peft import (
    DEM,
    AdapterInjection,
    AdversarialNoise,
    LoRA,
    RandomPositionNoise,
    Regularization,
    inject,
    small_parameters,
)
from lightning_peft.testing.processes import run_processes

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
]

TARGETS = [r"1\.0"]
LORA = partial(LoRA, rank=2)


class Tokens(nn.Embedding):
    """A unit of its own where the module shards itself."""


class Middle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def text() -> nn.Module:
    return Stack(Tokens(20, 16, padding_idx=0), Block(nn.Linear(16, 24), nn.Tanh()), Middle(), nn.Linear(24, 4))


def texts() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    count = GLOBAL_BATCH * BATCHES
    x, y = torch.randint(20, (count, 5), generator=generator), torch.randint(0, 4, (count,), generator=generator)
    return TensorDataset(x, y)


class ShardedText(Sharded):
    units = (Tokens, Block)


class ShardedTextAround(ShardedAroundAdapters):
    units = (Tokens, Block)
    adapter = LORA
    beside = ("3",)

    def shard(self, **options: Any) -> None:
        inject(self, self.adapter, ["net.1.0"], train=["3"])
        Sharded.shard(self, ignored_params=set(small_parameters(self)), **options)


def job(*noise: Callable[[], Callback], adapters: bool = True, checkpointing: bool = False, **trainer: Any) -> Job:
    def callbacks() -> list[Callback]:
        placed = [AdapterInjection(LORA, TARGETS, ["3"]), Regularization({"dem": DEM(0.5)})] if adapters else []
        return [*placed, *(make() for make in noise)]

    host = {"build": text, "data": texts, "checkpointing": checkpointing}
    return Job(
        callbacks, host, {"max_epochs": 1, "max_steps": 4, **trainer}, sharded=ShardedText, around=ShardedTextAround
    )


RPN = partial(RandomPositionNoise, 0.3, passes=2)
FREELB = partial(AdversarialNoise, 0.5, passes=3, start=0.5, reduction="mean")
JOBS = {
    "clean": job(),
    "rpn": job(RPN, accumulate_grad_batches=2),
    "rpn apart": job(partial(RPN, execution="apart"), checkpointing=True),
    "rpn batched": job(partial(RPN, execution="batched")),
    "freelb": job(FREELB),
    "freelb together": job(partial(FREELB, execution="together"), checkpointing=True),
    "whole model": job(RPN, adapters=False),
    "whole model, freelb": job(partial(FREELB, execution="together"), adapters=False),
    "whole model, apart": job(partial(RPN, execution="apart"), adapters=False),
}
ADAPTED = ["rpn", "rpn apart", "rpn batched", "freelb", "freelb together"]
UNDER = {
    "ddp": [*ADAPTED, "whole model, apart"],
    "ddp find_unused": ["rpn apart"],
    "ddp static": ["freelb"],
    "fsdp1": ["rpn", "rpn apart", "freelb"],
    "fsdp2": ["rpn", "freelb together", "whole model", "whole model, freelb"],
    "fsdp2 around": ["rpn", "rpn apart", "freelb"],
}
RUNS = [(kind, name) for kind, names in UNDER.items() for name in names]
REFUSED = ("fsdp2", "whole model, apart")


@cache
def alone() -> dict[Any, Any]:
    names = [*JOBS]
    found: dict[Any, Any] = run_processes(1, train_all, [("single", n) for n in names], JOBS, 1, timeout=300)[0]
    return found


@cache
def both() -> list[dict[Any, Any]]:
    return run_processes(2, train_all, [*RUNS, REFUSED], JOBS, 2, timeout=300)


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_two_processes_are_one(kind: str, name: str) -> None:
    for each in both():
        result = each[kind, name]
        assert isinstance(result, dict), result
        assert change(result, alone()["single", name]) < 2e-5


@pytest.mark.parametrize("name", ADAPTED)
def test_it_could_fail(name: str) -> None:
    assert change(alone()["single", name], alone()["single", "clean"]) > 1e-2


def test_gradients_of_split_parameters_cannot_be_taken_apart() -> None:
    for each in both():
        assert "is trained and split over processes, and execution='apart' takes gradients of" in each[REFUSED]

"""Prompts on two processes: the weights of one process, also where the model's embedding is in pieces; and resumed."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from hosts import BATCHES, GLOBAL_BATCH, STRATEGIES, Job, Sharded, change, train_all
from presets.every import NAMES as ALL
from presets.every import adapts_models, small
from prompted import TOKENS, build
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import TensorDataset
from transformers.models.bert.modeling_bert import BertForSequenceClassification, BertLayer

from lightning_peft import AdapterCheckpoint, AdapterInjection, RankPruning, SoftPrompt
from lightning_peft.checkpoint import adapter_state_dict
from lightning_peft.distributed import whole
from lightning_peft.testing.processes import run_processes

pytestmark = pytest.mark.dist


class Reader(nn.Module):
    """A transformers classifier, called with token ids padded on the right; 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build("bert").train()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=x, attention_mask=(x != 0).long()).logits
        return logits


class ShardedReader(Sharded):
    """FSDP2 as a user writes it: each block, and the model around them, which then has the embedding in pieces."""

    def shard(self, **options: Any) -> None:
        options["mesh"] = self.device_mesh["data_parallel"]  # type: ignore[index]
        for unit in reversed(list(self.net.modules())):  # what is inside comes first
            if isinstance(unit, BertLayer | BertForSequenceClassification):
                fully_shard(unit, **options)


def texts() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(3, TOKENS, (GLOBAL_BATCH * BATCHES, 6), generator=generator)
    lengths = torch.randint(2, 7, (len(x), 1), generator=generator)
    return TensorDataset(x.masked_fill(torch.arange(6) >= lengths, 0), x[:, 0] % 3)


def callbacks() -> list[L.Callback]:
    return [AdapterInjection(partial(SoftPrompt, length=4), verbose=False), AdapterCheckpoint()]


HOST: dict[str, Any] = {"build": Reader, "data": texts}
NAMES = [name for name in ALL if adapts_models(name)]
JOBS = {
    name: Job(made, host=HOST, sharded=ShardedReader, trainer={"max_epochs": 1})
    for name, made in {"prompt": callbacks, **{name: partial(small, name) for name in NAMES}}.items()
}


@cache
def results(world: int, *kinds: str) -> list[dict[Any, Any]]:
    runs = [(kind, name) for kind in kinds for name in JOBS]
    return run_processes(world, train_all, runs, JOBS, world, timeout=600)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", JOBS)
def test_two_processes_are_one(name: str, kind: str) -> None:
    alone = results(1, "single", "half")[0]
    assert isinstance(alone["single", name], dict), alone["single", name]
    assert any(weight.endswith(("model.P", "model.B")) for weight in alone["single", name]["weights"])
    for both in results(2, "ddp", "fsdp2"):
        assert isinstance(both[kind, name], dict), both[kind, name]
        assert both[kind, name]["events"] == alone["single", name]["events"]
        assert both[kind, name]["masks"] == alone["single", name]["masks"]
        assert change(both[kind, name], alone["single", name]) < 1e-5
    assert bool(alone["single", name]["events"]) == any(
        isinstance(each, RankPruning) for each in JOBS[name].callbacks()
    )
    assert change(alone["half", name], alone["single", name]) > 1e-3  # it could fail


class SaveAt(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 5:
            trainer.save_checkpoint(self.path)


def fit(seed: int, *extra: L.Callback, ckpt_path: Path | None = None) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    module = ShardedReader(**HOST)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=STRATEGIES["fsdp2"](2), max_epochs=1, use_distributed_sampler=False,
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[*callbacks(), *extra],
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt_path)
    assert isinstance(module.net.get_parameter("model.base.bert.embeddings.word_embeddings.weight"), DTensor)
    state = {name: whole(value).clone() for name, value in adapter_state_dict(module).items()}
    moments = trainer.optimizers[0].state_dict()["state"]
    return state | {f"{i}.{key}": whole(value) for i in moments for key, value in moments[i].items()}


def interrupt(path: Path) -> list[str]:
    """What is different after a stop."""
    torch.set_num_threads(1)
    through, rest = fit(3, SaveAt(path)), fit(77, ckpt_path=path)
    assert through.keys() == rest.keys()
    saved = torch.load(path, weights_only=True)["state_dict"]["net.model.P"]
    assert not torch.equal(saved, through["net.model.P"])  # there was something left to train
    return [name for name, value in through.items() if not torch.equal(value, rest[name])]


def test_interrupted_is_uninterrupted_where_the_model_is_sharded(tmp_path: Path) -> None:
    assert run_processes(2, interrupt, tmp_path / "a.ckpt", timeout=600) == [[], []]

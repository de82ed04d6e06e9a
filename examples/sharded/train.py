"""Adapters on a model that shards itself with FSDP2; start it with torchrun, on CPUs as well as on GPUs.

torchrun --standalone --nproc-per-node 2 examples/sharded/train.py
"""

import os
from functools import partial

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from lightning_peft import DynamicDoRA, inject, presets, small_parameters

SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}


class Classifier(L.LightningModule):
    """A toy in place of a model that does not fit on one device."""

    def configure_model(self) -> None:
        """Build, adapt, shard: adapters and head stay whole on every process."""
        if hasattr(self, "model"):
            return  # every entry point of the Trainer comes by here
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same weights on every process, as a pretrained model has them
            self.model = BertForSequenceClassification(BertConfig(vocab_size=99, **SIZES)).train()
        inject(self, partial(DynamicDoRA, rank=12))
        whole = set(small_parameters(self))
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh, ignored_params=whole)
        fully_shard(self.model, mesh=mesh, ignored_params=whole)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the model's own loss."""
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train what requires a gradient."""
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=2e-3)


def main() -> None:
    """Train and save."""
    tokens = torch.randint(99, (64, 16), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": (row[0] > 49).long()} for row in tokens]
    world = int(os.environ["WORLD_SIZE"])
    trainer = L.Trainer(
        max_epochs=4,
        strategy=ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1),
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=world // int(os.environ["LOCAL_WORLD_SIZE"]),
        log_every_n_steps=1,
        callbacks=[*presets.dynamic_dora(final_rank=8)],
    )
    model = Classifier()
    trainer.fit(model, DataLoader(rows, batch_size=4, shuffle=True))
    trainer.save_checkpoint("adapters.ckpt")  # one ordinary file, which one process can load


if __name__ == "__main__":
    main()

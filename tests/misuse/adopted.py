"""Mistakes with a PEFT model that is adopted."""

from __future__ import annotations

from typing import Any

import peft
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from misuse.setups import LORA, Encoder, Rows, fit, pruning
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lightning_peft import (
    AdapterCheckpoint,
    AdapterFileError,
    AdapterInjection,
    Adoption,
    Budget,
    Cubic,
    Orthogonality,
    RankAllocation,
    RankPolicy,
    RankPruning,
    Taylor,
    adopt,
    inject,
    load,
    merge,
    release,
)


class Job(Encoder):
    """A module that holds a PEFT model."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.model: Any = wrapped(config)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.classifier(self.norm(self.model(batch))).square().mean()


class HeadOnly(Job):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.classifier.parameters(), lr=1e-3)


def wrapped(config: Any = None) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
        return get_peft_model(net, config or LoraConfig(r=4, target_modules=["0", "1"]))


def adalora(**more: Any) -> AdaLoraConfig:
    return AdaLoraConfig(**{"init_r": 4, "target_r": 2, "total_step": 12, "target_modules": ["0", "1"], **more})


def twice() -> None:
    model = wrapped()
    adopt(model)
    adopt(model)


def merged() -> None:
    model = wrapped()
    model.merge_adapter()
    adopt(model)


def disabled() -> None:
    model = wrapped()
    with model.disable_adapter():
        adopt(model)


def several() -> None:
    model = wrapped()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    adopt(model)


def under_inference_mode() -> None:
    with torch.inference_mode():
        adopt(wrapped())


def prompts() -> None:
    net = BertModel(
        BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    adopt(get_peft_model(net, peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2)))


def ours(verb: Any) -> None:
    model = wrapped()
    adopt(model)
    verb(model)


def deleted() -> None:
    model = wrapped()
    adopt(model)
    model.delete_adapter("default")
    Orthogonality()(model, None, None)


def saved_adopted() -> str:
    fit(Job(), Adoption(verbose=False), AdapterCheckpoint(), max_steps=2).save_checkpoint("adopted.ckpt")
    return "adopted.ckpt"


ROWS: Rows = {
    "`adopt` of a model without PEFT layers": (lambda: adopt(Encoder()), ValueError),
    "`adopt` twice": (twice, ValueError),
    "`adopt` of IA3": (
        lambda: adopt(wrapped(peft.IA3Config(target_modules=["0"], feedforward_modules=[]))),
        TypeError,
    ),
    "`adopt` of OFT": (
        lambda: adopt(wrapped(peft.OFTConfig(target_modules=["0"], r=2, oft_block_size=0))),
        TypeError,
    ),
    "`adopt` of prompt tuning": (prompts, TypeError),
    "`adopt` of merged adapters": (merged, RuntimeError),
    "`adopt` of adapters that are disabled": (disabled, RuntimeError),
    "`adopt` with several active adapters": (several, ValueError),
    "`adopt` of an adapter that is not there": (lambda: adopt(wrapped(), "mine"), ValueError),
    "`adopt` under inference mode": (under_inference_mode, RuntimeError),
    "`adopt` of what we have injected ourselves": (
        lambda: [model := Encoder(), inject(model, LORA), adopt(model)],
        ValueError,
    ),
    "`inject` into a PEFT model": (lambda: inject(wrapped(), LORA), ValueError),
    "`merge` of an adopted model": (lambda: ours(merge), ValueError),
    "`release` of what was not adopted": (lambda: release(wrapped()), ValueError),
    "an adopted adapter that was deleted": (deleted, RuntimeError),
    "Adoption and AdapterInjection together": (
        lambda: fit(Job(), Adoption(), AdapterInjection(LORA)),
        MisconfigurationException,
    ),
    "Adoption after RankPruning": (
        lambda: fit(Job(), pruning(rank=2), Adoption(verbose=False)),
        MisconfigurationException,
    ),
    "Adoption of a model without PEFT layers": (lambda: fit(Encoder(), Adoption()), ValueError),
    "compaction of an adopted model": (
        lambda: fit(
            Job(),
            Adoption(verbose=False),
            RankPruning(RankPolicy(Cubic(), Taylor(), Budget(rank=2)), compact="final"),
        ),
        MisconfigurationException,
    ),
    "PEFT's parameters in no optimizer": (
        lambda: fit(HeadOnly(), Adoption(verbose=False)),
        MisconfigurationException,
    ),
    "RankAllocation without AdaLoRA": (lambda: fit(Job(), RankAllocation()), MisconfigurationException),
    "RankAllocation and RankPruning together": (
        lambda: fit(Job(adalora()), RankAllocation(), pruning(rank=2)),
        MisconfigurationException,
    ),
    "an AdaLoraConfig made for another number of steps": (
        lambda: fit(Job(adalora(total_step=100)), RankAllocation()),
        MisconfigurationException,
    ),
    "an AdaLoraConfig that cuts nothing": (
        lambda: fit(Job(adalora(target_r=4)), RankAllocation()),
        MisconfigurationException,
    ),
    "shares of AdaLoRA that leave no window": (
        lambda: fit(Job(adalora()), RankAllocation(warmup=0.6, tail=0.5)),
        MisconfigurationException,
    ),
    "`load` of an adopted model's checkpoint on the plain base": (
        lambda: load(Encoder(), saved_adopted()),
        AdapterFileError,
    ),
    "`load` of an adopted model's checkpoint with another config": (
        lambda: load(Job(LoraConfig(r=2, target_modules=["0", "1"])), saved_adopted()),
        AdapterFileError,
    ),
}

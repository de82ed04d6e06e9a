"""A TextVAE on two processes is that of one on the same global batches: noise, negatives, free bits, turns, figures."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_peft import SeparableCritic
from lightning_peft.modules import (
    FreeBits,
    Lagging,
    LatentInformation,
    LSTMDecoder,
    LSTMEncoder,
    Pieces,
    SentenceData,
    TextVAE,
)
from lightning_peft.testing.processes import run_processes

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")]

WORDS = ["red", "green", "blue", "and", "the", "car", "tree", "sky", "is", "was"]


# In float64: Adam divides by the size of gradients, and makes of the rounding of small ones a difference that is large.
def train(world: int, source: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(7)
    data = SentenceData(source, cut=Pieces(4), val_share=23 / 95, batch_size=8 // world, seed=2)
    information = LatentInformation(0.8, critic=partial(SeparableCritic, hidden=8), lr=1e-2, critic_steps=2, warmup=0.0)
    vae = TextVAE(
        20,
        3,
        encoder=partial(LSTMEncoder, embedding=6, hidden=8, start=0.5),
        decoder=partial(LSTMDecoder, embedding=6, hidden=8, dropout=0.0, start=0.5),
        free_bits=FreeBits(0.02),
        information=information,
        lagging=Lagging(inner=2, every=1),
        lr=1e-2,
    )
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_steps=8, val_check_interval=3,
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        num_sanity_val_steps=0, gradient_clip_val=1.0, precision="64-true",
    )  # fmt: skip
    trainer.fit(vae, datamodule=data)
    assert vae.lagging is not None
    return {
        "weights": {name: value.tolist() for name, value in vae.state_dict().items() if "metrics" not in name},
        "figures": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "lagging": vae.lagging.state_dict(),
    }


def test_two_processes_are_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # 72 texts to train on, nine whole batches; 23 to validate on, of which a distributed sampler repeats one.
    texts = [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (4,)).tolist()) for _ in range(95)]
    source = tmp_path / "t.csv"
    source.write_text("\n".join(["text", *texts]) + "\n", encoding="utf-8")
    alone, (first, second) = train(1, str(source)), run_processes(2, train, 2, str(source))
    assert first["weights"] == second["weights"]
    assert first["lagging"]["turns"] == second["lagging"]["turns"] == alone["lagging"]["turns"]
    for name, value in alone["weights"].items():
        torch.testing.assert_close(torch.tensor(first["weights"][name]), torch.tensor(value), rtol=0, atol=1e-6)
    for name in ("mi/estimate", "mi/n", "val/n", "val/words", "val/au"):
        assert first["figures"][name] == pytest.approx(alone["figures"][name], abs=1e-5), name
    assert alone["figures"]["val/n"] == 23

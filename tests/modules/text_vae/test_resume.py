"""An interrupted TextVAE goes on bit for bit: noise, dropout, turns, moving average, the critic's own steps, words."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from quiet import SAVING

from lightning_peft import ConcatCritic
from lightning_peft.modules import (
    FreeBits,
    Lagging,
    LatentInformation,
    LinearAnnealing,
    LSTMDecoder,
    LSTMEncoder,
    SentenceData,
    Sentences,
    TextVAE,
)

PARTS: dict[str, Any] = {
    "encoder": partial(LSTMEncoder, embedding=6, hidden=8, start=0.3),
    "decoder": partial(LSTMDecoder, embedding=6, hidden=8, dropout=0.3, start=0.3),
}


def parts() -> dict[str, Any]:
    """All that has a state, new."""
    information = LatentInformation(critic=partial(ConcatCritic, hidden=8), lr=1e-2, critic_steps=3)
    return {**PARTS, "information": information, "lagging": Lagging(inner=3, every=1)}


def make() -> TextVAE:
    torch.manual_seed(1)
    return TextVAE(12, 4, **parts(), kl_weight=LinearAnnealing(share=0.9), free_bits=FreeBits(0.05), lr=1e-2)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_it_goes_on_bit_for_bit(write: Any, rows: Any, tmp_path: Path) -> None:
    source = write("t.csv", rows)

    def run(ckpt_path: str | None = None, **settings: Any) -> tuple[TextVAE, Trainer]:
        data = SentenceData(source, cut=Sentences(fewest=2), vocabulary_size=12, batch_size=8, window=3)
        vae = make()
        if ckpt_path is not None:
            torch.manual_seed(99)  # nothing is to come from the global generator
        trainer = Trainer(max_epochs=3, val_check_interval=2, gradient_clip_val=1.0, **SAVING, **settings)
        trainer.fit(vae, datamodule=data, ckpt_path=ckpt_path)
        return vae, trainer

    checkpoints = ModelCheckpoint(tmp_path / "all", "stop-{step}", every_n_train_steps=1, save_top_k=-1)
    validated = ModelCheckpoint(tmp_path / "all", "validated-{step}", every_n_epochs=1, save_top_k=-1)
    full, trainer = run(callbacks=[checkpoints, validated])
    assert trainer.global_step == 18
    assert full.lagging is not None
    # Of a step with a validation, the file behind it: from one before it Lightning goes on without that validation.
    for step in ("stop-step=1", "stop-step=5", "validated-step=4", "stop-step=13"):
        resumed, other = run(str(tmp_path / "all" / f"{step}.ckpt"), enable_checkpointing=False)
        for (name, a), b in zip(full.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(a, b), (step, name)
        assert resumed.lagging is not None
        assert resumed.lagging.state_dict() == full.lagging.state_dict()
        assert {n: float(v) for n, v in other.callback_metrics.items()} == {
            n: float(v) for n, v in trainer.callback_metrics.items()
        }

    # The file holds tensors, numbers and strings, and with them the words.
    path = tmp_path / "all" / "stop-step=9.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["text_vae"]["words"][:5] == ["<pad>", "<s>", "</s>", "<unk>", "the"]
    alone = TextVAE.load_from_checkpoint(path, **parts())
    assert alone.model.vocabulary is not None
    assert alone.model.vocabulary.words == tuple(saved["text_vae"]["words"])
    assert all(isinstance(text, str) for text in alone.model.texts(alone.model.sample(2)))

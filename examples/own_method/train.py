"""A method of one's own in a whole run: pruned, monitored, interrupted, resumed to the bit, exported, read by PEFT.

Usage: python examples/own_method/train.py [--quick] [--out DIR]
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from method import SingularValues
from torch import Tensor

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    Budget,
    Cubic,
    RankBudget,
    RankMonitor,
    RankPolicy,
    RankPruning,
    Taylor,
    adapter_state_dict,
    to_hf_peft,
)
from lightning_peft.modules import TextClassifier, TextData

sys.path.append(str(Path(__file__).parents[1] / "reuters"))  # where the encoder and the texts are found
from inputs import minilm_folder, reuters
from job import balanced, quiet

RANK, FINAL, ENCODER = 32, 16, [r"encoder\.layer\..*"]


class PowerCut(Callback):
    """Ends a run after some steps, as a crash would, with a checkpoint from just before it."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        self.step, self.checkpoint = step, checkpoint

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.checkpoint)
            raise RuntimeError("the power is gone")


def run(
    encoder: str, data: TextData, steps: int, out: Path, stop: int = 0, resume: Path | None = None
) -> TextClassifier:
    """Train a new classifier; with `stop` it fails there and leaves a checkpoint, with `resume` it goes on from one."""
    seed_everything(0, verbose=False)
    classifier = TextClassifier(encoder, data.num_labels, lr=5e-2, head_lr=1e-2)
    callbacks = [
        AdapterInjection(partial(SingularValues, rank=RANK), targets=ENCODER),
        RankPruning(RankPolicy(Cubic(), Taylor(), Budget(rank=FINAL), interval=2)),
        RankMonitor(),
        AdapterCheckpoint(),
    ]
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, gradient_clip_val=1.0, log_every_n_steps=1,
        num_sanity_val_steps=0, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        logger=CSVLogger(out), callbacks=[*callbacks, *([PowerCut(stop, out / "half.ckpt")] if stop else [])],
    )  # fmt: skip
    trainer.fit(classifier, datamodule=data, ckpt_path=resume)
    return classifier.eval()


def read_by_peft(classifier: TextClassifier, encoder: str, folder: Path, batch: Any) -> float:
    """The largest difference between our outputs and those of a fresh encoder with the folder loaded by stock PEFT."""
    from peft import PeftModel

    base = TextClassifier(encoder, classifier.model.config.num_labels).eval()
    with torch.no_grad():
        ours: Tensor = classifier(batch).logits
        base.model = PeftModel.from_pretrained(base.model, str(folder))
        theirs: Tensor = base.eval()(batch).logits
    return (ours - theirs).abs().max().item()


def demo(encoder: str, data: TextData, steps: int, out: Path) -> bool:
    """The whole run; whether it came out as promised."""
    through = run(encoder, data, steps, out / "through")
    print(RankBudget.of(through).table())
    try:
        run(encoder, data, steps, out / "stopped", stop=steps // 2)
    except RuntimeError as error:
        print(f"\nstep {steps // 2}: {error}")
    resumed = run(encoder, data, steps, out / "resumed", resume=out / "stopped" / "half.ckpt")
    ours, theirs = adapter_state_dict(through), adapter_state_dict(resumed)
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    print(f"resumed from there: {'the same, bit for bit' if same else 'NOT the same'}, {len(ours)} tensors")

    export = to_hf_peft(resumed, out / "adapter", mode="compact", overwrite=True)
    data.setup("test")
    difference = read_by_peft(resumed, encoder, export.folder, next(iter(data.test_dataloader())))
    print(f"\n{export}\nread by PEFT: outputs differ by at most {difference:.1e}")
    tester = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, limit_test_batches=10)
    metrics = tester.test(resumed, data, verbose=False)[0]
    print(f"test accuracy on at most 10 batches: {metrics['test/accuracy']:.3f}")
    return same and difference < 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 steps on 320 texts instead of 100 on 1,600")
    parser.add_argument("--out", type=Path, default=Path("runs/own_method"), help="folder; default %(default)s")
    options = parser.parse_args()
    try:
        encoder, (texts, test) = minilm_folder(), reuters("r8")
    except ModuleNotFoundError as missing:
        print(missing, file=sys.stderr)
        return 2
    quiet()
    rows, steps = (320, 20) if options.quick else (1600, 100)
    texts = balanced(texts, options.out / "train.csv", rows, seed=0)
    data = TextData(texts, tokenizer=encoder, test=test, val_share=0.0, max_length=64, seed=0)
    return 0 if demo(encoder, data, steps, options.out) else 1


if __name__ == "__main__":
    sys.exit(main())

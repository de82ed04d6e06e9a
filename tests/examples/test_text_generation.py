"""The jobs of models that write, on the command line: two steps on tiny models, and what they predict."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from tiny_models import save_decoder, save_translator
from transformers import AutoTokenizer

from lightning_peft import cli

JOBS = Path(__file__).parents[2] / "examples" / "text_generation"
TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }} {{ turn.content }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)

# Lightning, on a checkpoint that another run wrote: which one was best is not known here.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


@pytest.mark.parametrize(
    ("job", "columns"),
    [
        ("causal_lm", ("question", "answer")),
        ("seq2seq", ("source", "target")),
    ],
)
def test_a_job_trains_and_predicts(job: str, columns: tuple[str, str], tmp_path: Path) -> None:
    with Path("texts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *[("the red car", "and the blue sky")] * 12])
    if job == "causal_lm":
        folder = save_decoder(tmp_path / "base")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
    else:
        folder = save_translator(tmp_path / "base")
    changed = {
        "model.backbone": folder, "data.tokenizer": folder, "data.train": "texts.csv", "data.predict": "texts.csv",
        "model.generation": "{max_new_tokens: 3}", "peft.final_rank": "2",
        "trainer.logger.init_args.save_dir": str(tmp_path), "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false", "trainer.log_every_n_steps": "1",
    }  # fmt: skip
    options = ["-c", str(JOBS / f"{job}.yaml"), *(part for name in changed for part in (f"--{name}", changed[name]))]
    assert cli.main(["fit", *options, "--trainer.max_epochs", "2", "--trainer.num_sanity_val_steps", "0"]) == 0
    (checkpoint,) = (tmp_path / job).glob("version_0/checkpoints/*.ckpt")
    ranks = torch.load(checkpoint, weights_only=True)["lightning_peft"]["ranks"]
    assert sum(ranks.values()) <= 2 * len(ranks)
    assert cli.main(["predict", *options, "--ckpt_path", str(checkpoint)]) == 0
    (predictions,) = (tmp_path / job).glob("version_1/predictions.pt")
    batches = torch.load(predictions, weights_only=True)
    assert sum(len(batch["texts"]) for batch in batches) == 12
    assert all(batch["tokens"].shape[1] <= 4 for batch in batches)

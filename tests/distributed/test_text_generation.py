"""Models that write, on two processes as on one: weights, losses, and metrics of what is written, sharded as well."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from quiet import QUIET
from tiny_models import WORDS, save_decoder, save_translator
from torch.distributed.fsdp import fully_shard

from lightning_peft import presets
from lightning_peft.modules import CausalLM, LanguageData, Seq2Seq, Seq2SeqData
from lightning_peft.testing.processes import run_processes

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")]

METRICS = ("exact_match", "bleu", "chrf", "rougeL")


class Sharded(Seq2Seq):
    def configure_model(self) -> None:
        if not getattr(self, "sharded", False):
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]
            self.sharded = True


def train(world: int, folder: str, source: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    data = Seq2SeqData(source, folder, val=source, batch_size=4 // world, seed=1)
    model = Seq2Seq(folder, lr=0.02, metrics=METRICS, generation={"max_new_tokens": 4})
    strategy = "ddp" if world > 1 else "auto"
    trainer = Trainer(
        devices=world, strategy=strategy, max_steps=6, val_check_interval=3, precision="64-true",
        callbacks=[*presets.lora(rank=2)], **QUIET,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    return {
        "weights": torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).tolist(),
        "figures": {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")},
    }


def judge(world: int, folder: str, source: str) -> dict[str, float]:
    torch.set_num_threads(1)
    data = Seq2SeqData(source, folder, val=source, batch_size=2)
    kind, strategy = (Sharded, ModelParallelStrategy(2, 1)) if world > 1 else (Seq2Seq, "auto")
    module = kind(folder, metrics=METRICS, generation={"max_new_tokens": 9})
    (found,) = Trainer(devices=world, strategy=strategy, **QUIET).validate(module, datamodule=data, verbose=False)  # type: ignore[arg-type]
    return dict(found)


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[str, str]:
    """A tiny BART, and sixteen pairs whose targets have equally many tokens: a mean of means is then the mean."""
    torch.manual_seed(0)
    rows = [
        [" ".join(WORDS[4 + i] for i in torch.randint(8, (n,)).tolist()) for n in (1 + k % 5, 3)] for k in range(16)
    ]
    source = tmp_path / "pairs.csv"
    source.write_text("source,target\n" + "\n".join(",".join(row) for row in rows) + "\n", encoding="utf-8")
    return save_translator(tmp_path / "bart", "bart"), str(source)


def test_two_processes_are_one(inputs: tuple[str, str]) -> None:
    alone, (first, second) = train(1, *inputs), run_processes(2, train, 2, *inputs)
    assert first == second
    torch.testing.assert_close(torch.tensor(first["weights"]), torch.tensor(alone["weights"]), rtol=0, atol=1e-6)
    assert alone["figures"].keys() == {"val/loss", *(f"val/{name}" for name in METRICS)}
    assert first["figures"] == pytest.approx(alone["figures"], abs=1e-6)
    assert alone["figures"]["val/chrf"] > 0


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
def test_a_sharded_model_writes_in_step(inputs: tuple[str, str]) -> None:
    alone, (first, second) = judge(1, *inputs), run_processes(2, judge, 2, *inputs)
    assert first == second == pytest.approx(alone, abs=1e-6)


def train_causal(world: int, folder: str, blocks: str, answers: str) -> dict[str, Any]:
    """Train on blocks, which all predict as many tokens, and judge answers, which do not."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    data = LanguageData(blocks, folder, packing="blocks", block_size=6, val_share=0.0, batch_size=4 // world, seed=1)
    judged = LanguageData(answers, folder, val=answers, test=answers, prompt="prompt", answer="answer", batch_size=2)
    model = CausalLM(folder, lr=0.02)
    strategy = "ddp" if world > 1 else "auto"
    trainer = Trainer(
        devices=world, strategy=strategy, max_steps=4, precision="64-true", callbacks=[*presets.lora(rank=2)], **QUIET
    )
    trainer.fit(model, datamodule=data)
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).tolist()
    figures = {}
    for stage in (trainer.validate, trainer.test):
        figures |= stage(model, datamodule=judged, verbose=False)[0]
    return {"weights": weights, "figures": figures}


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
def test_a_causal_model_on_two_processes_is_one_however_many_tokens_a_row_predicts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks, answers = tmp_path / "blocks.txt", tmp_path / "answers.csv"
    blocks.write_text("\n".join(" ".join(WORDS[4 + i] for i in torch.randint(8, (7,)).tolist()) for _ in range(24)))
    rows = [("the red", "car"), ("and the blue", "sky and sky"), ("the green", "tree and the"), ("the red", "sky the")]
    answers.write_text("prompt,answer\n" + "\n".join(",".join(row) for row in rows) + "\n")
    inputs = (save_decoder(tmp_path / "decoder"), str(blocks), str(answers))
    alone, (first, second) = train_causal(1, *inputs), run_processes(2, train_causal, 2, *inputs)
    assert first == second
    torch.testing.assert_close(torch.tensor(first["weights"]), torch.tensor(alone["weights"]), rtol=0, atol=1e-6)
    assert alone["figures"].keys() == {
        f"{stage}/{name}" for stage in ("val", "test") for name in ("loss", "perplexity")
    }
    assert first["figures"] == pytest.approx(alone["figures"], rel=1e-6)
    figures = alone["figures"]
    assert figures["test/loss"] == figures["val/loss"] == pytest.approx(math.log(figures["val/perplexity"]), abs=1e-6)

"""Prompt tuning in a LightningModule: put in, trained, saved, resumed, planned, taken out."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from prompted import TOKENS, build
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    RankBudget,
    RankMonitor,
    SoftPrompt,
    compact,
    eject,
    inject,
    load,
    merge,
    plan,
)
from lightning_peft.checkpoint import AdapterFileError

M = 4


class Classifier(L.LightningModule):
    """What a user writes: it knows nothing of prompts."""

    def __init__(self, kind: str = "bert") -> None:
        super().__init__()
        self.model = build(kind).train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss.detach())
        return loss

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, TOKENS, (24, 6), generator=generator)
        rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in ids]
        return DataLoader(rows, batch_size=4, shuffle=True)  # type: ignore[arg-type]  # a list is a data set

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class SaveAt(L.Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(module: L.LightningModule, *extra: L.Callback, ckpt_path: Path | None = None, **options: Any) -> L.Trainer:
    torch.manual_seed(5)
    injection = AdapterInjection(partial(SoftPrompt, length=M), **options)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[injection, RankMonitor(), AdapterCheckpoint(), *extra],
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def logits(module: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = module.eval().model(input_ids=torch.arange(3, 15).view(2, 6)).logits
    return found


def test_it_is_put_in_trained_saved_and_taken_out(tmp_path: Path) -> None:
    module, plain = Classifier(), Classifier()
    fit(module, SaveAt(tmp_path / "a.ckpt", 12), verbose=False)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    assert names == ["model.P", "model.base.classifier.weight", "model.base.classifier.bias"]
    assert RankBudget.of(module).ranks() == {"model": M}
    before = plain.state_dict()
    for name, value in module.state_dict().items():
        place = name.replace("model.base.", "model.")
        if "classifier" not in name and place in before:
            assert torch.equal(value, before[place]), name
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {"model.P", "model.gate.mask", "model.base.classifier.weight"} <= state.keys()
    assert not any("encoder" in name for name in state)
    loaded = load(Classifier(), tmp_path / "a.ckpt")
    assert torch.equal(logits(loaded), logits(module))
    head = module.model.classifier.state_dict()
    eject(module)
    plain.model.classifier.load_state_dict(head)
    assert list(module.state_dict()) == list(plain.state_dict())
    assert all(p.requires_grad for p in module.parameters())
    assert torch.equal(logits(module), logits(plain))
    assert not torch.allclose(logits(loaded), logits(plain), atol=1e-3)


def test_interrupted_is_uninterrupted(tmp_path: Path) -> None:
    whole = Classifier()
    ended = fit(whole, SaveAt(tmp_path / "a.ckpt", 4), verbose=False)
    rest = Classifier()
    resumed = fit(rest, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert ended.global_step == resumed.global_step == 12
    assert all(torch.equal(value, rest.state_dict()[name]) for name, value in whole.state_dict().items())
    moments = [trainer.optimizers[0].state_dict()["state"] for trainer in (ended, resumed)]
    assert all(torch.equal(moments[0][i][key], moments[1][i][key]) for i in moments[0] for key in moments[0][i])


def test_another_base_is_refused(tmp_path: Path) -> None:
    fit(Classifier(), SaveAt(tmp_path / "a.ckpt", 1), verbose=False)
    other = Classifier()
    nn.init.zeros_(other.model.get_input_embeddings().weight)
    wanted = {name: p.requires_grad for name, p in other.named_parameters()}
    with pytest.raises(AdapterFileError, match="another base model"):
        load(other, tmp_path / "a.ckpt")
    # Nothing half done: no adapter, nothing frozen.
    assert {name: p.requires_grad for name, p in other.named_parameters()} == wanted
    with pytest.raises(AdapterFileError, match="does not have"):
        load(nn.Sequential(nn.Linear(3, 3)), tmp_path / "a.ckpt")


def test_it_is_planned() -> None:
    with torch.device("meta"):
        module = Classifier()
    inject(module, partial(SoftPrompt, length=M), train=[])
    figures = plan(module, world_size=2)
    assert figures.start.components == M
    assert figures.start.adapter_parameters == figures.start.weights // 4 == M * 16
    assert figures.base_parameters == sum(p.numel() for p in Classifier().parameters())


def test_there_is_nothing_to_merge_or_cut() -> None:
    module = Classifier()
    report = inject(module, partial(SoftPrompt, length=M))
    assert report.adapted == ("model",)
    assert report.parameters == M * 16
    with pytest.raises(TypeError, match="merge cannot write"):
        merge(module)
    RankBudget.of(module).keep({"model": torch.tensor([1, 0, 1, 1])})
    with pytest.raises(TypeError, match="cannot be compacted"):
        compact(module)


def test_a_closed_token_is_a_zero_vector() -> None:
    adapter = SoftPrompt(build("llama"), 3)
    adapter.gate.keep(torch.tensor([1, 0, 1]))
    assert torch.equal(adapter.prompt()[1], torch.zeros(16))
    assert torch.equal(adapter.prompt()[[0, 2]], adapter.P[[0, 2]])


def test_three_ways_to_start() -> None:
    weight = build("llama").get_input_embeddings().weight
    torch.manual_seed(3)
    drawn = SoftPrompt(build("llama"), 30)
    rows = [int((weight == row).all(1).nonzero()) for row in drawn.P]
    assert len(set(rows)) == 30  # different tokens
    assert SoftPrompt(build("llama"), TOKENS + 3).P.shape == (TOKENS + 3, 16)
    text = SoftPrompt(build("llama"), 5, "text", text_ids=[7, 9])
    assert torch.equal(text.P, weight[[7, 9, 7, 9, 7]])
    random = SoftPrompt(build("llama"), 31, "random")
    assert random.P.std().item() == pytest.approx(weight.square().mean().sqrt().item(), rel=0.15)


class Pair(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = build("bert"), build("bert backbone")
        self.head = nn.Linear(16, 3)


def test_which_model_is_said_where_there_are_several() -> None:
    with pytest.raises(ValueError, match=r"2 transformers models, 'student', 'teacher': say which"):
        inject(Pair(), SoftPrompt)
    module = Pair()
    assert inject(module, SoftPrompt, targets=["student"]).adapted == ("student",)
    assert isinstance(module.student, SoftPrompt)
    both = inject(Pair(), SoftPrompt, targets=[".*"])
    assert both.adapted == ("student", "teacher")


def test_a_head_beside_the_model_stays_trainable() -> None:
    module = nn.ModuleDict({"encoder": build("bert backbone"), "head": nn.Linear(16, 3)})
    report = inject(module, SoftPrompt)
    assert report.adapted == ("encoder",)
    assert report.trained == ("head.bias", "head.weight")


def test_copies_are_their_own(tmp_path: Path) -> None:
    adapter = SoftPrompt(build("llama"), M)
    twin = copy.deepcopy(adapter)
    with torch.no_grad():
        twin.P.zero_()
    assert bool(adapter.P.any())
    ids = torch.arange(3, 9)[None]
    assert not torch.allclose(twin(input_ids=ids).logits, adapter(input_ids=ids).logits)


def test_compiled_it_gives_the_same_again_and_again() -> None:
    """Hooks come and go with each call, and a graph would keep the first call's."""
    adapter = SoftPrompt(build("bert"), M).eval()
    compiled = torch.compile(adapter, backend="eager")
    for first in (3, 9):
        ids = torch.arange(first, first + 6)[None]
        assert torch.equal(compiled(input_ids=ids).logits, adapter(input_ids=ids).logits)

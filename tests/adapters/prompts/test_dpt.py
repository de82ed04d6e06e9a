from __future__ import annotations

import csv
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from prompted import batch, build, plain, prompted
from quiet import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import (
    DPT,
    Budget,
    DePT,
    RankBudget,
    RankPolicy,
    SoftPrompt,
    Taylor,
    compact,
    inject,
    presets,
)
from lightning_peft.adapters.prompts.dpt import RectifiedGate
from lightning_peft.adapters.prompts.starts import token_rows
from lightning_peft.functional.prompts import half_width
from lightning_peft.rank import Cubic


def test_property_rank_and_count() -> None:
    for form, more in (("product", 0), ("relu", 3)):
        _, prompt = prompted("bert", partial(DPT, length=9, rank=3, form=form))
        assert torch.linalg.matrix_rank(prompt.prompt().detach()) == 3
        assert sum(p.numel() for _, p in prompt.own_parameters()) == 3 * (9 + 16) + more


@pytest.mark.parametrize("form", ["product", "relu"])
def test_property_gradients_reach_the_factors_and_not_the_base(form: str) -> None:
    host, prompt = prompted("t5", partial(DPT, length=5, rank=2, form=form))
    host(**batch("t5")).logits.square().mean().backward()
    assert all(bool(p.grad.abs().sum() > 0) for _, p in prompt.own_parameters())
    assert all(p.grad is None for p in prompt.base.parameters())


def test_property_with_as_many_components_as_tokens_it_is_a_plain_prompt() -> None:
    host, prompt = prompted("llama", partial(DPT, length=4, rank=4))
    other, vanilla = prompted("llama", partial(SoftPrompt, length=4))
    with torch.no_grad():
        prompt.A.copy_(torch.eye(4))
        prompt.B.copy_(vanilla.P)
    torch.testing.assert_close(host(**batch("llama")).logits, other(**batch("llama")).logits)


def test_property_it_starts_with_the_deviation_of_the_embeddings() -> None:
    """The deviation itself is tested with the rule: what is tested here is that this rule is taken."""
    _, prompt = prompted("llama", partial(DPT, length=30, rank=4), start=True)
    table = plain("llama").model.get_input_embeddings().weight  # type: ignore[operator]
    a = half_width(table.detach().square().mean().sqrt().item(), 4)
    for factor in (prompt.A, prompt.B):
        assert 0.9 * a < factor.abs().max() <= a


def test_an_encoder_with_a_decoder_starts_as_in_the_authors_code() -> None:
    _, prompt = prompted("t5", partial(DPT, length=30, rank=4), start=True)
    assert 0.45 < prompt.A.abs().max() <= 0.5
    _, prompt = prompted("t5", partial(DPT, length=30, rank=4, half_width=0.01), start=True)
    assert 0.009 < prompt.A.abs().max() <= 0.01


@pytest.mark.parametrize("form", ["product", "relu"])
def test_svd_start_is_the_text(form: str) -> None:
    """A text of two tokens, repeated, is of rank two: two components are all of it, a third adds nothing."""
    make: Any = partial(DPT, length=7, rank=3, init="svd", text_ids=[5, 9], form=form)
    _, prompt = prompted("bert", make, start=True)
    torch.testing.assert_close(prompt.prompt(), token_rows(prompt.base, 7, [5, 9]))
    gain = prompt.gate.gain
    assert prompt.form == "product" or gain[2] < 1e-5 < gain[1] < gain[0]


def test_svd_start_without_a_text_is_of_drawn_tokens() -> None:
    _, one = prompted("bert", partial(DPT, length=16, rank=16, init="svd"), start=True)
    table = plain("bert").model.get_input_embeddings().weight  # type: ignore[operator]
    nearest = (one.prompt()[:, None] - table).norm(dim=2).min(1)
    assert nearest.values.max() < 1e-5
    assert len(set(nearest.indices.tolist())) == 16


def test_a_gain_below_zero_has_closed_its_component() -> None:
    host, prompt = prompted("gpt2", partial(DPT, length=5, rank=3, form="relu"))
    with torch.no_grad():
        prompt.gate.gain.copy_(torch.tensor([1.0, -0.5, 2.0]))
    assert RankBudget.of(host).ranks() == {"model": 2}
    wanted = prompt.A[:, [0, 2]] @ torch.diag(torch.tensor([1.0, 2.0])) @ prompt.B[[0, 2]]
    torch.testing.assert_close(prompt.prompt(), wanted)
    before = host(**batch("gpt2")).logits
    assert compact(host) == {"model": 2}
    torch.testing.assert_close(host(**batch("gpt2")).logits, before)


def test_a_rectified_gate_has_no_soft_removal() -> None:
    gate = RectifiedGate(2, cost=3, gain=torch.ones(2))
    assert not gate.removes_softly
    with pytest.raises(ValueError, match="one whose gain is 0 never does"):
        gate.keep(torch.tensor([1, 0]), soft=True)
    gate.keep(torch.tensor([1, 0]))
    assert gate.open().tolist() == [True, False]
    assert gate.gain.tolist() == [1.0, 1.0]


def test_the_last_component_stays_when_all_are_closed() -> None:
    """A prompt of zeros is still a prompt: its columns are attended to."""
    host, prompt = prompted("bert", partial(DPT, length=5, rank=3))
    prompt.gate.keep(torch.zeros(3))
    before = host(**batch("bert")).logits
    assert not torch.allclose(before, plain("bert")(**batch("bert")).logits)
    compact(host)
    torch.testing.assert_close(host(**batch("bert")).logits, before)
    assert len(host.model.gate) == 1  # type: ignore[arg-type, union-attr]


def test_a_policy_prunes_it() -> None:
    """Three of six components are worth nothing: they are closed."""
    host, prompt = prompted("llama", partial(DPT, length=8, rank=6))
    with torch.no_grad():
        prompt.A[:, [1, 2, 5]] *= 1e-4
    policy = RankPolicy(Cubic(0.0, 0.0), Taylor(beta=0.0), Budget(rank=3), interval=1)
    policy.track(RankBudget.of(host))
    host(**batch("llama")).logits.square().mean().backward()
    policy.importance.update()
    policy.apply(policy.decide(1, 1), 1, 1)
    assert prompt.gate.open().tolist() == [True, False, False, True, True, False]
    assert RankBudget.of(host).spent_parameters == 3 * (8 + 16)


def test_within_so_many_parameters() -> None:
    _, prompt = prompted("llama", partial(DPT.within, parameters=100, length=8, form="relu"))
    assert (prompt.rank, prompt.length, prompt.form) == (4, 8, "relu")
    with pytest.raises(ValueError, match="less than one component costs"):
        prompted("llama", partial(DPT.within, parameters=23, length=8))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 9}, "rank=9 is not possible for a prompt of 8 tokens of width 16: give a rank from 1 to 8."),
    "init": ({"init": "random"}, "init must be 'uniform' or 'svd'. Got 'random'."),
    "form": ({"form": "diagonal"}, "form must be 'product' or 'relu'. Got 'diagonal'."),
    "width": ({"half_width": 0.0}, "half_width is how far from zero factors start, above 0. Got 0.0."),
    "width and svd": ({"init": "svd", "half_width": 0.5}, "half_width=0.5 is of init='uniform', and init is 'svd'."),
    "text": ({"text_ids": [3]}, "text_ids are what init='svd' starts from, and init is 'uniform'."),
    "no text": ({"init": "svd", "text_ids": []}, "text_ids are the token ids of a text to start with, at least one."),
    "token": ({"init": "svd", "text_ids": [40]}, "text_ids has 40, and the model's vocabulary 40 tokens."),
}


@pytest.mark.parametrize(("arguments", "sentence"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        inject(plain("bert"), partial(DPT, **{"length": 8, "rank": 2, **arguments}))


def test_a_rank_is_an_integer() -> None:
    with pytest.raises(TypeError, match="rank must be an integer"):
        inject(plain("bert"), partial(DPT, length=8, rank=2.0))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a prompt goes in front of what a transformers model reads"):
        DPT(nn.Linear(4, 4))


class Topics(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = build("bert").train()

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids[:, 0] % 3).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.2)


class Seen(Callback):
    """What is open after every step."""

    def __init__(self) -> None:
        self.open: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.open.append(RankBudget.of(pl_module).spent)


def test_the_monitor_shows_gains_that_fall_to_zero_while_they_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    seen, logger = Seen(), CSVLogger(tmp_path)
    ids: Any = torch.randint(3, 40, (48, 6), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {**QUIET, "logger": logger, "log_every_n_steps": 4, "max_epochs": 4}
    module = Topics()
    Trainer(callbacks=[*presets.dpt(length=8, rank=6, form="relu"), seen], **options).fit(
        module,
        DataLoader(ids, batch_size=4),
    )
    with (Path(logger.log_dir) / "metrics.csv").open(encoding="utf-8") as file:
        shown = {int(row["step"]): int(float(row["rank/open"])) for row in csv.DictReader(file) if row["rank/open"]}
    assert {step: shown[step] for step in range(4, 49, 4)} == {step: seen.open[step - 1] for step in range(4, 49, 4)}
    assert len(set(seen.open)) > 2


@pytest.mark.parametrize(("kind", "wide"), [("t5", True), ("bart", False), ("llama", False)])
def test_the_authors_start_is_for_models_that_know_distances_alone(kind: str, wide: bool) -> None:
    assert (DPT(build(kind), 8, 2)._half_width() == 0.5) == wide
    assert (DePT(build(kind), length=2, rank=2, reach=8).rates() != {}) == wide

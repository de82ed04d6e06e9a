"""Prompts in the ready language models: rates, precision, perplexity, and what is written behind a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from quiet import QUIET
from tiny_models import save_decoder, save_texts, save_translator
from torch import Tensor

from lightning_peft import Adapter, presets
from lightning_peft.modules import CausalLM, LanguageData, Seq2Seq, Seq2SeqData

OFFSETS: dict[str, Any] = {"length": 4, "rank": 2, "reach": 12}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def translators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {kind: save_translator(tmp_path_factory.mktemp(kind), kind) for kind in ("t5", "bart")}


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [("the red", "car"), ("and the blue and green", "sky and sky"), ("red", "tree")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"source": a, "target": b}) + "\n" for a, b in rows))
    return str(tmp_path / "pairs.jsonl")


def jobs(kind: str, decoder: str, translators: dict[str, str], pairs: str, lr: float = 0.03) -> tuple[Any, Any]:
    """A module and its data."""
    if kind == "causal":
        data = LanguageData(pairs, decoder, val=pairs, prompt="source", answer="target", batch_size=3)
        return CausalLM(decoder, lr=lr, warmup=0.0), data
    folder = translators[kind]
    written = {"max_new_tokens": 4, "num_beams": 2}
    model = Seq2Seq(folder, lr=lr, warmup=0.0, metrics=["exact_match", "chrf"], generation=written)
    return model, Seq2SeqData(pairs, folder, val=pairs, batch_size=3)


def moved(module: LightningModule) -> Any:
    """The prompt of a module, moved off its start."""
    (prompt,) = (child for child in module.modules() if isinstance(child, Adapter))
    with torch.no_grad():
        for number, (_, parameter) in enumerate(prompt.own_parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return prompt


def put_in(module: LightningModule, data: Any, *callbacks: Any, **options: Any) -> Trainer:
    """Have the callbacks' prompt in a module and move it."""
    trainer = Trainer(max_steps=1, limit_val_batches=0, callbacks=[*callbacks], **QUIET, **options)
    trainer.fit(module, datamodule=data)
    moved(module)
    return trainer


@pytest.mark.parametrize("kind", ["causal", "t5"])
def test_property_two_rates_are_there_and_scheduled(
    kind: str, decoder: str, translators: dict[str, str], pairs: str
) -> None:
    """The offsets' rate follows the prompt's down the schedule; 1/600 of it by itself on an encoder with a decoder."""
    model, data = jobs(kind, decoder, translators, pairs)
    seen: list[tuple[float, ...]] = []

    ratio = 0.25 if kind == "causal" else 5e-4 / 0.3
    chosen = presets.dept(**OFFSETS, rate=0.25 if kind == "causal" else None)
    trainer = Trainer(max_steps=3, limit_val_batches=0, callbacks=[*chosen], **QUIET)
    model.on_train_batch_start = lambda *_: seen.append(  # type: ignore[method-assign]
        tuple(group["lr"] for group in trainer.optimizers[0].param_groups)
    )
    trainer.fit(model, datamodule=data)
    (prompt,) = (child for child in model.modules() if isinstance(child, Adapter))
    groups = [{id(p) for p in group["params"]} for group in trainer.optimizers[0].param_groups]
    own = dict(prompt.own_parameters())
    assert groups == [{id(own["P"])}, {id(own["A"]), id(own["B"])}]
    assert seen == [(pytest.approx(0.03 * left), pytest.approx(0.03 * left * ratio)) for left in (1, 2 / 3, 1 / 3)]


@pytest.mark.parametrize("packing", ["blocks", "none"])
def test_perplexity_is_of_the_tokens_that_it_is_of_without_a_prompt(packing: Any, decoder: str, tmp_path: Path) -> None:
    """A trained prompt predicts a row's first token, and nothing does without one: it is left out for both."""
    source = save_texts(tmp_path / "t.csv")
    data = LanguageData(source, decoder, val=source, test=source, packing=packing, block_size=8, batch_size=7)
    model = CausalLM(decoder)
    trainer = put_in(model, data, *presets.prompt_tuning(length=4))
    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    losses = []
    for batch in data.test_dataloader():
        with torch.no_grad():
            logits = model.eval()(batch).logits[:, :-1].transpose(1, 2)
        labels = batch["labels"][:, 1:]
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none")[labels != -100])
    mean = torch.cat(losses).mean()
    assert metrics["test/loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert metrics["test/perplexity"] == pytest.approx(mean.exp().item(), rel=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", ["prompt_tuning", "dept"])
def test_it_writes_behind_padding_as_if_alone(method: str, beams: int, decoder: str, pairs: str) -> None:
    """`predict_step` pads on the left: each row goes on as by itself, its padding and the prompt not in what is new."""
    chosen = presets.prompt_tuning(length=4) if method == "prompt_tuning" else presets.dept(**OFFSETS)
    written: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams}
    model = CausalLM(decoder, generation=written)
    data = LanguageData(pairs, decoder, predict=pairs, prompt="source", answer="target", val_share=0.0, batch_size=3)
    trainer = put_in(model, data, *chosen)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert bool((batch["attention_mask"][:, 0] == 0).any())
    (found,) = trainer.predict(model, datamodule=data)  # type: ignore[misc]
    assert found["tokens"].shape == (3, 5)
    for ids, mask, tokens in zip(batch["input_ids"], batch["attention_mask"], found["tokens"], strict=True):
        alone: Tensor = model.model.generate(ids[mask.bool()][None], do_sample=False, pad_token_id=0, **written)
        assert torch.equal(tokens, alone[0, int(mask.sum()) :])


PRECISIONS: dict[str, Any] = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    # Lightning has no string for it on a CPU.
    "16-mixed": {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))]},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["causal", "t5", "bart"])
def test_it_trains_evaluates_and_writes_in_half_precision(
    kind: str, precision: str, decoder: str, translators: dict[str, str], pairs: str
) -> None:
    model, data = jobs(kind, decoder, translators, pairs)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {**QUIET, **PRECISIONS[precision]}
    trainer = Trainer(max_steps=4, val_check_interval=1, callbacks=[*presets.dept(**OFFSETS, rate=1.0)], **options)
    trainer.fit(model, datamodule=data)
    assert all(bool(value.isfinite()) for value in trainer.callback_metrics.values())
    (prompt,) = (child for child in model.modules() if isinstance(child, Adapter))
    assert bool(prompt.B.detach().ne(0).any())
    assert precision == "bf16-true" or {p.dtype for _, p in prompt.own_parameters()} == {torch.float32}
    after = {name.replace(".base.", "."): p for name, p in model.named_parameters()}
    assert all(torch.equal(after[name], p.to(after[name].dtype)) for name, p in before.items())

"""The ready classifier: what it trains, how fast, and what it reports."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from quiet import QUIET
from torch import Tensor

from lightning_peft.modules import TextClassifier, TextData
from lightning_peft.modules.text_classifier import TextBatch


@pytest.fixture
def data(write: Any, tiny_bert: str, rows: Any) -> TextData:
    source = write("t.tsv", rows)
    return TextData(source, tokenizer=tiny_bert, val=source, test=source, batch_size=8)


def batch(labels: list[int] | None = None) -> TextBatch:
    made: TextBatch = {
        "input_ids": torch.tensor([[2, 4, 9, 3], [2, 5, 3, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    if labels is not None:
        made["labels"] = torch.tensor(labels)
    return made


def head_only(classifier: TextClassifier) -> TextClassifier:
    classifier.model.base_model.requires_grad_(False)
    return classifier


class Rates(Callback):
    """Notes the learning rates every step is taken with."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups])


# --- what is trained -------------------------------------------------------------------------------------------------


def names(classifier: TextClassifier) -> dict[str, set[str]]:
    known = {id(p): name for name, p in classifier.model.named_parameters()}
    return {group["name"]: {known[id(p)] for p in group["params"]} for group in classifier.parameter_groups()}


def test_head_and_the_rest_are_two_groups(tiny_bert: str) -> None:
    classifier = head_only(TextClassifier(tiny_bert, 3, lr=0.1, head_lr=0.2))
    assert names(classifier) == {"head": {"classifier.weight", "classifier.bias"}}
    adapted = classifier.model.bert.encoder.layer[0].attention.self.query.bias
    adapted.requires_grad_(True)
    assert names(classifier) == {
        "adapters": {"bert.encoder.layer.0.attention.self.query.bias"},
        "head": {"classifier.weight", "classifier.bias"},
    }
    assert [group["lr"] for group in classifier.parameter_groups()] == [0.1, 0.2]


def test_groups_of_a_model_that_peft_has_wrapped(tiny_bert: str) -> None:
    peft = pytest.importorskip("peft", reason="the optional package 'peft' is not installed")
    classifier = TextClassifier(tiny_bert, 3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    classifier.model = peft.get_peft_model(classifier.model, config)
    groups = names(classifier)
    assert {name.split(".")[-3] for name in groups["adapters"]} == {"lora_A", "lora_B"}
    assert len(groups["adapters"]) == 4
    assert {name.split(".classifier.")[1] for name in groups["head"]} == {
        "modules_to_save.default.weight",
        "modules_to_save.default.bias",
    }


def test_only_what_requires_grad_moves(tiny_bert: str, data: TextData) -> None:
    classifier = head_only(TextClassifier(tiny_bert, 3))
    before = {name: p.detach().clone() for name, p in classifier.named_parameters()}
    Trainer(max_steps=3, **QUIET).fit(classifier, datamodule=data)
    moved = {name for name, p in classifier.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"model.classifier.weight", "model.classifier.bias"}


def test_it_learns(write: Any, tiny_bert: str, rows: Any) -> None:
    source = write("t.tsv", rows)
    data = TextData(source, tokenizer=tiny_bert, test=source, batch_size=16, val_share=0.0)
    classifier = TextClassifier(tiny_bert, 3, lr=2e-3, head_lr=2e-3)
    trainer = Trainer(max_steps=150, **QUIET)
    trainer.fit(classifier, datamodule=data)
    (metrics,) = trainer.test(classifier, datamodule=data, verbose=False)
    assert metrics["test/accuracy"] == metrics["test/macro_f1"] == 1.0


def test_calibration_is_reported(tiny_bert: str, data: TextData) -> None:
    classifier = TextClassifier(tiny_bert, 3, calibration_bins=5)
    trainer = Trainer(**QUIET)
    (metrics,) = trainer.test(classifier, datamodule=data, verbose=False)
    batches = trainer.predict(classifier, data.test_dataloader())
    assert batches is not None
    found = torch.cat([each["probabilities"] for each in batches]).double()  # type: ignore[index]
    labels = torch.cat([each["labels"] for each in data.test_dataloader()])
    assert metrics["test/nll"] == pytest.approx(float(-found.gather(1, labels[:, None]).log().mean()), abs=1e-6)
    assert metrics["test/nll"] == pytest.approx(metrics["test/loss"], abs=1e-5)
    confidence, guess = found.max(1)
    gap = 0.0
    for low in range(5):  # |accuracy - confidence| in each fifth of [0, 1]
        here = (confidence > low / 5) & (confidence <= (low + 1) / 5)
        gap += abs(float((guess == labels)[here].double().sum() - confidence[here].sum())) / len(labels)
    assert metrics["test/ece"] == pytest.approx(gap, abs=1e-6)
    (validated,) = trainer.validate(classifier, datamodule=data, verbose=False)
    assert validated["val/ece"] == metrics["test/ece"]  # of the same rows


def test_calibration_is_reported_where_it_is_asked_for(tiny_bert: str, data: TextData) -> None:
    (metrics,) = Trainer(**QUIET).test(TextClassifier(tiny_bert, 3), datamodule=data, verbose=False)
    assert set(metrics) == {"test/loss", "test/accuracy", "test/macro_f1"}
    with pytest.raises(ValueError, match="calibration_bins=-1: it is a number of bins"):
        TextClassifier(tiny_bert, 3, calibration_bins=-1)


def test_dropout_is_on_in_training_and_off_in_evaluation(tiny_bert: str, data: TextData) -> None:
    """A model that transformers loads is in eval mode, and Lightning would leave it there."""

    class Modes(Callback):
        train: bool
        test: bool

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            self.train = all(m.training for m in pl_module.modules())

        def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            self.test = any(m.training for m in pl_module.modules())

    modes = Modes()
    classifier = TextClassifier(tiny_bert, 3)
    trainer = Trainer(max_steps=1, callbacks=[modes], **QUIET)
    trainer.fit(classifier, datamodule=data)
    trainer.test(classifier, datamodule=data, verbose=False)
    assert (modes.train, modes.test) == (True, False)


# --- optimizer -------------------------------------------------------------------------------------------------------


def test_rates_rise_then_fall_to_zero(tiny_bert: str, data: TextData) -> None:
    rates = Rates()
    classifier = TextClassifier(tiny_bert, 3, lr=1.0e-3, head_lr=5.0e-3, warmup=0.25)
    Trainer(max_epochs=2, callbacks=[rates], **QUIET).fit(classifier, datamodule=data)  # 6 batches an epoch
    shares = [1 / 4, 2 / 4, 3 / 4] + [(12 - step) / 9 for step in range(3, 12)]
    assert rates.seen == [pytest.approx([1e-3 * share, 5e-3 * share]) for share in shares]


def test_steps_are_optimizer_steps(tiny_bert: str, data: TextData) -> None:
    rates = Rates()
    classifier = TextClassifier(tiny_bert, 3, lr=1.0, warmup=0.0)
    Trainer(max_epochs=2, accumulate_grad_batches=3, callbacks=[rates], **QUIET).fit(classifier, datamodule=data)
    assert [pair[0] for pair in rates.seen] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_optimizer_is_fused_adamw_on_the_processor(tiny_bert: str, data: TextData) -> None:
    trainer = Trainer(max_steps=1, **QUIET)
    trainer.fit(TextClassifier(tiny_bert, 3, weight_decay=0.07), datamodule=data)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(group["fused"], group["weight_decay"]) for group in optimizer.param_groups] == [(True, 0.07)] * 2


@pytest.mark.parametrize(
    "precision",
    [
        {},
        {"precision": "bf16-mixed"},
        # Lightning has no string for it on a CPU.
        {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))]},
    ],
    ids=["32-true", "bf16-mixed", "16-mixed"],
)
def test_clipping_works_with_it(precision: dict[str, Any], tiny_bert: str, data: TextData) -> None:
    class Norms(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if grads:
                self.seen.append(math.sqrt(sum(float(grad.square().sum()) for grad in grads)))

    norms = Norms()
    trainer = Trainer(max_steps=4, gradient_clip_val=1e-2, callbacks=[norms], **QUIET, **precision)
    trainer.fit(TextClassifier(tiny_bert, 3), datamodule=data)
    assert len(norms.seen) == 3
    assert all(group["fused"] for group in trainer.optimizers[0].param_groups)
    assert norms.seen == pytest.approx([1e-2] * 3, rel=1e-3)


def test_nothing_to_train(tiny_bert: str, data: TextData) -> None:
    classifier = TextClassifier(tiny_bert, 3).requires_grad_(False)
    sentence = r"no trainable parameter: every parameter has requires_grad=False\. Add an AdapterInjection callback"
    with pytest.raises(MisconfigurationException, match=sentence):
        Trainer(max_steps=1, **QUIET).fit(classifier, datamodule=data)


def test_training_without_an_end(tiny_bert: str, data: TextData) -> None:
    with pytest.raises(MisconfigurationException, match=r"needs the number of optimizer steps .* set Trainer\(max_ep"):
        Trainer(max_epochs=-1, **QUIET).fit(TextClassifier(tiny_bert, 3), datamodule=data)


# --- figures ---------------------------------------------------------------------------------------------------------


def macro_f1(predicted: Tensor, true: Tensor, classes: int) -> float:
    scores = []
    for c in range(classes):
        hit = int(((predicted == c) & (true == c)).sum())
        wrong = int(((predicted == c) ^ (true == c)).sum())
        scores.append(2 * hit / (2 * hit + wrong))
    return sum(scores) / classes


@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_are_those_of_all_rows(stage: str, tiny_bert: str, data: TextData) -> None:
    classifier = TextClassifier(tiny_bert, 3)
    trainer = Trainer(max_steps=4, **QUIET)
    trainer.fit(classifier, datamodule=data)
    evaluate = trainer.validate if stage == "val" else trainer.test
    (metrics,) = evaluate(classifier, datamodule=data, verbose=False)
    data.setup("predict")
    with torch.no_grad():
        logits = torch.cat([p["logits"] for p in trainer.predict(classifier, datamodule=data)])
        labels = torch.cat([b["labels"] for b in data.predict_dataloader()])
    predicted = logits.argmax(-1)
    assert 0 < int((predicted == labels).sum()) < len(labels)
    assert metrics == pytest.approx(
        {
            f"{stage}/loss": float(torch.nn.functional.cross_entropy(logits, labels)),
            f"{stage}/accuracy": float((predicted == labels).float().mean()),
            f"{stage}/macro_f1": macro_f1(predicted, labels, 3),
        },
        rel=1e-5,
    )


def test_training_step_gives_loss_and_logits(tiny_bert: str, data: TextData) -> None:
    trainer = Trainer(max_steps=2, **QUIET)
    classifier = TextClassifier(tiny_bert, 3)
    trainer.fit(classifier, datamodule=data)
    outputs = classifier(batch([0, 2]))
    assert torch.allclose(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, torch.tensor([0, 2])))
    assert math.isfinite(float(trainer.logged_metrics["train/loss"]))


@pytest.mark.parametrize("labels", [None, [0, 2]])
def test_prediction(labels: list[int] | None, tiny_bert: str) -> None:
    classifier = TextClassifier(tiny_bert, 3).eval()
    with torch.no_grad():
        prediction = classifier.predict_step(batch(labels), 0)
    assert prediction["logits"].shape == (2, 3)
    assert torch.equal(prediction["probabilities"], prediction["logits"].softmax(-1))


def test_padding_changes_nothing(tiny_bert: str) -> None:
    classifier = TextClassifier(tiny_bert, 3).eval()
    short: TextBatch = {"input_ids": torch.tensor([[2, 5, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        alone, padded = classifier(short).logits[0], classifier(batch()).logits[1]
    assert torch.allclose(alone, padded, atol=1e-6)


# --- construction ----------------------------------------------------------------------------------------------------


def test_head_of_other_classes_is_replaced(tiny_bert: str, tmp_path: Any) -> None:
    trained = TextClassifier(tiny_bert, 2)
    trained.model.save_pretrained(tmp_path / "two")
    kept, replaced = TextClassifier(str(tmp_path / "two"), 2), TextClassifier(str(tmp_path / "two"), 3)
    assert torch.equal(kept.model.classifier.weight, trained.model.classifier.weight)
    assert replaced.model.classifier.weight.shape == (3, 16)
    assert torch.equal(replaced.model.bert.pooler.dense.weight, trained.model.bert.pooler.dense.weight)


@pytest.mark.parametrize("folder", ["no/such/folder", "empty"])
def test_backbone_that_is_not_there(folder: str, tmp_path: Any) -> None:
    (tmp_path / "empty").mkdir()
    sentence = (
        rf"backbone='{folder}' cannot be loaded: it is neither a folder with a config\.json and weights nor a name"
    )
    with pytest.raises(ValueError, match=sentence):
        TextClassifier(folder, 2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_labels": 1}, r"num_labels=1: a classifier needs at least 2 classes"),
        ({"num_labels": 2, "warmup": 1.0}, r"warmup=1\.0: it is a share of the optimizer steps"),
    ],
)
def test_bad_arguments(arguments: Any, sentence: str, tiny_bert: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TextClassifier(tiny_bert, **arguments)


def test_hyperparameters_and_weights_come_back(tiny_bert: str, data: TextData, tmp_path: Any) -> None:
    classifier = TextClassifier(tiny_bert, 3, lr=2e-3)
    trainer = Trainer(max_steps=2, **QUIET)
    trainer.fit(classifier, datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = TextClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.hparams == classifier.hparams
    assert loaded.hparams["lr"] == 2e-3
    with torch.no_grad():
        assert torch.equal(loaded.eval()(batch()).logits, classifier.eval()(batch()).logits)

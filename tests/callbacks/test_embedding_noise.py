from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.noise_hosts import (
    LENGTH,
    TextCNN,
    assert_close,
    assert_same,
    fit,
    loader,
    rows,
    trainer,
    weights,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, default_collate
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lightning_peft import (
    DEM,
    AdapterCheckpoint,
    AdapterInjection,
    AdversarialNoise,
    GaussianNoise,
    LoRA,
    RandomPositionNoise,
    RDrop,
    Regularization,
    SaltAndPepper,
    SoftPrompt,
    TokenCutoff,
    adapter_state_dict,
)
from lightning_peft.callbacks.embedding_noise import EmbeddingNoise
from lightning_peft.functional.embedding_noise import random_position_noise
from lightning_peft.regularizers.counted import told_by

EVERY: dict[str, Callable[..., EmbeddingNoise]] = {
    "rpn": RandomPositionNoise, "gaussian": GaussianNoise, "cutoff": TokenCutoff, "salt": SaltAndPepper,
}  # fmt: skip
ADAPTERS = partial(AdapterInjection, partial(LoRA, rank=2), ["head"], ["embed", "body"])


def batches() -> list[dict[str, Tensor]]:
    every = rows()
    return [default_collate(every[i : i + 4]) for i in range(0, 24, 4)]


def by_hand(passes: int, mean: bool = False, count: int = 6, module: TextCNN | None = None) -> TextCNN:
    """The paper's loop: a backward for the clean pass and for each noisy one, then a step."""
    module = TextCNN() if module is None else module
    optimizer = module.configure_optimizers()
    for i, batch in enumerate(batches()[:count]):
        optimizer.zero_grad()
        for k in range(1 + passes):
            E = module.embed(batch["input_ids"])
            if k:
                text = f"lightning_peft/embedding_noise/v1|RandomPositionNoise|0|0|{i}|{k}|0"
                numbers = [told_by(f"{text}|{row}", "cpu") for row in range(4)]
                E = random_position_noise(E, 0.3, mask=batch["attention_mask"], generator=numbers)
            logits = module.head(module.body(E.transpose(1, 2)).amax(2))
            loss = nn.functional.cross_entropy(logits, batch["labels"])
            (loss / (1 + passes) if mean else loss).backward()
        optimizer.step()
    return module


@pytest.mark.parametrize("execution", ["together", "apart", "batched"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_property_9_gradients_are_those_of_every_pass_by_itself(execution: Any, reduction: Any) -> None:
    module = TextCNN()
    fit(module, RandomPositionNoise(0.3, passes=3, reduction=reduction, execution=execution))
    assert_close(weights(module), weights(by_hand(3, mean=reduction == "mean")))
    clean = by_hand(0)
    assert not torch.allclose(module.embed.weight, clean.embed.weight, atol=1e-3)


@pytest.mark.parametrize("execution", ["together", "apart", "batched"])
def test_property_10_as_many_forwards_and_backwards_as_passes(execution: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.forwards = self.backwards = 0

        def forward(self, x: Tensor) -> Tensor:
            self.forwards += 1
            x = x.clone()
            x.register_hook(self.count)
            return x

        def count(self, gradient: Tensor) -> None:
            self.backwards += 1

    module = TextCNN()
    counts = Counts()
    module.body.append(counts)
    grad, calls = torch.autograd.grad, []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))  # type: ignore[func-returns-value]
    fit(module, RandomPositionNoise(0.3, passes=3, execution=execution), max_steps=2)
    passes = 1 if execution == "batched" else 4
    assert (counts.forwards, counts.backwards) == (2 * passes, 2 * passes)
    assert len(calls) == (2 * 3 if execution == "apart" else 0)  # of weights; for the noise there is none


@pytest.mark.parametrize("kind", EVERY)
def test_each_kind_changes_what_is_learned(kind: str) -> None:
    noisy, many = TextCNN(), TextCNN()
    fit(noisy, EVERY[kind](0.3, mode="replace"))
    fit(many, EVERY[kind](0.3, mode="virtual", passes=2))
    states = [noisy.embed.weight, many.embed.weight, by_hand(0).embed.weight]
    for i in range(3):
        assert not torch.allclose(states[i], states[i - 1], atol=1e-3)


def test_noise_is_in_training_and_nowhere_else() -> None:
    noise, noisy = RandomPositionNoise(0.3, mode="replace"), Evaluated()
    run = trainer(noise)
    run.fit(noisy, loader(), loader())
    assert run.callback_metrics["val"] == trainer().validate(noisy, loader(), verbose=False)[0]["val"]
    for entry in ("validate", "test", "predict"):
        results = [getattr(trainer(*callbacks), entry)(noisy, loader()) for callbacks in ([noise], [])]
        assert str(results[0]) == str(results[1])


class Evaluated(TextCNN):
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self(batch["input_ids"]), batch["labels"]))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test", self(batch["input_ids"]).sum())

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(batch["input_ids"])


class Breaks(TextCNN):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        outputs = super().training_step(batch, batch_idx)
        if batch_idx == 1 and len(self.embedded) == 4:  # in the noisy pass
            raise RuntimeError("theirs")
        return outputs


CALLBACKS: dict[str, Callable[[], Callback]] = {
    "rpn": RandomPositionNoise,
    "apart": lambda: RandomPositionNoise(execution="apart"),
    "adversarial": AdversarialNoise,
    "r-drop": RDrop,
}


@pytest.mark.filterwarnings("ignore:both passes of RDrop gave the same predictions")
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("kind", CALLBACKS)
def test_property_11_the_module_is_its_own_again(kind: str, broken: bool) -> None:
    module = Breaks() if broken else TextCNN()
    if kind == "r-drop":
        module = OneChild(module)  # type: ignore[assignment]
    if broken:
        with pytest.raises(RuntimeError, match="theirs"):
            fit(module, CALLBACKS[kind]())
    else:
        fit(module, CALLBACKS[kind]())
    assert "training_step" not in vars(module)
    assert "log" not in vars(module)
    assert not any(child._forward_hooks for child in module.modules())


class OneChild(LightningModule):
    """Has one child with parameters, which gives the logits."""

    def __init__(self, net: TextCNN) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch["input_ids"])
        if isinstance(self.net, Breaks) and len(self.net.embedded) == 4:
            raise RuntimeError("theirs")
        return nn.functional.cross_entropy(logits, batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.net.configure_optimizers()


@pytest.mark.parametrize("kind", EVERY)
def test_property_12_the_same_seed_is_the_same_noise_whoever_draws_beside_it(kind: str) -> None:
    def run(seed: int, beside: int = 0) -> dict[str, Tensor]:
        class Draws(Callback):
            def on_train_batch_start(self, *args: Any) -> None:
                torch.rand(beside)

        module = TextCNN()
        fit(module, EVERY[kind](0.3, seed=seed), Draws(), max_steps=3)
        return weights(module)

    first = run(0)
    assert_same(first, run(0, beside=5))
    assert not torch.equal(first["embed.weight"], run(1)["embed.weight"])


class Saves(Callback):
    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.after:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(  # 4 and 7 are between the micro-batches of a step
    ("kind", "after"), [("together", 4), ("apart", 7), ("batched", 9), ("replace", 4), ("freelb", 7)]
)
def test_property_12_a_run_that_goes_on_has_the_noise_that_it_would_have_had(
    kind: str, after: int, tmp_path: Path
) -> None:
    def run(*extra: Callback, **options: Any) -> dict[str, Tensor]:
        noise: Callback = AdversarialNoise(0.3, passes=3, start=0.3, reduction="mean")
        if kind == "replace":
            noise = RandomPositionNoise(0.3, mode="replace", prob=0.5)
        elif kind != "freelb":
            noise = RandomPositionNoise(0.3, passes=2, execution=kind)  # type: ignore[arg-type]
        module = TextCNN(dropout=0.2)
        fit(
            module, ADAPTERS(), noise, AdapterCheckpoint(), *extra,
            max_epochs=2, accumulate_grad_batches=3, **options,
        )  # fmt: skip
        return dict(adapter_state_dict(module))

    full = run(Saves(tmp_path / "stop.ckpt", after))
    torch.rand(3)
    assert_same(full, run(ckpt_path=tmp_path / "stop.ckpt"))


@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed", "64-true"])
@pytest.mark.parametrize("execution", ["together", "apart"])
def test_precisions(name: Any, execution: Any) -> None:
    precision: dict[str, Any] = {"precision": name}
    if name == "16-mixed":  # Lightning has no string for it on a CPU
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        precision = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    states = []
    for callback in (RandomPositionNoise(0.3, passes=2, execution=execution), None):
        module = TextCNN()
        fit(module, *([] if callback is None else [callback]), accumulate_grad_batches=2, **precision)
        states.append({key: value.double() for key, value in weights(module).items()})
    reference = TextCNN()
    fit(reference, RandomPositionNoise(0.3, passes=2), accumulate_grad_batches=2)
    for key, value in weights(reference).items():
        assert torch.allclose(states[0][key], value.double(), atol=5e-3), key
        assert not torch.allclose(states[1][key], value.double(), atol=5e-3), key


def test_accumulation_divides_all_passes() -> None:
    whole, parts = TextCNN(frozen=True), TextCNN(frozen=True)
    for module, size, accumulate in ((whole, 8, 1), (parts, 4, 2)):
        run = trainer(
            RandomPositionNoise(1.0, scope="token", passes=2), accumulate_grad_batches=accumulate, max_steps=1
        )
        # Noise that is the same in both: of one number for all, so that a token's dimensions may change places.
        module.embed.weight.data = module.embed.weight.data[:, :1].repeat(1, 8)
        run.fit(module, loader(size))
    assert_close(weights(whole), weights(parts))


@pytest.mark.parametrize("execution", ["together", "apart", "batched"])
def test_property_15_frozen_embeddings(execution: Any) -> None:
    module = TextCNN(frozen=True)
    fit(module, RandomPositionNoise(0.3, passes=3, execution=execution))
    assert_close(weights(module), weights(by_hand(3, module=TextCNN(frozen=True))))
    assert module.embed.weight.grad is None


class Checkpointed(TextCNN):
    """Everything from the embedding on is computed again in the backward pass."""

    twice = False
    reentrant = False

    def forward(self, ids: Tensor) -> Tensor:
        def compute(ids: Tensor) -> Tensor:
            return TextCNN.forward(self, ids)

        logits: Tensor = checkpoint(compute, ids, use_reentrant=self.reentrant)  # type: ignore[assignment]
        return logits + checkpoint(compute, ids, use_reentrant=False) if self.twice else logits  # type: ignore[operator]


@pytest.mark.parametrize("execution", ["together", "apart", "batched"])
def test_what_is_computed_again_has_the_same_noise(execution: Any) -> None:
    states = []
    for kind in (TextCNN, Checkpointed):
        module = kind()
        fit(module, RandomPositionNoise(0.3, passes=3, execution=execution))
        states.append(weights(module))
        per_step = 1 if execution == "batched" else 4
        assert len(module.embedded) == 6 * per_step * (1 if kind is TextCNN else 2)
    assert_same(*states)


def test_two_calls_that_are_computed_again_cannot_be_told_apart() -> None:
    module = Checkpointed()
    module.twice = True
    with pytest.raises(RuntimeError, match="the embedding 'embed' is called several times in a training_step, and act"):
        fit(module, RandomPositionNoise(0.3))


def test_manual_optimization_can_have_its_one_pass_replaced() -> None:
    class Manual(Checkpointed):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch["input_ids"]), batch["labels"]))
            optimizer.step()

    states = []
    for kind in (Manual, TextCNN):
        module = kind()
        fit(module, RandomPositionNoise(0.3, mode="replace"))
        states.append(weights(module))
    assert_same(*states)


@pytest.mark.parametrize("first", [True, False], ids=["noise first", "terms first"])
@pytest.mark.parametrize("execution", ["together", "apart", "batched"])
def test_terms_are_added_once_and_see_the_clean_pass(execution: Any, first: bool) -> None:
    seen: list[tuple[Any, Any]] = []

    class Sees(DEM):
        def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
            seen.append((batch, outputs))
            return outputs["logits"].square().mean() + super().forward(module, batch, outputs)

    noise, terms = RandomPositionNoise(0.3, passes=2, execution=execution), Regularization({"sees": Sees(0.5)})
    module = TextCNN()
    run = fit(
        module, ADAPTERS(), *([noise, terms] if first else [terms, noise]),
        max_steps=1,
    )  # fmt: skip
    ((batch, outputs),) = seen
    assert batch["input_ids"].shape == (4, LENGTH)
    clean = TextCNN()
    torch.testing.assert_close(outputs["logits"], clean(batches()[0]["input_ids"]))
    total = run.callback_metrics["loss/task"]
    task = nn.functional.cross_entropy(outputs["logits"], batch["labels"]).detach()
    assert total > 2 * task
    assert run.callback_metrics["loss/sees"] > 0


def test_together_and_apart_agree_beside_terms() -> None:
    states = []
    for execution in ("together", "apart"):
        torch.manual_seed(1)
        module = TextCNN()
        fit(
            module, ADAPTERS(), Regularization({"dem": DEM(0.5)}),
            RandomPositionNoise(0.3, passes=2, execution=execution),  # type: ignore[arg-type]
        )  # fmt: skip
        states.append(weights(module))
    assert_close(*states)


def test_what_is_logged_and_measured_is_the_clean_pass() -> None:
    class Measures(TextCNN):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = MulticlassAccuracy(3)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            outputs = super().training_step(batch, batch_idx)
            self.accuracy.update(outputs["logits"], batch.pop("labels"))  # the next pass has its own batch
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
            return outputs

    logged = []
    for callbacks in ([], [RandomPositionNoise(0.9, passes=3)]):
        module = Measures()
        run = trainer(*callbacks)
        module.configure_optimizers = lambda m=module: torch.optim.SGD(m.parameters(), lr=0.0)  # type: ignore[method-assign,misc]
        run.fit(module, loader())
        logged.append({name: run.callback_metrics[name] for name in ("train/loss_epoch", "accuracy")})
        assert ("loss/noisy" in run.callback_metrics) == bool(callbacks)
    assert logged[0] == logged[1]


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_that_takes_its_batches_itself_is_refused() -> None:
    class Takes(TextCNN):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            raise AssertionError

    with pytest.raises(MisconfigurationException, match="takes a dataloader_iter, of which every pass of Random"):
        fit(Takes(), RandomPositionNoise())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_that_the_user_skips_stays_skipped() -> None:
    class Skips(TextCNN):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            return None if batch_idx else super().training_step(batch, batch_idx)

    module = Skips()
    fit(module, RandomPositionNoise(0.3))
    assert len(module.embedded) == 2


def test_replacing_noise_comes_as_often_as_prob_says() -> None:
    module = TextCNN()
    run = trainer(RandomPositionNoise(1.0, mode="replace", prob=0.25), max_epochs=1)
    changed: list[bool] = []

    class Looks(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            def look(layer: nn.Module, args: Any, output: Tensor) -> None:
                changed.append(not torch.equal(output, layer.weight[args[0]]))  # type: ignore[index]

            module.embed.register_forward_hook(look)

    run.callbacks.append(Looks())  # type: ignore[attr-defined]
    run.fit(module, loader(1, 100))
    assert 12 < sum(changed) < 38
    assert len(changed) == 100


def test_noise_beside_two_passes_is_another_in_each() -> None:
    seen: list[Tensor] = []

    class Sees(OneChild):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.net.body[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))  # type: ignore[index]
            return super().training_step(batch, batch_idx)

    for callbacks in ([GaussianNoise(0.5), RDrop()], [RDrop(), GaussianNoise(0.5)]):
        seen.clear()
        fit(Sees(TextCNN()), *callbacks, max_steps=1)
        assert len(seen) > 1
        assert not torch.equal(seen[0], seen[-1])


def test_a_learning_rate_finder_before_it_changes_nothing() -> None:
    class Rated(TextCNN):
        lr = 0.1

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    found = Rated()
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    fit(found, finder, RandomPositionNoise(0.3, passes=2), enable_checkpointing=True)
    plain = Rated()
    fit(plain, RandomPositionNoise(0.3, passes=2))
    assert_same(weights(found), weights(plain))


def test_property_16_what_can_be_learned_is_learned() -> None:
    """Labels that the first token tells."""

    class First(TextCNN):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self(batch["input_ids"]), batch["labels"])

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.head(self.embed(ids)[:, 0])
            return logits

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.05)

    accuracy = []
    for callbacks in ([], [RandomPositionNoise(0.1)]):
        module = First()
        trainer(*callbacks, max_epochs=10).fit(module, loader(16, 64))
        batch = default_collate(rows(256))
        accuracy.append((module(batch["input_ids"]).argmax(1) == batch["labels"]).float().mean())
    assert accuracy[1] >= accuracy[0] - 0.02
    assert accuracy[0] > 0.95


def test_the_columns_of_a_prompt_are_left_alone() -> None:
    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            config = BertConfig(
                vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
            )
            self.model = BertForSequenceClassification(config)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            loss: Tensor = self.model(**batch | {"labels": batch["labels"] % 2}).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), 0.1)

    class Looks(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.get_submodule("model.base.bert.embeddings.word_embeddings").register_forward_hook(
                lambda layer, args, output: seen.append((args[0], output.detach()))
            )

    seen: list[tuple[Tensor, Tensor]] = []
    module = Classifier()
    placed = AdapterInjection(partial(SoftPrompt, length=3))
    fit(module, placed, RandomPositionNoise(1.0, scope="sample"), Looks(), max_steps=1)
    (ids, clean), (_, noisy) = seen
    prompt = torch.zeros_like(ids, dtype=torch.bool)
    prompt[:, :3] = True
    assert (ids[prompt] == module.model.placeholder).all()
    assert (ids[~prompt] == module.model.placeholder).any()  # which in the text is a token like any other
    assert torch.equal(noisy[prompt], clean[prompt])
    text = (ids != 0) & ~prompt
    assert (noisy[text] != clean[text]).float().mean() > 0.9
    for i in range(4):
        assert torch.isin(noisy[i][text[i]], clean[i][text[i]]).all()


def test_checkpoints_hold_nothing_of_it(tmp_path: Path) -> None:
    module = TextCNN()
    fit(module, RandomPositionNoise(), ModelCheckpoint(tmp_path, "last"), enable_checkpointing=True)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not any("Noise" in key for key in content["callbacks"])
    assert content["state_dict"].keys() == TextCNN().state_dict().keys()


@pytest.mark.parametrize("position", ["start", "after_cls"])
def test_padding_is_known_behind_a_prompt_too(position: Any) -> None:
    class Writer(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            # No id of padding: its embedding has no padding_idx, and the prompt's columns have an ordinary id.
            config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
            self.model = GPT2LMHeadModel(config)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            loss: Tensor = self.model(**batch | {"labels": batch["input_ids"]}).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), 0.1)

    class Looks(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.get_submodule("model.base.transformer.wte").register_forward_hook(
                lambda layer, args, output: seen.append(output.detach())
            )

    seen: list[Tensor] = []
    batch = default_collate(rows(4))
    batch["input_ids"][batch["attention_mask"].bool() & (batch["input_ids"] == 3)] = 0  # as ordinary as any other
    module = Writer()
    placed = AdapterInjection(partial(SoftPrompt, length=3, prompt_position=position))
    trainer(placed, RandomPositionNoise(1.0, causal=False), Looks(), max_steps=1).fit(
        module, DataLoader([batch], batch_size=None)
    )
    clean, noisy = seen
    text = module.model.lengthened(batch["attention_mask"]).bool()
    assert text.sum() == batch["attention_mask"].sum()
    assert torch.equal(noisy[~text], clean[~text])
    assert ((noisy != clean).float().mean(-1)[text] > 0.3).all()
    for i in range(4):
        assert torch.isin(noisy[i][text[i]], clean[i][text[i]]).all()


class Writes(LightningModule):
    """A causal model, whose embedding's output is noted."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
            self.model = GPT2LMHeadModel(config)
        self.seen: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if not self.seen:
            embedding = self.model.get_input_embeddings()
            with torch.no_grad():
                embedding.weight[19] = 100.0  # the later token, larger than all others
            # After the callback's own hook.
            embedding.register_forward_hook(lambda layer, args, output: self.seen.append(output.detach()))
        loss: Tensor = self.model(**batch, labels=batch["input_ids"]).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), 0.1)


@pytest.mark.parametrize("mode", ["replace", "virtual"])
@pytest.mark.parametrize("noise", EVERY.values(), ids=EVERY)
def test_no_position_of_a_causal_model_sees_a_later_token(noise: Callable[..., EmbeddingNoise], mode: Any) -> None:
    ids = torch.randint(1, 19, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    for t in range(1, LENGTH):
        noisy = []
        for token in (18, 19):
            ids[:, t] = token
            module = Writes()
            batch = {"input_ids": ids.clone(), "attention_mask": torch.ones_like(ids)}
            run = trainer(noise(0.5, mode=mode), max_steps=1)
            run.fit(module, DataLoader([batch], batch_size=None))
            noisy.append(module.seen[-1])
        assert torch.equal(noisy[0][:, :t], noisy[1][:, :t])
        assert not torch.equal(noisy[0][:, t], noisy[1][:, t])


def test_salt_and_pepper_may_be_told_that_nothing_is_predicted() -> None:
    noisy = []
    for token in (18, 19):
        module, ids = Writes(), torch.arange(1, LENGTH + 1).repeat(4, 1)
        ids[:, -1] = token
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        trainer(SaltAndPepper(0.5, causal=False), max_steps=1).fit(module, DataLoader([batch], batch_size=None))
        noisy.append(module.seen[-1])
    assert (noisy[1][:, :-1] == 100).any()
    assert not torch.equal(noisy[0][:, :-1], noisy[1][:, :-1])


@pytest.mark.parametrize("form", ["pairs", "heads", "packed"])
def test_padding_is_known_from_masks_of_pairs_and_from_packed_rows(form: str) -> None:
    class Net(TextCNN):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self(batch["input_ids"]), batch["labels"])

    module, batch = Net(), default_collate(rows(4))
    module.embed.padding_idx = None
    text = batch.pop("attention_mask").bool()
    pairs = text[:, None] & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    batch |= {
        "pairs": {"attention_mask": pairs}, "heads": {"attention_mask": pairs[:, None].long()},
        "packed": {"document_ids": text.long()},
    }[form]  # fmt: skip
    trainer(RandomPositionNoise(1.0), max_steps=1).fit(module, DataLoader([batch], batch_size=None))
    clean, noisy = module.embedded
    assert torch.equal(noisy[~text], clean[~text])
    assert (noisy[text] != clean[text]).float().mean() > 0.5


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("first", ["short", "long"])
def test_each_of_two_texts_has_its_own_padding(first: str, copied: bool) -> None:
    class Towers(TextCNN):
        def training_step(self, batch: list[dict[str, Tensor]], batch_idx: int) -> Any:
            for text in batch:
                ids = text["input_ids"].clone() if copied else text["input_ids"]
                self(ids)
            return self(batch[0]["input_ids"]).sum()

    module = Towers()
    module.embed.padding_idx = None
    short, long = torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0]]), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    texts = [{"input_ids": ids, "attention_mask": ids.ne(0).long()} for ids in (short, long)]
    batch = texts if first == "short" else texts[::-1]
    before, noise = module.embed.weight.detach().clone(), RandomPositionNoise(1.0, mode="replace")
    trainer(noise, max_steps=1).fit(module, DataLoader([batch], batch_size=None))
    for text, embedded in zip(batch, module.embedded, strict=False):
        changed = (embedded != before[text["input_ids"]]).any(-1)
        assert torch.equal(changed, text["attention_mask"].bool())

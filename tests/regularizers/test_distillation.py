from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    Budget,
    BudgetPenalty,
    Cubic,
    Distillation,
    DynamicDoRA,
    Factorized,
    RankPolicy,
    RankPruning,
    RankSelection,
    Regularization,
    Taylor,
    inject,
)
from lightning_peft.adapters import ars

ADAPTER = partial(DynamicDoRA, rank=2, dropout=0.2)


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self.net(batch), batch.abs().argmax(1) % 3)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class ByHand(Module):
    """The same, written by somebody who does not know the term."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = network().requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        states = {}
        hook = self.net[2].register_forward_hook(lambda m, x, y: states.update(mine=y))
        logits = self.net(batch)
        hook.remove()
        loss = F.cross_entropy(logits, batch.abs().argmax(1) % 3)
        self.teacher.eval()
        with torch.no_grad():
            theirs = self.teacher(batch)
            target = self.teacher[:3](batch)
        with torch.autocast("cpu", enabled=False):
            wide = torch.promote_types(theirs.dtype, torch.float32)
            p, q = (theirs.to(wide) / 2).log_softmax(-1), (logits.to(wide) / 2).log_softmax(-1)
            kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean() * 4
            term = kl + 0.3 * (states["mine"].to(wide) - target.to(wide)).square().mean()
            return loss.to(wide) + 0.5 * term


def term(**options: Any) -> Distillation:
    return Distillation(**{"weight": 0.5, "hidden": ["2"], "hidden_weight": 0.3, **options})


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})


def data(batches: int = 6) -> DataLoader[Tensor]:
    return DataLoader(torch.randn(batches * 4, 8, generator=torch.Generator().manual_seed(0)), batch_size=4)  # type: ignore[arg-type]


def injection() -> AdapterInjection:
    return AdapterInjection(ADAPTER, targets=["net.0", "net.2"], train=["net.5"], verbose=False)


def precision(name: str) -> dict[str, Any]:
    if name == "16-mixed":  # Lightning has no string for it on a CPU
        return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]}
    return {"precision": name}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in module.state_dict().items() if key.startswith("net.")}


def same(one: nn.Module, other: nn.Module) -> None:
    assert weights(one).keys() == weights(other).keys()
    for key, value in weights(one).items():
        assert torch.equal(value, weights(other)[key]), key


@pytest.mark.parametrize(
    ("name", "accumulate", "clip"),
    [
        ("32-true", 3, 0.05),
        ("bf16-mixed", 1, 0.05),
        ("16-mixed", 3, 0.05),
        ("64-true", 1, None),
        ("bf16-true", 1, None),
    ],
)
def test_it_is_bitwise_the_loss_written_by_hand(name: str, accumulate: int, clip: float | None) -> None:
    runs = []
    for kind in (Module, ByHand):
        module, distillation = kind(), term()
        torch.manual_seed(1)
        terms = [Regularization({"teacher": distillation})] if kind is Module else []
        run = trainer(
            injection(), *terms, accumulate_grad_batches=accumulate, gradient_clip_val=clip, **precision(name)
        )
        run.fit(module, data())
        runs.append(module)
    same(*runs)
    module = Module()
    torch.manual_seed(1)
    run = trainer(injection(), accumulate_grad_batches=accumulate, gradient_clip_val=clip, **precision(name))
    run.fit(module, data())
    assert not torch.equal(weights(module)["net.5.weight"], weights(runs[0])["net.5.weight"])


class Validated(Module):
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.loss(batch))


def test_the_teacher_is_nobodys_child_and_stays_as_it_was() -> None:
    module, distillation = Validated(), term()
    run = trainer(injection(), Regularization({"teacher": distillation}), AdapterCheckpoint())
    run.validate(module, data(), verbose=False)  # puts adapters in; what comes after still has its teacher
    run.fit(module, data(), data())
    teacher = distillation.teacher
    assert teacher is not None
    assert not teacher.training
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), network().parameters(), strict=True))
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert not held & {id(p) for p in teacher.parameters()}
    assert all(child is not teacher for child in module.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert [key for key in module.state_dict() if "peft_terms" in key] == ["peft_terms.teacher.teacher_print"]
    assert not any(child._forward_hooks for child in module.modules())
    assert "training_step" not in vars(module)


def test_where_the_weight_is_zero_the_teacher_does_not_run() -> None:
    distillation = term(weight=lambda step, total: float(step > total // 2))
    calls = []
    module = Module()
    run = trainer(
        injection(), Regularization({"teacher": distillation}), accumulate_grad_batches=2, num_sanity_val_steps=0
    )
    teacher = network()
    teacher.register_forward_hook(lambda *_: calls.append(run.global_step))
    distillation.__dict__["_given"] = teacher
    run.fit(module, data())
    assert calls == [3, 3, 4, 4, 5, 5]


def test_a_teacher_may_be_given_built_or_taken_out_of_a_whole_module() -> None:
    runs = []
    for teacher in (None, network(), network, Module(), Module):
        module = Module()
        torch.manual_seed(1)
        trainer(injection(), Regularization({"teacher": term(teacher=teacher)})).fit(module, data())
        runs.append(module)
    for other in runs[1:]:
        same(runs[0], other)


def test_what_draws_masks_is_no_student() -> None:
    """Learned ranks stand beside the model as a child of the module, as terms do."""
    found = []
    for of in ("net", None):
        module = Module()
        torch.manual_seed(1)
        injection = AdapterInjection(partial(Factorized, trained=False), ["net.0", "net.2"], [], verbose=False)
        regularization = Regularization({"teacher": term(of=of), "budget": BudgetPenalty(0.5)})
        selection = RankSelection(ars.policy(0.5, interval=2, shift=-0.2))
        run = trainer(injection, selection, regularization)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "masks have learned to keep")
            run.fit(module, data())
        assert run.logged_metrics["loss/teacher"] > 0
        found.append(module)
    same(*found)


class Whole(Module):
    """The logits are not a child's output."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Linear(3, 3)

    def forward(self, batch: Tensor) -> Any:
        return self.bias(self.net(batch)), None

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self(batch)[0], batch.abs().argmax(1) % 3)


def test_the_whole_module_may_be_the_student() -> None:
    distillation = term(of="", read=lambda output: output[0], hidden=["net.2"])
    run = trainer(injection(), Regularization({"teacher": distillation}), max_steps=3)
    run.fit(Whole(), data())
    assert isinstance(distillation.teacher, Whole)
    assert run.logged_metrics["loss/teacher"] > 0


class Bert(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
            self.model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def test_a_transformer_is_read_by_name_and_padding_counts_for_nothing() -> None:
    ids = torch.randint(1, 50, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * n + [0] * (6 - n) for n in (6, 4, 3, 2)])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 0])}
    module = Bert()
    distillation = Distillation(hidden=["bert.encoder.layer.1"])
    plain = copy.deepcopy(module.model).eval()
    loader: DataLoader[Any] = DataLoader([batch] * 3, batch_size=None)  # type: ignore[arg-type]
    trainer(AdapterInjection(ADAPTER, verbose=False), Regularization({"t": distillation}), max_steps=3).fit(
        module, loader
    )
    module.eval()
    distillation.begin(module)
    with distillation.watching(module):
        ours = module.model(**batch, output_hidden_states=True)
    value = distillation(module, batch, None)
    distillation.end()
    with torch.no_grad():
        theirs = plain(**batch, output_hidden_states=True)
    p, q = (theirs.logits / 2).log_softmax(-1), (ours.logits / 2).log_softmax(-1)
    shown = mask.bool()
    states = (ours.hidden_states[2][shown] - theirs.hidden_states[2][shown]).square().mean()
    torch.testing.assert_close(value, 4 * (p.exp() * (p - q)).sum(-1).mean() + states)
    assert states > 0


def test_layers_that_are_called_again_and_modules_that_are_called_twice_are_compared_call_by_call() -> None:
    class Twice(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return self.loss(batch) + self.loss(-batch)

    module, distillation = Twice(), term(weight=1.0)
    inject(module.net, ADAPTER, targets=["0"])
    distillation = term(teacher=network())
    with torch.no_grad():
        module.net[0].gate.gain.fill_(0.5)  # type: ignore[union-attr]
    module.eval()
    distillation.begin(module)
    x = torch.randn(4, 8)
    found = []
    for batches in ([x, -x], [x], [-x]):
        with distillation.watching(module):
            for batch in batches:
                module.net(batch)
        found.append(distillation(module, x, None))
    torch.testing.assert_close(found[0], (found[1] + found[2]) / 2)


def test_resume_is_exact_and_knows_its_teacher(tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        policy = RankPolicy(Cubic(0.1, 0.2), Taylor(), Budget(rank=1), interval=2)
        pruning = RankPruning(policy, compact=1)
        return [injection(), pruning, Regularization({"teacher": term()}), AdapterCheckpoint()]

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    whole = Module()
    torch.manual_seed(1)
    trainer(*callbacks(), Save()).fit(whole, data())
    for step in (3, 8):
        again = Module()
        torch.manual_seed(7)
        trainer(*callbacks()).fit(again, data(), ckpt_path=str(tmp_path / f"{step}.ckpt"), weights_only=True)
        same(whole, again)
    saved = torch.load(tmp_path / "3.ckpt", weights_only=True)["state_dict"]
    assert {key for key in saved if not key.startswith("net.")} == {"peft_terms.teacher.teacher_print"}
    assert "net.0.base.weight" not in saved
    other = Module()
    with torch.no_grad():
        other.net[5].weight.add_(1.0)  # type: ignore[operator]  # trained, so the base is the same
    with pytest.raises(RuntimeError, match="the teacher is not the one that this run began with"):
        trainer(*callbacks()).fit(other, data(), ckpt_path=str(tmp_path / "3.ckpt"), weights_only=True)


def test_the_teacher_is_known_after_a_learning_rate_finder(tmp_path: Path) -> None:
    """It trains, and then restores what was before, a teacher that was not known yet included."""
    module, distillation = Module(), term()
    module.lr = 0.01  # type: ignore[assignment]
    finder = LearningRateFinder(num_training_steps=4, early_stop_threshold=None, update_attr=False)
    run = trainer(injection(), Regularization({"teacher": distillation}), finder, default_root_dir=tmp_path)
    run.fit(module, data())
    assert int(distillation.teacher_print) != 0


def test_a_layer_that_compaction_replaced_is_heard_again() -> None:
    policy = RankPolicy(Cubic(0.1, 0.2), Taylor(), Budget(rank=1), interval=2)
    module, distillation = Module(), term(hidden=["0", "2"])
    run = trainer(injection(), RankPruning(policy, compact=1), Regularization({"teacher": distillation}))
    run.fit(module, data())
    assert sum(len(layer.gate) for layer in (module.net[0], module.net[2]) if hasattr(layer, "gate")) == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own
def test_a_compiled_student_is_heard() -> None:
    plain = Module()
    torch.manual_seed(1)
    inject(plain.net, partial(DynamicDoRA, rank=2, dropout=0.0), targets=["0", "2"], train=["5"])
    plain.net[4].p = 0.0  # a compiler draws otherwise
    compiled = copy.deepcopy(plain)
    compiled.net.compile(backend="eager")
    found = []
    for each in (plain, compiled):
        distillation = term(weight=10.0, teacher=network())
        torch.manual_seed(1)
        trainer(Regularization({"teacher": distillation}), max_steps=3).fit(each, data())
        found.append(weights(each))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_state_that_has_no_gradient_because_it_is_recomputed_is_told() -> None:
    class Reentrant(Module):
        def loss(self, batch: Tensor) -> Tensor:
            def run(x: Tensor) -> Tensor:
                y: Tensor = self.net(x)
                return y

            logits: Tensor = checkpoint(run, batch.requires_grad_(), use_reentrant=True)
            return F.cross_entropy(logits, batch.abs().argmax(1) % 3)

    with pytest.raises(RuntimeError, match="hidden='2': it ran without gradients, .* use_reentrant=False"):
        trainer(injection(), Regularization({"teacher": term()})).fit(Reentrant(), data())


class Recomputed(Module):
    def loss(self, batch: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            y: Tensor = self.net(x)
            return y

        logits = checkpoint(run, batch, use_reentrant=False)
        return F.cross_entropy(logits, batch.abs().argmax(1) % 3)


def test_recomputation_is_not_a_second_call() -> None:
    runs = []
    for kind in (Module, Recomputed):
        module = kind()
        torch.manual_seed(1)
        trainer(injection(), Regularization({"teacher": term()})).fit(module, data())
        runs.append(module)
    for key, value in weights(runs[0]).items():
        torch.testing.assert_close(weights(runs[1])[key], value)

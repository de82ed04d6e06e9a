"""What goes wrong with HF PEFT's AdaLoRA, each shown on the real one, and that it does not go wrong here.

What goes wrong on several processes is in tests/distributed/test_adalora_traps.py.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from packaging.version import Version
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft import __version__ as peft_version
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from lightning_peft import (
    AdaLoRA,
    AdapterInjection,
    Budget,
    Orthogonality,
    RankBudget,
    RankPruning,
    Regularization,
    from_hf_peft,
    inject,
    presets,
    to_hf_peft,
)
from lightning_peft.adapters import adalora

INIT, TARGET, TOTAL = 4, 2, 16
LAYERS = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(*(nn.Linear(8, 8) for _ in range(LAYERS)))
            self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Any:
        out = self.head(self.body(x))
        return SimpleNamespace(out=out, loss=(out - x.sum(1, keepdim=True).sin()).square().mean())


def batch(step: int) -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(step))


def peft_model(**options: Any) -> Any:
    """PEFT's AdaLoraModel, whose own forward adds the penalty."""
    torch.manual_seed(1)
    settings = {"init_r": INIT, "target_r": TARGET, "total_step": TOTAL, "tfinal": 4} | options
    return get_peft_model(Net(), AdaLoraConfig(target_modules=r"body\.\d+", **settings)).base_model


def peft_open(model: Any) -> int:
    return sum(int((layer.lora_E["default"] != 0).sum()) for layer in model.model.body)


def peft_train(model: Any, first: int = 1, last: int = TOTAL, allocate: bool = True) -> Any:
    """The loop of PEFT's documentation."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(first, last + 1):
        model(batch(step)).loss.backward()
        optimizer.step()
        if allocate:
            model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


def our_net() -> nn.Module:
    net = Net()
    torch.manual_seed(1)
    inject(net, partial(AdaLoRA, rank=INIT), [r"body\.\d+"], [])
    return net


def tracked(net: nn.Module, **options: Any) -> Any:
    policy = adalora.policy(Budget(rank=options.pop("final", TARGET)), **({"interval": 1, "tail": 0.25} | options))
    policy.track(RankBudget.of(net))
    return policy


class Module(L.LightningModule):
    """A user's module that computes its own loss."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.net, self.lr = Net(), lr
        self.validation: list[float] = []

    def training_step(self, x: Tensor) -> Tensor:
        return (self.net(x).out - x.sum(1, keepdim=True).sin()).square().mean()

    def validation_step(self, x: Tensor) -> None:
        self.validation.append(self.net(x).loss.item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Losses(L.Callback):
    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.found.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("loss/")})


def fit(*callbacks: L.Callback, module: Module | None = None, **options: Any) -> Module:
    module = module or Module()
    torch.manual_seed(1)
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    settings |= {"limit_val_batches": 0} | options
    trainer = L.Trainer(callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False, **settings)
    loader = DataLoader(torch.cat([batch(step) for step in range(TOTAL)]), batch_size=8)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader)
    return module


def preset(**options: Any) -> list[L.Callback]:
    settings = {"targets": [r"body\.\d+"], "interval": 1, "tail": 0.25, "initial_rank": INIT}
    return [*presets.adalora(TARGET, **(settings | options))]  # type: ignore[arg-type]


def test_1_nobody_has_to_call_the_allocator() -> None:
    assert peft_open(peft_train(peft_model(), allocate=False)) == LAYERS * INIT  # not a word
    assert RankBudget.of(fit(*preset())).spent == LAYERS * TARGET


def test_2_the_number_of_steps_comes_from_the_trainer() -> None:
    assert peft_open(peft_train(peft_model(total_step=1000))) > LAYERS * TARGET  # told wrongly, and no target reached
    pruning = preset()[1]
    assert isinstance(pruning, RankPruning)
    fit(*preset()[:1], pruning)
    assert pruning.total_steps == TOTAL


class Loop:
    """Our parts in a plain loop that can be stopped."""

    def __init__(self) -> None:
        self.net = our_net()
        self.policy = tracked(self.net)
        self.optimizer = torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad], lr=0.05)

    def take(self, steps: range) -> Loop:
        for step in steps:
            self.optimizer.zero_grad()
            self.net(batch(step)).loss.backward()
            if self.policy.observes(step, TOTAL):
                self.policy.importance.update()
            self.optimizer.step()
            if self.policy.is_event(step, TOTAL):
                self.policy.apply(self.policy.decide(step, TOTAL), step, TOTAL)
        return self

    def load(self, other: Loop) -> Loop:
        for part in ("net", "policy", "optimizer"):
            getattr(self, part).load_state_dict(copy.deepcopy(getattr(other, part).state_dict()))
        return self


def test_2_their_run_resumed_in_its_last_phase_crashes() -> None:
    again = peft_model()
    again.load_state_dict(peft_train(peft_model(), last=13).state_dict())
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'keys'"):
        peft_train(again, first=14)


@pytest.mark.parametrize("stop", [7, 12, 13])
def test_2_ours_goes_on_as_if_it_had_not_stopped(stop: int) -> None:
    whole = Loop().take(range(1, TOTAL + 1)).net.state_dict()
    half = Loop().take(range(1, stop + 1))
    resumed = Loop().load(half).take(range(stop + 1, TOTAL + 1))
    assert RankBudget.of(resumed.net).spent == LAYERS * TARGET
    assert all(torch.equal(value, whole[key]) for key, value in resumed.net.state_dict().items())


def test_3_a_target_equal_to_the_start_prunes_nothing() -> None:
    with pytest.raises(RuntimeError, match="kthvalue"):
        peft_train(peft_model(target_r=INIT))
    net = our_net()
    policy = tracked(net, final=INIT)
    net(batch(0)).loss.backward()
    policy.importance.update()
    for step in range(1, TOTAL + 1):
        assert all(mask.all() for mask in policy.decide(step, TOTAL).values())


def test_4_a_parameter_without_gradient_has_sensitivity_zero() -> None:
    model = peft_model()
    model(batch(0)).loss.backward()
    model.model.body[1].lora_A["default"].grad = None
    with pytest.raises(TypeError):
        model.update_and_allocate(1)
    net = our_net()
    policy = tracked(net)
    net(batch(0)).loss.backward()
    first: Any = RankBudget.of(net)["body.0"].adapter
    first.A.grad = first.gate.gain.grad = first.B.grad = None
    policy.importance.update()
    assert not policy.importance.statistics()["sensitivity.A"]["body.0"].any()
    assert not policy.importance.scores()["body.0"].any()


def test_4_but_no_gradient_at_all_is_told() -> None:
    net = our_net()
    policy = tracked(net, mode="peft")
    policy.importance.update()
    with pytest.raises(RuntimeError, match="has seen no gradient of an adapter at any step.*mode='aligned' reads them"):
        policy.decide(6, TOTAL)


def test_5_ties_close_exactly_as_many_as_the_budget_says() -> None:
    model = peft_model(tinit=0, tfinal=0)
    for layer in model.model.body:
        nn.init.ones_(layer.lora_E["default"])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # so all scores are zero
    model.update_and_allocate(1)
    assert model.rankallocator.budget_schedule(1)[0] == 10
    assert peft_open(model) == 0
    net = our_net()
    policy = tracked(net, warmup=0.0, tail=0.0)
    for site in RankBudget.of(net).values():
        nn.init.ones_(site.gate.gain)  # type: ignore[arg-type]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    policy.importance.update()
    policy.apply(policy.decide(1, TOTAL), 1, TOTAL)
    assert RankBudget.of(net).spent == policy.budget_at(1, TOTAL) == 10


def scaled(init_scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=5))


def test_6_a_scale_reaches_their_statistics() -> None:
    """PEFT's allocator takes p.grad as it is; if it is still scaled, steps count by the square of their scale."""
    model = peft_model(orth_reg_weight=0.0)
    nn.init.ones_(model.model.body[0].lora_E["default"])
    averages = []
    for scale in (1.0, 2.0**8):
        model.zero_grad()
        model.rankallocator.reset_ipt()
        (scale * model(batch(0)).loss).backward()
        model.rankallocator.update_ipt(model.model)
        averages.append(model.rankallocator.exp_avg_ipt["body.0.lora_E.default"])
    torch.testing.assert_close(averages[1], averages[0] * 2**8)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["aligned", "peft"])
def test_6_statistics_are_those_of_a_run_without_a_scaler(mode: Any, fused: bool) -> None:
    """A fused optimizer unscales gradients itself, in its step: before it, they are still scaled."""

    class Fused(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3, fused=fused)

    class Sum(L.Callback):
        total = 0.0

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 5:
                self.total = sum(row.sum().item() for row in importance.statistics()["sensitivity.B"].values())

    sums = []
    for plugin in (None, scaled(2.0**10)):
        callbacks, look = preset(orthogonality=0.0, mode=mode), Sum()
        importance = callbacks[1].policy.importance  # type: ignore[attr-defined]
        fit(*callbacks, look, module=Fused(), plugins=[] if plugin is None else [plugin])
        sums.append(look.total)
    assert sums[0] > 0
    assert sums[1] == pytest.approx(sums[0], rel=0.1)  # the forward runs in half precision


def test_6_steps_that_the_scaler_skips_leave_no_trace() -> None:
    module = fit(*preset(), module=Module(lr=1e-3), plugins=[scaled(2.0**36)], max_epochs=3)
    assert RankBudget.of(module).spent == LAYERS * TARGET


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_6_one_gradient_that_is_not_finite_is_no_news_but_stays_in_theirs(broken: float) -> None:
    model = peft_model()
    model(batch(0)).loss.backward()
    model.model.body[0].lora_B["default"].grad[0, 0] = broken
    for step in (1, 2):
        model.update_and_allocate(step)
        model.zero_grad()
        model(batch(step)).loss.backward()
    assert not model.rankallocator.exp_avg_ipt["body.0.lora_B.default"].isfinite().all()
    net = our_net()
    policy = tracked(net)
    net(batch(0)).loss.backward()
    policy.importance.update()
    before = {key: {n: r.clone() for n, r in rows.items()} for key, rows in policy.importance.statistics().items()}
    RankBudget.of(net)["body.1"].adapter.B.grad[0, 0] = broken  # type: ignore[index,union-attr]
    policy.importance.update()
    for key, rows in policy.importance.statistics().items():
        assert all(torch.equal(row, before[key][name]) for name, row in rows.items())
    assert policy.importance.diverged() == ["body.1"]
    assert policy.importance.diverged() == []


def test_10_a_weighted_sum_of_adapters(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="does not support add_weighted_adapter"):
        peft_model().add_weighted_adapter(["default"], [1.0], "sum")
    net = our_net().eval()
    for site in RankBudget.of(net).values():
        nn.init.normal_(site.gate.gain)  # type: ignore[arg-type]
    to_hf_peft(net, tmp_path / "ours", check="files")
    loaded: Any = PeftModel.from_pretrained(Net(), str(tmp_path / "ours"), adapter_name="a")
    loaded.load_adapter(str(tmp_path / "ours"), "b")
    loaded.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean", combination_type="cat")
    loaded.set_adapter("mean")
    torch.testing.assert_close(loaded(batch(0)).out, net(batch(0)).out, rtol=1e-5, atol=1e-6)


def test_11_the_scale_is_a_constant(tmp_path: Path) -> None:
    """PEFT from 0.21 on makes `ranknum` trainable where it casts or moves it, as for a bfloat16 base; saves none."""
    config = AdaLoraConfig(target_modules=r"body\.\d+", init_r=INIT, target_r=TARGET, total_step=9)
    theirs = get_peft_model(Net().bfloat16(), config)
    trained = [name for name, p in theirs.named_parameters() if p.requires_grad and "ranknum" in name]
    assert len(trained) == (LAYERS if Version(peft_version) >= Version("0.21") else 0)
    net = Net().bfloat16()
    inject(net, partial(AdaLoRA, rank=INIT), [r"body\.\d+"], [])
    assert {name.rpartition(".")[2] for name, p in net.named_parameters() if p.requires_grad} == {"A", "B", "gain"}
    for site in RankBudget.of(net).values():
        nn.init.normal_(site.gate.gain)  # type: ignore[arg-type]
    to_hf_peft(net, tmp_path / "ours", "adalora", check="files")
    again = from_hf_peft(Net().bfloat16(), tmp_path / "ours")
    x = batch(0).bfloat16()
    torch.testing.assert_close(again(x).out, net(x).out, rtol=0, atol=0.02)


def bert() -> BertForSequenceClassification:
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval()


def test_the_penalty_is_not_in_the_loss_that_is_watched() -> None:
    tokens, labels = torch.arange(12).view(2, 6), torch.tensor([0, 1])
    plain = bert()(input_ids=tokens, labels=labels).loss.item()
    settings = {"task_type": "SEQ_CLS", "target_modules": ["query"], "total_step": 9}
    theirs = get_peft_model(bert(), AdaLoraConfig(**settings)).eval()  # type: ignore[arg-type]
    assert theirs(input_ids=tokens, labels=labels).loss.item() > plain + 1  # E is 0: the same function
    callbacks = [AdapterInjection(partial(AdaLoRA, rank=INIT), [r"body\.\d+"], []), _penalty(100.0)]
    with_term = fit(*callbacks, max_steps=1, limit_val_batches=1, num_sanity_val_steps=1).validation[0]
    assert with_term == pytest.approx(Net()(batch(0)).loss.item())


def _penalty(weight: float) -> Regularization:
    return Regularization({"orthogonality": Orthogonality(weight, form="norm")})


def test_the_penalty_is_there_for_a_module_that_computes_its_own_loss() -> None:
    tokens = torch.arange(12).view(2, 6)
    slopes = []
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        settings = {"task_type": "SEQ_CLS", "target_modules": ["query"], "total_step": 9, "orth_reg_weight": weight}
        theirs = get_peft_model(bert(), AdaLoraConfig(**settings))  # type: ignore[arg-type]
        nn.functional.cross_entropy(theirs(input_ids=tokens).logits, torch.tensor([0, 1])).backward()
        slopes.append([p.grad.clone() for n, p in theirs.named_parameters() if "lora_A" in n])
    assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))  # weight 0.5 does nothing
    losses = Losses()
    fit(*preset(), losses)
    values = [found["loss/orthogonality"] for found in losses.found]
    assert values[0] == pytest.approx(INIT**0.5, rel=0.01)  # the factors start near zero: |0 - I|
    assert values[-1] < values[0] / 2  # and it is trained

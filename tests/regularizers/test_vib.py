from __future__ import annotations

import copy
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from lightning_peft import (
    VIB,
    AdapterCheckpoint,
    AdapterFileError,
    AdapterInjection,
    LoRA,
    Regularization,
    eject,
    fold_heads,
    inject,
    load,
    merge,
    save_merged,
    to_hf_peft,
)
from lightning_peft.checkpoint import ENTRY, digest
from lightning_peft.head_modules import head_modules, replace_head
from lightning_peft.heads import find_head
from lightning_peft.regularizers.bottleneck import BottleneckHead

ADAPTER = partial(LoRA, rank=2)


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 3))


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Bottleneck(nn.Module):
    """The same, as somebody would write it who has the paper and not the package."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU())
        self.mean, self.std = nn.Linear(7, 4), nn.Linear(7, 4)
        self.classifier = nn.Linear(4, 3)
        self.prior_mean, self.prior_std = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.calls = 0


class ByHand(Module):
    samples = 5

    def setup(self, stage: str) -> None:
        # When the package builds its own: random numbers are then the same.
        self.net = nn.Sequential(*network()[:4])
        torch.manual_seed(1)
        self.head = Bottleneck()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, labels = batch
        head = self.head
        e = head.mlp(self.net(x))
        mean, raw = head.mean(e), head.std(e)
        wide = torch.promote_types(mean.dtype, torch.float32)
        mean, std = mean.to(wide), F.softplus(raw.to(wide))
        text = f"lightning_peft/bottleneck/v1|3|{head.calls}"
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
        head.calls += 1
        noise = torch.randn(self.samples, *mean.shape, generator=torch.Generator().manual_seed(number), dtype=wide)
        logits = head.classifier((mean + std * noise).to(e.dtype if e.dtype == torch.float64 else x.dtype))
        loss = F.cross_entropy(logits[0], labels)
        with torch.autocast("cpu", enabled=False):
            epoch = self.current_epoch + 1
            prior_std = F.softplus(head.prior_std.to(wide))
            x_ = 2 * (std / prior_std).log()
            kl = (torch.expm1(x_) - x_ + ((head.prior_mean.to(wide) - mean) / prior_std).square()) / 2
            penalty = min(1.0, 0.05 * epoch) * kl.sum(-1).mean()
            if self.samples == 1:
                return loss + penalty
            others = F.cross_entropy(logits.to(wide)[1:].flatten(0, 1), labels.repeat(self.samples - 1))
            return (loss + (self.samples - 1) * others) / self.samples + penalty


def term(**options: Any) -> VIB:
    return VIB(**{"features": 4, "beta": 0.05, "seed": 3, **options})


def data(batches: int = 6) -> DataLoader[Any]:
    x = torch.randn(batches * 4, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader([(row, row.abs().argmax() % 3) for row in x], batch_size=4)  # type: ignore[arg-type]


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


def injection(**options: Any) -> AdapterInjection:
    return AdapterInjection(ADAPTER, **{"targets": ["net.0", "net.2"], "verbose": False, **options})


class Seeded(Callback):
    """The bottleneck's start has the same random numbers as the one by hand."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        torch.manual_seed(1)


def fit(module: LightningModule, *callbacks: Callback, batches: int = 6, **options: Any) -> Trainer:
    run = trainer(Seeded(), *callbacks, **options)
    run.fit(module, data(batches))
    return run


def mine(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def head_of(module: nn.Module) -> BottleneckHead:
    (head,) = head_modules(module).values()
    assert isinstance(head, BottleneckHead)
    return head


@pytest.mark.parametrize(
    ("precision", "samples", "accumulate"),
    [("32-true", 5, 3), ("32-true", 1, 1), ("64-true", 5, 1), ("bf16-mixed", 5, 1)],
)
def test_it_is_bitwise_the_loss_written_by_hand(precision: Any, samples: int, accumulate: int) -> None:
    options: dict[str, Any] = {"precision": precision, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    ours, theirs = Module(), ByHand()
    theirs.samples = samples
    fit(ours, injection(), Regularization({"vib": term(samples=samples)}), **options)
    fit(theirs, injection(train=["head"]), **options)
    renamed = {name.replace("net.4.", "head."): p for name, p in mine(ours).items()}
    assert renamed.keys() == mine(theirs).keys()
    assert any(name.startswith("head.prior_std") for name in renamed)
    for name, p in mine(theirs).items():
        assert torch.equal(renamed[name], p), name


def test_property_11_the_term_is_torchs_divergence_and_outputs_are_deterministic() -> None:
    module = Module()
    run = fit(module, injection(), Regularization({"vib": term(samples=1)}), max_steps=1)
    head = head_of(module)
    x = torch.randn(6, 8)
    module.eval()
    assert torch.equal(module.net(x), module.net(x))
    module.train()
    assert not torch.equal(module.net(x), module.net(x))
    head.heard = []
    module.net(x)
    (passed,) = head.heard
    head.heard = None
    mean, std = head.prior()
    wanted = kl_divergence(Normal(passed.mean, passed.std), Normal(mean, std)).sum(-1).mean()
    vib = term(samples=1)
    vib.before_adapters(module)
    vib.prepare(module, None, 1, 1)
    with vib.watching(module):
        module.net(x)
    torch.testing.assert_close(vib(module, None, torch.zeros(())) / 0.1, wanted, rtol=1e-5, atol=0)  # in epoch 2
    assert run.logged_metrics["vib/kl"] > 0
    assert run.logged_metrics["vib/beta"] == pytest.approx(0.05)


def test_a_mean_over_samples_is_trained_and_no_label_is_needed_for_one() -> None:
    class Squares(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.net(batch[0]).square().mean()}

    fit(Squares(), injection(), Regularization({"vib": term(samples=1)}), max_steps=2)
    own = term(loss=lambda logits, batch: logits.square().mean())
    fit(Squares(), injection(), Regularization({"vib": own}), max_steps=2)
    with pytest.raises(RuntimeError, match=r"returned a loss of .* their cross-entropy with the labels is .*samples=1"):
        fit(Squares(), injection(), Regularization({"vib": term()}), max_steps=2)


def test_beta_grows_by_epochs_or_as_it_is_told() -> None:
    found = []
    for options in ({"beta": 0.3}, {"beta": 0.3, "growth": "none"}, {"beta": lambda step, total: step / total}):
        vib = term(**options)
        seen: list[float] = []

        class Beta(Callback):
            def __init__(self, vib: VIB, seen: list[float]) -> None:
                self.vib, self.seen = vib, seen

            def on_train_epoch_end(self, *args: Any) -> None:
                self.seen.append(float(self.vib.figures()["beta"]))

        fit(Module(), Regularization({"vib": vib}), Beta(vib, seen), max_epochs=4, batches=1)
        found.append(seen)
    assert found[0] == pytest.approx([0.3, 0.6, 0.9, 1.0])
    assert found[1] == pytest.approx([0.3] * 4)
    assert found[2] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_a_beta_that_would_reward_the_divergence_is_refused_when_it_is_known() -> None:
    with pytest.raises(ValueError, match=r"beta is the weight of a divergence, at least 0 and finite. Got -0.1"):
        fit(Module(), Regularization({"vib": term(beta=lambda step, total: -0.1)}))


class StopAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise SystemExit


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_interrupted_is_uninterrupted(tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [injection(), Regularization({"vib": term()}), AdapterCheckpoint()]

    whole, stopped, resumed = Module(), Module(), Module()
    fit(whole, *callbacks())
    with pytest.raises(SystemExit):
        fit(stopped, *callbacks(), StopAt(5, tmp_path / "stop.ckpt"))
    run = trainer(*callbacks())
    run.fit(resumed, data(), ckpt_path=tmp_path / "stop.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert int(head_of(resumed).draws) == 12


def test_a_checkpoint_holds_the_bottleneck_and_loads_in_a_bare_script(tmp_path: Path) -> None:
    module = Module()
    run = fit(module, injection(), Regularization({"vib": term(samples=2)}), AdapterCheckpoint())
    run.save_checkpoint(tmp_path / "end.ckpt")
    x = torch.randn(5, 8)
    wanted = module.eval().net(x)
    before = torch.get_rng_state()
    loaded = Module()
    load(loaded, tmp_path / "end.ckpt")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loaded.eval().net(x), wanted)
    assert head_of(loaded).arguments() == head_of(module).arguments()
    assert mine(loaded).keys() == {n for n in mine(module) if not n.startswith("peft_terms")}
    inner = load(network(), tmp_path / "end.ckpt")
    assert torch.equal(inner.eval()(x), wanted)
    load(loaded, tmp_path / "end.ckpt")  # into the very same
    other = Module()
    term(features=5, samples=2).before_adapters(other)
    with pytest.raises(AdapterFileError, match=r"features=4.*, and this model the head .*features=5"):
        load(other, tmp_path / "end.ckpt")
    assert not any(isinstance(m, LoRA) for m in other.modules())
    narrow = Module()
    narrow.net[4] = nn.Linear(9, 3)
    old = narrow.net[4]
    with pytest.raises(AdapterFileError, match=r"'net.4.mlp.0.weight' has shape"):
        load(narrow, tmp_path / "end.ckpt")
    assert narrow.net[4] is old
    predicted = trainer(injection(), Regularization({"vib": term(samples=2)}), AdapterCheckpoint())
    again = predicted.predict(Module(), data(1), ckpt_path=tmp_path / "end.ckpt")
    assert again is not None
    assert torch.equal(again[0], module.eval().net(next(iter(data(1)))[0]))


def test_folded_it_is_plain_layers_of_the_same_outputs() -> None:
    module = Module()
    fit(module, injection(), Regularization({"vib": term()}))
    x = torch.randn(5, 8)
    wanted = module.eval().net(x)
    folded, merged = copy.deepcopy(module), copy.deepcopy(module)
    assert fold_heads(folded) == ("net.4",)
    assert torch.equal(folded.net(x), wanted)
    kinds = [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear, nn.Linear]
    assert [type(layer) for layer in folded.net[4].children()] == kinds
    assert all(p.requires_grad for p in folded.net[4].parameters())
    assert not [key for key in folded.state_dict() if "prior" in key or "std" in key]
    assert torch.equal(folded.train().net(x), wanted)  # nothing is drawn any more
    merge(merged)
    torch.testing.assert_close(merged.net(x), wanted)
    assert not head_modules(merged)
    eject(module)
    assert head_modules(module)  # trained beside adapters, it is not an adapter's to take out


def test_adapters_are_optional_and_the_term_comes_again() -> None:
    module = Module()
    fit(module, Regularization({"vib": term()}), max_steps=1)
    head = head_of(module)
    fit(module, Regularization({"vib": term()}), max_steps=2)
    assert head_of(module) is head
    with pytest.raises(ValueError, match=r"has a bottleneck already, with features=4, where this VIB has 6"):
        fit(module, Regularization({"vib": term(features=6)}), max_steps=3)


def test_a_module_that_was_injected_before_keeps_its_head_trained() -> None:
    module = Module()
    inject(module, ADAPTER)
    assert module.net[4].weight.requires_grad
    run = fit(module, injection(), Regularization({"vib": term()}), AdapterCheckpoint(), max_steps=2)
    module.requires_grad_(False)  # after training; what is saved is what was trained
    assert "net.4.prior_mean" in run._checkpoint_connector.dump_checkpoint()["state_dict"]


def bert(kind: Any = BertForSequenceClassification) -> nn.Module:
    config = {BertForSequenceClassification: BertConfig, RobertaForSequenceClassification: RobertaConfig}[kind]
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    model: nn.Module = kind(config(**{"vocab_size": 20, "num_labels": 3, **sizes}))
    return model


def test_heads_of_transformers_are_found() -> None:
    model = bert()
    term().before_adapters(model)
    assert isinstance(model.classifier, BottleneckHead)
    assert not [n for n in inject(model, ADAPTER).adapted if "classifier" in n]
    assert all(p.requires_grad for p in model.classifier.parameters())
    roberta = bert(RobertaForSequenceClassification)
    term().before_adapters(roberta)
    assert list(head_modules(roberta)) == ["classifier.out_proj"]
    assert "classifier.dense.weight" in find_head(roberta).trained
    inside = bert()
    term(head="pooler.dense").before_adapters(inside)
    assert not [n for n in inject(inside, ADAPTER).adapted if "pooler" in n]
    assert all(p.requires_grad for p in inside.bert.pooler.dense.parameters())
    assert all(p.requires_grad for p in inside.classifier.parameters())


def test_a_file_for_other_tools_is_refused_where_they_could_not_build_the_head(tmp_path: Path) -> None:
    model = bert().eval()
    term().before_adapters(model)
    inject(model, ADAPTER)
    with pytest.raises(ValueError, match=r"'classifier' is a BottleneckHead.*head=False"):
        to_hf_peft(model, tmp_path / "peft")
    with pytest.raises(ValueError, match=r"'classifier' is a BottleneckHead.*Call merge\(module\)"):
        save_merged(model, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"features": 0}, ValueError, "features of a bottleneck must be at least 1. Got 0"),
        ({"features": 2.5}, TypeError, "features must be an integer"),
        ({"samples": 0}, ValueError, "samples of a bottleneck must be at least 1"),
        ({"beta": -1.0}, ValueError, "beta is the weight of a divergence, at least 0 and finite. Got -1.0"),
        ({"growth": "cosine"}, ValueError, "growth='cosine': choose 'linear'"),
        ({"activation": "gelu"}, ValueError, "activation='gelu': choose 'relu', 'tanh', 'sigmoid'"),
        ({"head": 3}, TypeError, "head must be the name of one layer, or None. Got 3"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        VIB(**options)


@pytest.mark.parametrize(
    ("head", "error", "text"),
    [
        ("clasifier", ValueError, r"head='clasifier' matches no module of Module; the nearest linear layers are"),
        (r"net\.\d", ValueError, r"matches 5 modules, 'net.0', 'net.1', 'net.2'; name one of them"),
        ("net", TypeError, r"head='net' is a Sequential, and a linear layer is replaced. .*head='net.4'"),
        ("net.1", TypeError, r"head='net.1' is a Tanh, and a linear layer is replaced. Name an nn.Linear"),
    ],
)
def test_a_head_that_is_not_there_is_told(head: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fit(Module(), Regularization({"vib": term(head=head)}))


def test_what_cannot_be_trained_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"'net.4.prior_mean' of the bottleneck is frozen.*train=\['net.4'\]"):
        fit(Module(), injection(train=[]), Regularization({"vib": term()}))

    class Uncalled(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net[:4](batch[0]).mean()

    with pytest.raises(RuntimeError, match=r"training_step did not call the head 'net.4'"):
        fit(Uncalled(), Regularization({"vib": term()}))

    class Twice(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.net(batch[0]) + self.net(batch[0]), batch[1])

    with pytest.raises(RuntimeError, match=r"called the head 'net.4' 2 times.*samples=1"):
        fit(Twice(), Regularization({"vib": term()}))
    fit(Twice(), Regularization({"vib": term(samples=1)}), max_steps=1)
    with pytest.raises(RuntimeError, match=r"has no bottleneck: before_adapters\(module\) puts it in"):
        term().begin(Module())
    module = Module()
    term().before_adapters(module)
    with pytest.raises(RuntimeError, match=r"pooled features, \(N, 10\), and got \(2, 3, 10\)"):
        module.net[4](torch.randn(2, 3, 10))

    class Unlabelled(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch).square().mean()

    with pytest.raises(RuntimeError, match=r"the batch, a Tensor, has no integers under 'labels'"):
        trainer(Regularization({"vib": term()})).fit(Unlabelled(), DataLoader(torch.randn(8, 8), batch_size=4))  # type: ignore[arg-type]


def test_noise_is_of_all_processes_together() -> None:
    whole, mine = (replace_head(nn.Sequential(nn.Linear(8, 3)), "0", partial(BottleneckHead, features=4)) for _ in "ab")
    assert isinstance(whole, BottleneckHead)
    assert isinstance(mine, BottleneckHead)
    mine.rank, mine.world = 1, 2
    assert torch.equal(whole.noise(torch.zeros(6, 4))[:, 3:], mine.noise(torch.zeros(3, 4)))


def test_a_bottleneck_is_not_computed_again() -> None:
    from torch.utils.checkpoint import checkpoint

    head = BottleneckHead(nn.Linear(8, 3), features=4)
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"computed again in the backward pass by activation checkpointing"):
        checkpoint(head, x, use_reentrant=False).sum().backward()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"path": "net.9"}, "has a head in the place of 'net.9', no linear layer of this model"),
        ({"class": "torch.nn:Linear"}, "was made with the head class 'torch.nn:Linear', which is not imported"),
        ({"arguments": {"depth": 3}}, "gives BottleneckHead the argument 'depth', which it does not have"),
        ({"arguments": {"features": 10**7}}, "'net.4.prior_mean' has shape"),
        ({"arguments": {"features": 10**12}}, "asks for more memory at 'net.4' than there can be"),
        ({"arguments": []}, "its arguments is"),
    ],
)
def test_a_head_of_a_file_is_checked_before_it_is_built(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    run = fit(Module(), injection(), Regularization({"vib": term()}), AdapterCheckpoint(), max_steps=1)
    run.save_checkpoint(tmp_path / "some.ckpt")
    content = torch.load(tmp_path / "some.ckpt", weights_only=True)
    content[ENTRY]["recipe"]["heads"][0] |= change
    content[ENTRY]["digest"] = digest(content["state_dict"], content[ENTRY])
    torch.save(content, tmp_path / "some.ckpt")
    module = Module()
    with pytest.raises(AdapterFileError, match=text):
        load(module, tmp_path / "some.ckpt")
    assert type(module.net[4]) is nn.Linear
    assert not any(isinstance(m, LoRA) for m in module.modules())

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    Budget,
    Cubic,
    LoRA,
    Orthogonality,
    RankBudget,
    RankPolicy,
    RankPruning,
    Regularization,
    Taylor,
)
from lightning_peft.functional import pac_bayes as paper
from lightning_peft.functional.catoni import catoni, catoni_linear
from lightning_peft.functional.dziugaite_roy import dziugaite_roy
from lightning_peft.functional.pac_tuning import unbounded
from lightning_peft.regularizers.objectives import (
    FBBB,
    NAMED,
    Catoni,
    CatoniLinear,
    FClassic,
    FLambda,
    FQuad,
    Objective,
    Unbounded,
)
from lightning_peft.regularizers.pac_bayes import PACBayes
from lightning_peft.regularizers.posterior import Posterior
from lightning_peft.surgery import inject

ROWS = 24
Batch = dict[str, Tensor]


class Module(LightningModule):
    """A user's module: it returns its loss and its logits, and knows nothing of noise."""

    def __init__(self, reentrant: bool | None = None, lr: float = 0.01) -> None:
        super().__init__()
        self.reentrant, self.lr = reentrant, lr
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
            self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            hidden = self.body(x)
        else:
            hidden = checkpoint(self.body[:2], x.requires_grad_(), use_reentrant=self.reentrant)
            hidden = checkpoint(self.body[2:], hidden, use_reentrant=self.reentrant)
        logits: Tensor = self.head(hidden)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        logits = self(batch["x"])
        return {"loss": nn.functional.cross_entropy(logits, batch["labels"]), "logits": logits}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class ByHand(Module):
    """The same objective, written by somebody who does not know the callback."""

    def __init__(self, objective: Callable[..., Tensor], **options: Any) -> None:
        super().__init__(**options)
        injected(self)
        self.q = Posterior(self)
        self.objective = objective

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        with self.q.sampled(self):
            logits = self(batch["x"])
        with torch.autocast("cpu", enabled=False):
            risk = paper.bounded_cross_entropy(logits, batch["labels"]).mean()
            return self.objective(risk, self.q.kl(), ROWS)


def injected(module: Module) -> Module:
    torch.manual_seed(1)
    inject(module, partial(LoRA, rank=2), targets=["body.0", "body.2"], train=["head"])
    return module


def rows() -> list[Batch]:
    x = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
    return [{"x": row, "labels": (row.argmax() % 3).long()} for row in x]


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(rows(), **{"batch_size": 4, **options})  # type: ignore[arg-type]  # a list is a dataset


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fit(term: PACBayes, *callbacks: Callback, module: Module | None = None, data: Any = None, **options: Any) -> Module:
    module = injected(Module()) if module is None else module
    ckpt = options.pop("ckpt_path", None)
    trainer(Regularization({"pac": term}), *callbacks, **options).fit(
        module, loader() if data is None else data, ckpt_path=ckpt
    )
    return module


def precision(name: str) -> dict[str, Any]:
    if name == "16-mixed":  # Lightning has no string for it on a CPU
        return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]}
    return {"precision": name}


def trained(module: Module) -> dict[str, Tensor]:
    found = {name: p.detach() for name, p in module.named_parameters() if not name.startswith(("peft_terms", "q."))}
    (offset,) = (p.detach() for name, p in module.named_parameters() if name.endswith("offset"))
    return found | {"offset": offset}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", ["32-true", "bf16-mixed", "16-mixed", "64-true"])
def test_the_term_is_bitwise_the_objective_written_by_hand(name: str, clip: float | None, accumulate: int) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    if name == "64-true":
        data = DataLoader([{"x": r["x"].double(), "labels": r["labels"]} for r in rows()], batch_size=4)  # type: ignore[arg-type]
    else:
        data = loader()
    module = fit(PACBayes("f_quad"), data=data, **options, **precision(name))
    hand = ByHand(paper.f_quad)
    trainer(**options, **precision(name)).fit(hand, data)
    assert not same(trained(module), trained(hand))
    start = injected(Module())
    assert not torch.equal(module.body[0].A.float(), start.body[0].A)  # type: ignore[operator, union-attr]
    assert module.peft_terms["pac"].posterior.offset.abs().max() > 1e-3  # type: ignore[index, union-attr]


@pytest.mark.parametrize("risk", ["bounded_cross_entropy", "loss"])
def test_the_loss_itself_leaves_no_trace(risk: Any) -> None:
    """Its gradient is taken away exactly: one 1e6 times as large changes no bit, unless it is the risk."""

    class Louder(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            outputs = super().training_step(batch, batch_idx)
            return {**outputs, "loss": 1e6 * outputs["loss"]}

    plain = fit(PACBayes(risk=risk))
    loud = fit(PACBayes(risk=risk), module=injected(Louder()))
    assert bool(same(trained(plain), trained(loud))) == (risk == "loss")


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    plain = fit(PACBayes(sigma=0.1))
    again = fit(PACBayes(sigma=0.1), module=injected(Module(reentrant)))
    for name, value in trained(plain).items():
        torch.testing.assert_close(trained(again)[name], value, rtol=1e-4, atol=1e-6, msg=name)


# torch: its compiler looks at the gradient of whatever goes into a graph
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("unit", ["batch", "example"])
@pytest.mark.parametrize("what", ["the module", "its parts"])
def test_a_compiled_module_has_the_same_noise(what: str, unit: Any) -> None:
    """The noise is an input of the graph: compiled once for all steps, it is a new one at every step."""
    options: dict[str, Any] = {"sigma": 0.3, "unit": unit, "over": ["head.*"] if unit == "example" else None}
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = injected(Module())
    if what == "the module":
        fit(PACBayes(**options), module=torch.compile(compiled, backend=graphs))  # type: ignore[arg-type]
    else:
        compiled.body.compile(backend=graphs)
        compiled.head.compile(backend=graphs)
        fit(PACBayes(**options), module=compiled)
    assert 1 <= graphs.frame_count <= 4 < 2 * ROWS // 4  # not one for every step
    eager = trained(fit(PACBayes(**options)))
    other = trained(fit(PACBayes(**options, seed=1)))
    for name, value in trained(compiled).items():
        torch.testing.assert_close(value, eager[name], rtol=0, atol=1e-6, msg=name)
    assert max(float((eager[name] - other[name]).abs().max()) for name in eager) > 1e-3


def test_weights_are_the_same_bits_after_many_steps_at_rate_0() -> None:
    before = {n: p.detach().clone() for n, p in injected(Module()).named_parameters()}
    module = fit(PACBayes(sigma=0.3), module=injected(Module(lr=0.0)), max_epochs=10)
    after = {n: p.detach() for n, p in module.named_parameters() if not n.startswith("peft_terms")}
    assert not same(before, after)


class Hand(Objective):
    """Counts how the divergence reaches the gradient."""

    def forward(self, risk: Tensor, kl: Tensor, n: int, posterior: Posterior) -> Tensor:
        return kl


def test_accumulation_has_the_divergence_once_per_step() -> None:
    grads = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            grads.append(pl_module.peft_terms["pac"].posterior.offset.grad.clone())  # type: ignore[index, union-attr, operator]

    for accumulate in (1, 3):
        fit(PACBayes(Hand()), Look(), accumulate_grad_batches=accumulate, max_steps=1)
    torch.testing.assert_close(*grads)


CASES: dict[str, tuple[Any, Callable[[Tensor, Tensor, Posterior], Tensor], str]] = {
    "f_classic": ("f_classic", lambda r, k, q: paper.f_classic(r, k, ROWS), "fixed"),
    "f_quad": (FQuad(0.05), lambda r, k, q: paper.f_quad(r, k, ROWS, 0.05), "fixed"),
    "f_kl": ("f_kl", lambda r, k, q: paper.f_kl(r, k, ROWS), "fixed"),
    "f_lambda": (
        FLambda("learned"), lambda r, k, q: paper.f_lambda(r, k, ROWS, t=paper.learnt_t(torch.tensor(6.0), ROWS)),
        "fixed",
    ),
    "f_lambda best": (FLambda("best"), lambda r, k, q: paper.f_quad(r, k, ROWS), "fixed"),
    "f_lambda number": (FLambda(0.5), lambda r, k, q: paper.f_lambda(r, k, ROWS, t=0.5), "fixed"),
    "f_bbb": (FBBB(0.3), lambda r, k, q: r + 0.3 * k / ROWS, "fixed"),
    "dziugaite_roy": (
        "dziugaite_roy", lambda r, k, q: dziugaite_roy(r, k, ROWS, prior_sigma=torch.tensor(0.1)), "learned",
    ),
    "catoni": (Catoni([1.0, 2.0]), lambda r, k, q: catoni(r, k, ROWS, a=[1.0, 2.0]), "fixed"),
    "catoni_linear": (CatoniLinear(30.0), lambda r, k, q: catoni_linear(r, k, ROWS, t=30.0), "fixed"),
    "unbounded": (Unbounded(0.2, 5.0), lambda r, k, q: unbounded(r, k, ROWS, K=0.2, gamma=5.0), "fixed"),
    "per tensor": (FClassic(), lambda r, k, q: paper.f_classic(r, k + q.prior_cost(), ROWS), "per_tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_objectives(case: str) -> None:
    given, wanted, prior = CASES[case]
    module = injected(Module())
    with torch.no_grad():
        module.head.weight.add_(0.0)
    term = PACBayes(copy.deepcopy(given), prior=prior, examples=ROWS)  # type: ignore[arg-type]
    term.attach(module)
    with torch.no_grad():
        module.head.weight.add_(0.05)
    batch = next(iter(loader(batch_size=ROWS)))
    outputs = module.training_step(batch, 0)
    value = term(module, batch, outputs) + outputs["loss"]
    q = term.posterior
    assert q is not None
    risk = paper.bounded_cross_entropy(outputs["logits"], batch["labels"]).mean()
    torch.testing.assert_close(value, wanted(risk, q.kl(), q).to(value), rtol=1e-5, atol=1e-6)
    value.backward()
    learnt = dict(term.named_parameters())
    assert all(p.grad is not None and bool(p.grad.any()) for p in learnt.values()), learnt
    assert "objective.offset" not in learnt or case == "f_lambda"
    assert ("posterior.prior_offset" in learnt) == (prior != "fixed")


def test_every_name_is_an_objective() -> None:
    for name, kind in NAMED.items():
        assert type(PACBayes(name).objective) is kind  # type: ignore[arg-type]


def test_what_is_logged(tmp_path: Path) -> None:
    module = fit(PACBayes("f_quad"), logger=CSVLogger(tmp_path), max_epochs=1)
    (file,) = tmp_path.rglob("metrics.csv")
    header, *lines = file.read_text().splitlines()
    first = dict(zip(header.split(","), lines[0].split(","), strict=True))
    assert {
        "pac/kl",
        "pac/kl_per_example",
        "pac/risk",
        "pac/sigma",
        "pac/bound",
        "loss/pac",
        "loss/task",
    } <= first.keys()
    start = injected(Module())
    kl = Posterior(start).kl().item()
    assert float(first["pac/kl"]) == pytest.approx(kl, rel=1e-5)
    assert float(first["pac/kl_per_example"]) == pytest.approx(kl / ROWS, rel=1e-5)
    assert float(first["pac/sigma"]) == pytest.approx(0.01, rel=1e-5)
    bound = paper.f_quad(float(first["pac/risk"]), kl, ROWS).item()
    assert float(first["pac/bound"]) == pytest.approx(bound, rel=1e-5)
    assert float(first["loss/pac"]) + float(first["loss/task"]) == pytest.approx(bound, rel=1e-5)
    assert module.peft_terms["pac"].examples == ROWS  # type: ignore[index, union-attr]


def with_dropout() -> Module:
    module = injected(Module())
    module.body[3] = nn.Dropout(0.1)
    return module


@pytest.mark.parametrize(
    ("options", "module"),
    [
        ({"objective": "f_bbb"}, None),
        ({"risk": "loss"}, None),
        ({"risk": lambda module, batch, outputs: outputs["loss"].clamp(max=1)}, None),
        ({"kl_weight": 0.5}, None),
        ({"over": ["head"]}, None),
        ({}, with_dropout),
    ],
)
def test_what_is_no_bound_is_not_called_one(options: Any, module: Any) -> None:
    term = PACBayes(**options)
    fit(term, module=None if module is None else module(), max_epochs=1)
    assert "objective" in term.figures()
    assert "bound" not in term.figures()


def test_the_weight_of_the_divergence_follows_its_schedule() -> None:
    seen: list[tuple[int, int]] = []

    def schedule(step: int, total: int) -> float:
        seen.append((step, total))
        return 0.0 if step < 3 else 1.0

    term = PACBayes("f_bbb", kl_weight=schedule, sigma=0.01)
    module = fit(term, max_epochs=1)
    assert seen == [(step, 6) for step in range(1, 7)]
    without = fit(PACBayes("f_bbb", kl_weight=0.0), max_epochs=1)
    always = fit(PACBayes("f_bbb"), max_epochs=1)
    offsets = [each.peft_terms["pac"].posterior.offset.mean().item() for each in (without, module, always)]  # type: ignore[index, union-attr]
    assert offsets[0] < offsets[1] < offsets[2]  # the divergence widens sigma, towards the prior's


@pytest.mark.parametrize("unit", ["step", "batch", "example"])
def test_units_of_noise(unit: Any) -> None:
    class Look(Module):
        seen: list[Tensor]

        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            self.seen.append(self.body[0].A.detach().clone())  # type: ignore[operator, union-attr]
            return super().training_step(batch, batch_idx)

    module = injected(Look())
    module.seen = []  # type: ignore[attr-defined]
    fit(PACBayes(unit=unit), module=module, accumulate_grad_batches=2, max_epochs=2)
    noise = module.seen  # type: ignore[attr-defined]
    assert len(noise) == 12
    module = injected(Look(lr=0.0))
    module.seen = []  # type: ignore[attr-defined]
    fit(PACBayes(unit=unit), module=module, accumulate_grad_batches=2, max_epochs=2)
    distinct = {tuple(each.flatten().tolist()) for each in module.seen}  # type: ignore[attr-defined]
    assert len(distinct) == (6 if unit == "step" else 12)


def test_validation_is_at_the_mean() -> None:
    class Validated(Module):
        outputs: list[Tensor]

        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            self.outputs.append(self(batch["x"]))

    module = injected(Validated())
    module.outputs = []  # type: ignore[attr-defined]
    run = trainer(Regularization({"pac": PACBayes(sigma=0.5)}), max_epochs=1)
    run.fit(module, loader(), loader(batch_size=ROWS))
    wanted = module(next(iter(loader(batch_size=ROWS)))["x"])
    assert torch.equal(module.outputs[-1], wanted)  # type: ignore[attr-defined]
    run.validate(module, loader(batch_size=ROWS), verbose=False)
    assert torch.equal(module.outputs[-1], wanted)  # type: ignore[attr-defined]


def test_other_terms_see_the_mean() -> None:
    class Look(Orthogonality):
        def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
            assert isinstance(module.body[0].A, nn.Parameter)  # type: ignore[index, union-attr]
            return super().forward(module, batch, outputs)

    terms = {"pac": PACBayes(sigma=0.5), "orthogonality": Look()}
    trainer(Regularization(terms), max_epochs=1).fit(injected(Module()), loader())


class StopAt(Callback):
    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batch:
            trainer.save_checkpoint(self.path)
            raise SystemExit


@pytest.mark.parametrize("unit", ["step", "batch"])
@pytest.mark.parametrize("stop", [1, 5, 6, 9])
def test_interrupted_is_uninterrupted(stop: int, unit: Any, tmp_path: Path) -> None:
    def run(*callbacks: Callback, **options: Any) -> dict[str, Tensor]:
        injection = AdapterInjection(partial(LoRA, rank=2), ["body.0", "body.2"], ["head"], verbose=False)
        torch.manual_seed(2)
        module = Module()
        regularization = Regularization({"pac": PACBayes(FLambda(), prior="per_tensor", unit=unit)})
        run = trainer(injection, regularization, AdapterCheckpoint(), *callbacks, accumulate_grad_batches=2)
        run.fit(module, loader(shuffle=True), **options)
        return module.state_dict() | {
            f"{i}.{key}": torch.as_tensor(value)
            for i, entry in run.optimizers[0].state_dict()["state"].items()
            for key, value in entry.items()
        }

    with pytest.raises(SystemExit):
        run(StopAt(stop, tmp_path / "stop.ckpt"))
    assert not same(run(ckpt_path=tmp_path / "stop.ckpt"), run())


def test_a_second_model_begins_anew() -> None:
    term = PACBayes(FLambda("learned"))
    fit(term)
    first = term.posterior
    once = [p.detach().clone() for p in term.parameters()]
    module = injected(Module())
    fit(term, module=module)
    assert term.posterior is not first
    for one, again in zip(once, term.parameters(), strict=True):  # draws begin anew, too
        assert torch.equal(one, again)
    # again on the same module: what was learnt stays
    second = term.posterior
    fit(term, module=module)
    assert term.posterior is second


def test_closed_components_stay_in_q_and_are_not_cut() -> None:
    def pruned(compact: Any) -> Module:
        pruning = RankPruning(RankPolicy(Cubic(0.1, 0.3), Taylor(), Budget(rank=1), interval=2), compact)
        term = PACBayes("f_quad")
        module = injected(Module())
        trainer(pruning, Regularization({"pac": term}), max_epochs=2).fit(module, loader())
        assert term.posterior is not None
        assert term.posterior.names == Posterior(injected(Module())).names
        return module

    module = pruned("never")
    closed = [~site.gate.open() for site in RankBudget.of(module).values()]
    assert any(bool(each.any()) for each in closed)
    with pytest.raises(MisconfigurationException, match="the term 'pac' has a posterior over all of them"):
        pruned("final")


@pytest.mark.parametrize("epochs", [-1, 1])
def test_every_fit_counts_its_own_examples(epochs: int) -> None:
    """Also where steps are counted and no epochs, so that Lightning asks for the data later."""
    term, data = PACBayes(), loader()
    fit(term, data=data, max_steps=1, max_epochs=epochs)
    assert term.examples == ROWS
    fit(term, data=DataLoader(rows()[:-3], batch_size=4), max_steps=1, max_epochs=epochs)
    assert term.examples == ROWS - 3
    given = PACBayes(examples=99)
    fit(given, data=data, max_steps=1, max_epochs=epochs)
    assert given.examples == 99


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(rows())


class OnlyLoss(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)["loss"]


@pytest.mark.parametrize(
    ("act", "error", "sentence"),
    [
        (lambda: fit(PACBayes(), data=DataLoader(Stream(), batch_size=4), max_steps=2), MisconfigurationException,
         "a term needs the number of training examples, and the training set, a Stream, has no length. Give it"),
        (lambda: fit(PACBayes(), data=loader(sampler=WeightedRandomSampler([1.0] * ROWS, ROWS))),
         MisconfigurationException, "WeightedRandomSampler may leave examples out or weigh them"),
        (lambda: fit(PACBayes(), data=[loader(), loader()]), MisconfigurationException,
         "there are 2 training dataloaders"),
        (lambda: fit(PACBayes(), module=injected(OnlyLoss())), RuntimeError,
         "a bounded risk is computed from logits, and training_step returned none"),
        (lambda: fit(PACBayes(over=["head"], complete=True)), RuntimeError,
         "'body.0.A' and 3 more is trained and not in Q, so a certificate could not count it"),
        (lambda: fit(PACBayes("dziugaite_roy")), ValueError, "dziugaite_roy pays for a learnt lambda"),
        (lambda: fit(PACBayes(risk=lambda m, b, o: o["logits"])), RuntimeError,
         r"risk must give a scalar tensor for a batch. Got a tensor of shape \(4, 3\)"),
        (lambda: PACBayes("f_cubic"), ValueError, "objective='f_cubic': choose 'f_classic', 'f_quad'"),  # type: ignore[arg-type]
        (lambda: PACBayes(FBBB), TypeError, r"Got the class FBBB: write FBBB\(...\)."),  # type: ignore[arg-type]
        (lambda: PACBayes(risk="accuracy"), ValueError, "risk='accuracy': choose 'bounded_cross_entropy'"),  # type: ignore[arg-type]
        (lambda: PACBayes(p_min=0.0), ValueError, "p_min must lie strictly between 0 and 1"),
        (lambda: PACBayes(examples=1), ValueError, "examples is how many the training set has, at least 2. Got 1."),
        (lambda: PACBayes(unit="token"), ValueError, "unit='token': choose 'step', 'batch' or 'example'."),  # type: ignore[arg-type]
        (lambda: PACBayes(kl_weight=-1), ValueError, "kl_weight multiplies a divergence and is not negative. Got -1."),
        (lambda: PACBayes(streams="one"), ValueError, "streams='one': choose 'apart' or 'alike'."),  # type: ignore[arg-type]
        (lambda: PACBayes(sigma=0.0), ValueError, "sigma is a standard deviation, a positive number"),
        (lambda: FBBB(2.0), ValueError, r"eta must lie in \(0, 1\]. Got 2.0."),
        (lambda: FLambda(2.0), ValueError, "t=2.0: it lies strictly between 0 and 2."),
        (lambda: FLambda(speed=-1.0), ValueError, "speed multiplies the learning rate of t, and is not"),
        (lambda: Unbounded(0.0), ValueError, "K must be a positive number. Got 0.0."),
        (lambda: Catoni(-1.0), ValueError, "a must be a positive number or several. Got -1.0."),
        (lambda: CatoniLinear(0.0), ValueError, "t must be a positive number. Got 0.0."),
        (lambda: FQuad(1.0), ValueError, "delta must lie strictly between 0 and 1"),
    ],
)  # fmt: skip
def test_mistakes_are_named(act: Callable[[], object], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        act()


def test_labels_that_are_not_there_are_named() -> None:
    term = PACBayes(examples=ROWS)
    module = injected(Module())
    term.attach(module)
    outputs = {"loss": torch.zeros(()), "logits": torch.zeros(2, 3)}
    with pytest.raises(RuntimeError, match="the batch, a Tensor, has no integers under 'labels' nor for the second"):
        term(module, torch.zeros(2), outputs)
    term(module, (torch.zeros(2), torch.zeros(2, dtype=torch.int64)), outputs)


def test_the_next_token_is_the_label_of_the_one_before() -> None:
    term = PACBayes(risk="bounded_next_token", examples=ROWS)
    module = injected(Module())
    term.attach(module)
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    term(module, {"labels": labels}, {"loss": torch.zeros(()), "logits": logits})
    wanted = paper.bounded_cross_entropy(logits[:, :-1], labels[:, 1:]).mean()
    assert torch.equal(term.figures()["risk"], wanted)

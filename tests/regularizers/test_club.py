from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_peft import CLUB, AdapterInjection, CategoricalCLUB, LoRA, Regularization, Regularizer


class Encoder(LightningModule):
    """Sees x = (signal, nuisance) and is asked for the signal; z is what it makes of both."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder, self.head = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)), nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.head(self.encoder(batch["x"]))
        return {"loss": F.cross_entropy(logits, batch["labels"]), "logits": logits}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


def dataset(count: int = 512) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels, domain = torch.randint(2, (2, count), generator=generator)
    x = torch.randn(count, 4, generator=generator)
    x[:, 0] += 3.0 * labels
    x[:, 1] += 3.0 * domain
    return [{"x": x[i], "labels": labels[i], "domain": domain[i]} for i in range(count)]


def fit(term: Regularizer | None, module: LightningModule | None = None, **options: Any) -> tuple[Any, Trainer]:
    module = Encoder() if module is None else module
    settings: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "max_epochs": 1,
    }  # fmt: skip
    callbacks = [] if term is None else [Regularization({"club": term})]
    run = Trainer(callbacks=[*options.pop("first", []), *callbacks], **{**settings, **options})
    torch.manual_seed(1)
    run.fit(module, DataLoader(dataset(), batch_size=64))  # type: ignore[arg-type]
    return module, run


categorical = partial(CategoricalCLUB, layer="encoder.2", label="domain", classes=2, hidden=16)
gaussian = partial(CLUB, layer="encoder.2", given=lambda batch: batch["x"], given_features=4, hidden=16)


def begun(term: Any) -> tuple[Encoder, Any]:
    """A term in a plain loop: (module, a step that gives the term's value)."""
    module = Encoder()
    term.attach(module)
    term.begin(module)
    batch = {key: torch.stack([row[key] for row in dataset(64)]) for key in ("x", "labels", "domain")}

    def step() -> Tensor:
        with term.watching(module):
            outputs = module.training_step(batch, 0)
        value: Tensor = term(module, batch, outputs)
        return value

    return module, step


def test_the_gaussian_term_is_its_formula() -> None:
    for negatives in ("all", "sample"):
        term = gaussian(negatives=negatives)
        module, step = begun(term)
        for _ in range(5):
            value = step()
        x = torch.stack([row["x"] for row in dataset(64)])
        z = module.encoder(x)
        mean, log_variance = term.q(x)
        assert log_variance.abs().max() < 1

        def log_q(i: int, j: int) -> Tensor:
            q = torch.distributions.Normal(mean[i], (log_variance[i] / 2).exp())  # noqa: B023
            return q.log_prob(z[j]).sum()  # noqa: B023

        twin = gaussian(negatives=negatives)
        twin.draws = 4  # one for each step before
        others = torch.randperm(64, generator=twin.next_generator())
        joint = torch.stack([log_q(i, i) for i in range(64)]).mean()
        pairs = [(i, j) for i in range(64) for j in range(64)]
        if negatives == "sample":
            pairs = [(i, int(others[i])) for i in range(64)]
        wanted = joint - torch.stack([log_q(i, j) for i, j in pairs]).mean()
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
        assert term.draws == (5 if negatives == "sample" else 0)


def test_the_categorical_term_is_its_formula() -> None:
    term = categorical()
    module, step = begun(term)
    for _ in range(5):
        value = step()
    rows = dataset(64)
    log_q = term.q(module.encoder(torch.stack([row["x"] for row in rows]))).log_softmax(1)
    y = torch.stack([row["domain"] for row in rows])
    every = torch.stack([log_q[:, label] for label in y], 1)
    torch.testing.assert_close(value, every.diagonal().mean() - every.mean(), rtol=1e-5, atol=1e-5)


def test_labels_are_looked_at_once_a_step() -> None:
    class Waits(TorchDispatchMode):
        """Counts what has to wait for the device."""

        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten.aminmax.default
            return func(*args, **(kwargs or {}))

    _, step = begun(categorical(inner_steps=3))
    with Waits() as waits:
        step()
    assert waits.count == 1


@pytest.mark.parametrize("make", [gaussian, categorical, partial(gaussian, negatives="sample")])
def test_property_15_q_and_encoder_leave_each_other_alone(make: Callable[[], Any]) -> None:
    term = make()
    module, step = begun(term)
    start = copy.deepcopy(term.q.state_dict())
    value = step()
    assert all(p.grad is None for p in module.parameters())  # the q step
    assert any(not torch.equal(start[key], p) for key, p in term.q.state_dict().items())
    fitted = copy.deepcopy(term.q.state_dict())
    value.backward()
    assert all(p.grad is None for p in term.parameters())  # the model's
    assert all(torch.equal(fitted[key], p) for key, p in term.q.state_dict().items())
    assert module.encoder[0].weight.grad is not None
    assert module.head.weight.grad is None


def test_a_model_is_made_invariant_to_a_nuisance_label() -> None:
    """How well the best linear guess finds the domain in z, after training: with the term, hardly at all."""
    found = {}
    for name, term in (("without", None), ("with", categorical(1.0, inner_steps=3, lr=0.03))):
        module, _ = fit(term, max_epochs=25)
        rows = dataset()
        x, y, domain = (torch.stack([row[key] for row in rows]) for key in ("x", "labels", "domain"))
        with torch.no_grad():
            z = module.encoder(x)
            design = torch.cat([z, torch.ones(len(z), 1)], 1)
            guess = design @ torch.linalg.lstsq(design, 2.0 * domain[:, None] - 1).solution
            found[name] = float(((guess[:, 0] > 0) == domain.bool()).float().mean())
            right = float((module.head(z).argmax(1) == y).float().mean())
        assert right > 0.9
    assert found["without"] > 0.75  # of x the best guess is right in 0.93
    assert found["with"] < 0.62  # and a coin in 0.5


def test_widths_are_read_from_the_layers_or_said() -> None:
    term = CLUB(layer=r"encoder\.2", given=r"encoder\.0", hidden=16)
    module, step = begun(term)
    assert [p.shape[1] for p in (term.q.mean[0].weight, term.q.log_variance[0].weight)] == [8, 8]
    assert term.q.mean[2].out_features == 4
    step().backward()
    assert module.encoder[0].weight.grad is not None
    second = CLUB(layer="encoder", given="head", features=4, given_features=2)
    second.attach(module)
    assert second.q.mean[2].out_features == 4


def test_under_the_callback_with_adapters_and_figures() -> None:
    adapters = AdapterInjection(partial(LoRA, rank=2), targets=["encoder.0", "encoder.2"], verbose=False)
    term = categorical(0.05)
    module, run = fit(term, first=[adapters])
    assert {"loss/club", "club/fit"} <= run.logged_metrics.keys()
    assert not any(child._forward_hooks for child in module.modules())
    assert "training_step" not in vars(module)


def test_no_random_numbers_but_its_own() -> None:
    term = gaussian(negatives="sample")
    _, step = begun(term)
    state = torch.get_rng_state()
    first, second = step(), step()
    assert torch.equal(torch.get_rng_state(), state)
    assert term.draws == 2
    assert first != second


def test_what_is_read_of_the_batch_may_be_of_another_precision() -> None:
    """A column of a table is often float64, and a model of 64 bits may be given float32."""
    values = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        term = gaussian(given=lambda batch, dtype=dtype: batch["x"].bfloat16().to(dtype))
        torch.manual_seed(0)
        _, step = begun(term)
        values.append(float(step().detach()))
        assert term.q.mean[0].weight.dtype == torch.float32
    assert values[0] == values[1] == values[2]
    _, step = begun(term)
    term.double()
    assert step().dtype == torch.float64


NAMES: dict[str, Any] = {"layer": "encoder.2", "given": lambda batch: batch["x"], "given_features": 4}
LABEL: dict[str, Any] = {"layer": "encoder.2", "label": "domain", "classes": 2}


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (
            lambda: CLUB(-0.1, **NAMES),
            ValueError,
            "CLUB is an upper bound, so it can be made less .* Got -0.1;",
        ),
        (lambda: CLUB(float("nan"), **NAMES), ValueError, "its weight is finite and not negative. Got nan;"),
        (lambda: CLUB(float("inf"), **NAMES), ValueError, "its weight is finite and not negative. Got inf;"),
        (lambda: CLUB("x", **NAMES), TypeError, "weight must be a number. Got 'x'."),
        (lambda: fit(CLUB(lambda step, total: -1.0, **NAMES)), ValueError, "is finite and not negative. Got -1.0;"),
        (lambda: CLUB(layer="head", given="encoder.2", given_features=-1), ValueError, "must be at least 1. Got -1."),
        (lambda: CLUB(**NAMES, lr=float("nan")), ValueError, "lr must be positive and finite. Got nan."),
        (
            lambda: CLUB(**NAMES, inner_steps=0),
            ValueError,
            "inner_steps=0: CLUB says something of",
        ),
        (lambda: CLUB(**{**NAMES, "given_features": None}), ValueError, "given_features=<columns>. Got None."),
        (
            lambda: CLUB(**{**NAMES, "given": 3}),
            TypeError,
            "given names a layer, or is a function .* Got 3.",
        ),
        (lambda: CLUB(**{**NAMES, "layer": ["a"]}), TypeError, r"layer names one layer, .* Got \['a'\]."),
        (lambda: CLUB(**NAMES, hidden=0), ValueError, "hidden must be at least 1. Got 0."),
        (lambda: CLUB(**NAMES, negatives="two"), ValueError, "negatives='two': choose 'all' pairs or one 'sample'"),
        (lambda: CLUB(**NAMES, pool="max"), ValueError, "pool='max': choose 'mean', 'first' or 'last'."),
        (lambda: CategoricalCLUB(**{**LABEL, "classes": 1}), ValueError, "classes is how many labels .* Got 1."),
        (lambda: CategoricalCLUB(**{**LABEL, "label": 2}), TypeError, "label is a key of the batch, .* Got 2."),
        (lambda: fit(CLUB(**{**NAMES, "layer": "neck"})), ValueError, "layer='neck' matches no layer of Encoder"),
        (lambda: fit(CLUB(**{**NAMES, "layer": "encoder.1"})), ValueError, "'encoder.1' is a Tanh, which does not say"),
        (lambda: fit(CLUB(layer="head", given="head")), ValueError, "layer and given both name 'head', which has all"),
        (lambda: fit(CLUB(**{**NAMES, "given": lambda b: b["domain"]})), RuntimeError, r"given must give .* \(64,\)"),
        (
            lambda: fit(CLUB(**{**NAMES, "given": lambda b: b["x"][:, :1]})),
            RuntimeError,
            "given is 1 wide, and q was made for 4: say given_features=1.",
        ),
        (
            lambda: fit(CLUB(**NAMES, features=3)),
            RuntimeError,
            "'encoder.2' is 4 wide, and q was made for 3: say features=4.",
        ),
        (
            lambda: fit(CategoricalCLUB(**LABEL, features=3)),
            RuntimeError,
            "'encoder.2' is 4 wide, and q was made for 3: say features=4.",
        ),
        (
            lambda: fit(CategoricalCLUB(**{**LABEL, "label": lambda b: b["domain"] - 100 * b["labels"]})),
            RuntimeError,
            "nuisance labels go from 0 to 1, as classes=2 says. Got -100: ",
        ),
        (
            lambda: fit(CategoricalCLUB(**{**LABEL, "label": lambda b: b["domain"] + 1})),
            RuntimeError,
            "nuisance labels go from 0 to 1, as classes=2 says. Got 2: ",
        ),
        (lambda: fit(CategoricalCLUB(**{**LABEL, "label": "speaker"})), RuntimeError, "the batch has no 'speaker'; it"),
        (
            lambda: fit(CategoricalCLUB(**{**LABEL, "label": lambda b: b["x"]})),
            RuntimeError,
            r"must be \(N,\) integers",
        ),
    ],
)
def test_what_cannot_work_says_so(make: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_one_example_is_too_few() -> None:
    term = categorical()
    run = Trainer(
        callbacks=[Regularization({"club": term})], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="CategoricalCLUB compares examples with one another, and this step has 1"):
        run.fit(Encoder(), DataLoader(dataset(9), batch_size=4))  # type: ignore[arg-type]

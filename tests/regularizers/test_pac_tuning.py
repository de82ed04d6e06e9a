from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PACBayes, Regularization, inject
from lightning_peft.callbacks.moments import MomentEstimation
from lightning_peft.functional import blob, pac_tuning
from lightning_peft.regularizers.blob import BLoB
from lightning_peft.regularizers.pac_tuning import PACTuning
from lightning_peft.regularizers.posterior import Posterior

ROWS = 16


class Module(LightningModule):
    """Returns its loss; with `logits` those too."""

    def __init__(self, logits: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.logits = logits
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3))
            inject(self.net, partial(LoRA, rank=2), ["0"], ["3"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        logits = self.net(batch["x"])
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        return {"loss": loss, "logits": logits} if self.logits else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


def data() -> list[dict[str, Tensor]]:
    x = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(0))
    return [{"x": row, "labels": (row.argmax() % 3).long()} for row in x]


def term(**options: Any) -> PACBayes:
    return PACBayes(PACTuning(**options), risk="loss", prior="per_tensor", sigma=0.05, prior_sigma=0.05)


def fit(term: PACBayes, *callbacks: Callback, module: Module | None = None, **options: Any) -> Module:
    module = Module() if module is None else module
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Regularization({"term": term}), *callbacks],
        **{"max_epochs": 5, **options},
    )  # fmt: skip
    trainer.fit(module, DataLoader(data(), batch_size=8))  # type: ignore[arg-type]
    return module


def test_the_constants_are_those_of_losses_drawn_by_hand() -> None:
    bound = term()
    fit(bound, MomentEstimation(draws=3, examples=ROWS, seed=4), max_steps=1)
    objective = bound.objective
    assert isinstance(objective, PACTuning)
    assert objective.is_measured
    module = Module()
    posterior = Posterior(module)
    batch = {key: torch.stack([row[key] for row in data()]) for key in ("x", "labels")}
    for width, constant in zip(pac_tuning.PRIOR_SIGMAS, objective.constants, strict=True):
        generator = torch.Generator().manual_seed(4)
        losses = []
        for _ in range(3):
            flat = torch.randn(posterior.offset.numel(), generator=generator)
            drawn = Module()
            own = dict(drawn.named_parameters())
            with torch.no_grad():
                sizes = [own[name].numel() for name in posterior.names]
                for name, eps in zip(posterior.names, flat.split(sizes), strict=True):
                    own[name].add_(width * eps.view_as(own[name]))
                losses.append(nn.functional.cross_entropy(drawn.net(batch["x"]), batch["labels"], reduction="none"))
        wanted = pac_tuning.moment_constant(torch.stack(losses), [10.0])
        torch.testing.assert_close(constant, wanted.float(), rtol=1e-4, atol=1e-6)
    assert objective.constants[-1] > 2 * objective.constants[0]  # wider, farther apart


def test_constants_that_are_no_numbers_are_told() -> None:
    objective = PACTuning()
    losses = torch.rand(8, 2, 4, generator=torch.Generator().manual_seed(0))
    losses[7, 0, 0] = torch.inf
    widest = f"{pac_tuning.PRIOR_SIGMAS[-1]:.3g}"
    with pytest.raises(FloatingPointError, match=rf"K is no number for weights drawn at a width of {widest}: losses"):
        objective.measured(losses)
    assert not objective.is_measured


def test_losses_of_examples_come_from_logits_or_one_by_one() -> None:
    found = []
    for logits in (False, True):
        bound = term()
        fit(bound, MomentEstimation(draws=2, examples=5), module=Module(logits), max_steps=1)
        found.append(bound.objective.constants)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_to_measure_leaves_no_trace() -> None:
    def weights(*callbacks: Callback) -> list[Tensor]:
        bound = term(stage2=0.9)
        bound.objective.measured(torch.rand(8, 2, 4, generator=torch.Generator().manual_seed(0)))  # type: ignore[operator]
        torch.manual_seed(3)
        return list(fit(bound, *callbacks, module=Module(dropout=0.3)).parameters())

    class Again(MomentEstimation):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            objective = pl_module.peft_terms["term"].objective  # type: ignore[index,union-attr]
            before = objective.constants.clone()  # type: ignore[union-attr,operator]
            objective.constants.fill_(torch.nan)  # type: ignore[union-attr,operator]
            objective._known = False  # type: ignore[union-attr]
            super().on_train_start(trainer, pl_module)
            assert not torch.equal(objective.constants, before)  # type: ignore[union-attr,arg-type]
            objective.constants.copy_(before)  # type: ignore[union-attr,operator]

    for plain, looked in zip(weights(), weights(Again(draws=2, examples=4)), strict=True):
        assert torch.equal(plain, looked)


def test_in_the_second_stage_noise_rests_and_weights_go_on() -> None:
    seen: list[tuple[Tensor, Tensor, float]] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            bound = pl_module.peft_terms["term"]  # type: ignore[index,union-attr]
            q, figures = bound.posterior, bound.figures()  # type: ignore[union-attr,operator]
            difference = float(figures["objective"] - figures["risk"])
            scales = torch.cat([q.offset.detach(), q.prior_offset.detach()])  # type: ignore[union-attr,operator]
            seen.append((scales, pl_module.net[0].A.detach().clone(), difference))  # type: ignore[index,union-attr,operator]

    fit(term(stage2=0.4), MomentEstimation(draws=2, examples=8), Look())
    assert len(seen) == 10
    rested = [torch.equal(a[0], b[0]) for a, b in itertools.pairwise(seen)]
    assert rested == [False] * 5 + [True] * 4
    assert not any(torch.equal(a[1], b[1]) for a, b in itertools.pairwise(seen))
    assert [step[2] > 0.01 for step in seen] == [True] * 6 + [False] * 4
    assert [step[2] for step in seen[6:]] == [0.0] * 4


def test_the_first_stage_is_the_papers_sum() -> None:
    module, bound = Module(), term()
    objective = bound.objective
    assert isinstance(objective, PACTuning)
    objective.measured(torch.rand(8, 2, 4, generator=torch.Generator().manual_seed(0)))
    bound.examples = ROWS
    bound.attach(module)
    q = bound.posterior
    assert q is not None
    objective.prepare(1, 10)
    value = objective(torch.tensor(0.7), q.kl(), ROWS, q)
    K = pac_tuning.interpolated(torch.tensor(0.05), objective.widths, objective.constants)
    wanted = 0.7 + (q.kl() + 10 + 3 * len(q.names)) / (10 * ROWS) + 1.5 * 10 * K**2
    torch.testing.assert_close(value, wanted)


def test_gamma_is_the_best_one_between_its_limits() -> None:
    module, bound = Module(), term(gamma=(5.0, 500.0))
    objective = bound.objective
    assert isinstance(objective, PACTuning)
    assert objective.gammas == pytest.approx([5 * 100 ** (i / 4) for i in range(5)])
    objective.measured(0.1 * torch.rand(8, 2, 4, generator=torch.Generator().manual_seed(0)))
    bound.attach(module)
    q = bound.posterior
    assert q is not None
    K = pac_tuning.interpolated(torch.tensor(0.05), objective.widths, objective.constants)
    best = pac_tuning.best_gamma(q.kl(), ROWS, K, union=3.0 * len(q.names))
    assert 5 < best.item() < 500
    value = objective(torch.tensor(0.7), q.kl(), ROWS, q)
    torch.testing.assert_close(value, pac_tuning.unbounded(0.7, q.kl(), ROWS, K=K, union=3.0 * len(q.names)).to(value))


def test_blob_is_its_sum() -> None:
    module = Module()
    bound = PACBayes(BLoB(batch_size=4), risk="loss", prior_sigma=0.2, prior_mean="zero", over=["A"])
    bound.attach(module)
    q = bound.posterior
    assert q is not None
    assert q.names == ("net.0.A",)
    assert not q.prior_mean.any()
    k = module.net[0].A.numel()  # type: ignore[union-attr,operator]
    A = module.net[0].A.detach()  # type: ignore[union-attr,operator]
    kl = 0.5 * (k * (0.01**2 / 0.04 - 1 + 2 * math.log(20)) + float(A.square().sum()) / 0.04)
    assert q.kl().item() == pytest.approx(kl, rel=1e-5)
    cycle = blob.kl_cycle(ROWS, 4)
    for step in (1, 2, cycle, cycle + 1):
        bound.objective.prepare(step, 0)  # type: ignore[operator]
        value = bound.objective(torch.tensor(0.7), q.kl(), ROWS, q)
        assert value.item() == pytest.approx(0.7 + blob.kl_weight(step - 1, cycle) * kl / 4, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: PACTuning(stage2=1.0), ValueError, "stage2 is a share of the run, at least 0 and below 1. Got 1.0."),
        (lambda: PACTuning(gamma=(5.0, 1.0)), ValueError, "gamma is the least and the largest that it may be"),
        (lambda: MomentEstimation(draws=0), ValueError, "draws must be at least 1. Got 0."),
        (lambda: MomentEstimation(examples=1), ValueError, "examples must be at least 2. Got 1."),
        (lambda: BLoB(batch_size=0), ValueError, "batch_size must be positive. Got 0."),
    ],
)
def test_mistakes_are_named(make: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        make()

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft.functional.risk_bounds import certified_risk
from lightning_peft.metrics import PACBayesBound
from lightning_peft.testing.processes import run_processes


def batches(seed: int, sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(size, generator=generator) < 0.2).float() for size in sizes]


def counted(metric: PACBayesBound, losses: list[Tensor], kl: float = 5.0) -> float:
    for batch in losses:
        metric.update(batch, kl)
    return float(metric.compute())


def test_the_bound_is_that_of_all_losses_together() -> None:
    losses = batches(0, (32, 32, 32, 4))
    mean = float(torch.cat(losses).double().mean())
    assert counted(PACBayesBound(), losses) == certified_risk(mean, 100 / 32, 5.0, 100)[1]
    assert counted(PACBayesBound(unit="example"), losses) == certified_risk(mean, 100, 5.0, 100)[1]
    assert counted(PACBayesBound(delta=0.1, delta_prime=0.2, tried=3), losses) == pytest.approx(
        certified_risk(mean, 100 / 32, 5.0, 100, 0.1, 0.2, tried=3)[1]
    )
    assert counted(PACBayesBound(), [batch.bool() for batch in losses]) == certified_risk(mean, 100 / 32, 5.0, 100)[1]


def test_passes_add_draws_and_not_examples() -> None:
    losses = batches(1, (25, 25)) * 8
    mean = float(torch.cat(losses).double().mean())
    assert counted(PACBayesBound(examples=50), losses) == certified_risk(mean, 16, 5.0, 50)[1]
    # Before the first pass is over, what was seen is a sample of its own.
    mean = float(losses[0].double().mean())
    assert counted(PACBayesBound(examples=50), losses[:1]) == certified_risk(mean, 1, 5.0, 25)[1]


def test_the_bound_is_not_rounded_to_single_precision() -> None:
    metric = PACBayesBound()
    metric.update(torch.zeros(10), torch.tensor(2.0))
    assert metric.compute().dtype == torch.float64
    metric.update(torch.full((7,), 0.1), torch.tensor(1.0))  # an older, larger divergence stays
    mean = float(torch.full((7,), 0.1).double().sum() / 17)
    assert float(metric.compute()) == certified_risk(mean, 1.7, 2.0, 17)[1]


def test_forward_gives_the_bound_of_the_batch_and_keeps_the_sum() -> None:
    losses, metric = batches(2, (30, 20)), PACBayesBound()
    found = [float(metric(batch, 1.0)) for batch in losses]
    assert found == [certified_risk(float(batch.double().mean()), 1, 1.0, len(batch))[1] for batch in losses]
    assert float(metric.compute()) == counted(PACBayesBound(), losses, kl=1.0)
    metric.reset()
    metric.update(torch.empty(0), 1.0)
    with pytest.raises(RuntimeError, match=re.escape("has counted no losses; call update(losses, kl) before compute")):
        metric.compute()


def test_what_cannot_be_certified_is_refused() -> None:
    metric = PACBayesBound()
    with pytest.raises(ValueError, match=re.escape("losses must be (batch,), one number in [0, 1] for each. Got ()")):
        metric.update(torch.tensor(0.5), 1.0)
    for losses in (torch.tensor([0.5, 2.5]), torch.tensor([-0.5, 1.0]), torch.tensor([torch.nan, 1.0])):
        metric.reset()
        metric.update(losses, 1.0)
        with pytest.raises(ValueError, match=re.escape("losses must lie in [0, 1]: 0-1 errors, or bounded_cross_ent")):
            metric.compute()
    with pytest.raises(RuntimeError, match=re.escape("PACBayesBound(examples=5) has counted 6 losses, which are no w")):
        counted(PACBayesBound(examples=5), [torch.zeros(6)])
    with pytest.raises(ValueError, match="unit must be 'batch' or 'example'. Got 'pass'."):
        PACBayesBound(unit="pass")
    with pytest.raises(ValueError, match="delta must lie strictly between 0 and 1. Got 2"):
        PACBayesBound(delta=2)
    with pytest.raises(ValueError, match="n must be at least 1. Got 0."):
        PACBayesBound(examples=0)


class Validated(LightningModule):
    """Logs the bound of errors that are the data, as a user's module would."""

    def __init__(self) -> None:
        super().__init__()
        self.bound = PACBayesBound()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.bound.update(batch, 3.0)
        self.log("bound", self.bound)


def test_lightning_logs_it() -> None:
    losses = torch.cat(batches(3, (60,)))
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, barebones=False)
    loader = DataLoader(losses, batch_size=20)  # type: ignore[arg-type]
    found = trainer.validate(Validated(), loader, verbose=False)[0]["bound"]
    assert found == pytest.approx(certified_risk(float(losses.double().mean()), 3, 3.0, 60)[1], rel=1e-6)


def _of_one_process(losses: list[Tensor]) -> tuple[float, float]:
    dist.init_process_group("gloo")
    metric, rank = PACBayesBound(examples=27), dist.get_rank()
    together = counted(metric, losses[rank::2], kl=4.0 + rank)
    return together, float(metric.total)


@pytest.mark.dist
def test_processes_count_together() -> None:
    losses = batches(4, (8, 8, 8, 3))
    alone = counted(PACBayesBound(), losses, kl=5.0)
    (first, one), (second, two) = run_processes(2, _of_one_process, losses)
    assert first == second == alone
    assert one + two == float(torch.cat(losses).sum())  # the local sums are left as they were


def _of_a_padding_sampler(examples: int | None) -> str:
    dist.init_process_group("gloo")
    data = list(torch.zeros(27))
    loader = DataLoader(data, 7, sampler=DistributedSampler(data, shuffle=False))  # type: ignore[arg-type]
    try:
        return f"{counted(PACBayesBound(examples), list(loader)):.3f}"
    except RuntimeError as error:
        return str(error)


@pytest.mark.dist
@pytest.mark.parametrize("examples", [None, 27])
def test_examples_that_a_sampler_repeats_are_not_counted(examples: int | None) -> None:
    """27 for two processes: 14 each. The losses do not say that one was seen twice, unless their number is known."""
    first, second = run_processes(2, _of_a_padding_sampler, examples)
    assert first == second
    if examples is None:
        assert first.startswith(
            "PACBayesBound has counted 28 losses on 2 processes, and cannot tell how many of them a "
        )
        assert first.endswith("Give the number of examples: PACBayesBound(examples=...).")
    else:
        assert first.startswith("PACBayesBound(examples=27) has counted 28 losses, which are no whole passes over them")

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.functional.mutual_information import (
    ESTIMATORS,
    dv_surrogate,
    estimate,
    info_nce,
    jsd,
    log_mean_exp_off_diagonal,
    next_log_moving,
)
from lightning_peft.metrics import (
    ActiveUnits,
    AggregateMutualInformation,
    BatchMutualInformation,
    ImportanceWeightedNLL,
    MutualInformation,
    PriorDivergence,
)
from lightning_peft.metrics.mutual_information import inner_products
from lightning_peft.regularizers.critics import ConcatCritic
from lightning_peft.testing.processes import run_processes

NAMES = ("dv", "nwj", "jsd", "info_nce", "smile")


def features(n: int, seed: int, d: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, n, d, generator=generator)
    return x, x + noise


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_value_is_that_of_one_matrix_of_all_pairs(name: str, chunk: int) -> None:
    x, z = features(30, 0)
    metric = MutualInformation(name, tau=2.0, chunk=chunk)
    for some, others in zip(x.split(13), z.split(13), strict=True):
        metric.update(some, others)
    found = metric.compute()
    assert list(found) == [f"mi/{name}", f"mi/{name}_n", f"mi/{name}_ceiling"]
    scores = x.double() @ z.double().T
    torch.testing.assert_close(found[f"mi/{name}"], estimate(name, scores, tau=2.0), atol=1e-5, rtol=1e-5)
    assert float(found[f"mi/{name}_n"]) == 30
    assert float(found[f"mi/{name}_ceiling"]) == ESTIMATORS[name].ceiling(30)


def test_forward_gives_the_value_of_the_batch_and_keeps_the_features() -> None:
    x, z = features(24, 7)
    metric = MutualInformation("info_nce")
    for some, others in zip(x.split(8), z.split(8), strict=True):
        batch = metric(some, others)
        assert float(batch["mi/info_nce"]) == pytest.approx(float(estimate("info_nce", some @ others.T)), abs=1e-5)
        assert float(batch["mi/info_nce_n"]) == 8
    assert float(metric.compute()["mi/info_nce"]) == pytest.approx(float(estimate("info_nce", x @ z.T)), abs=1e-5)


def test_a_critic_scores_pairs_as_it_is_at_the_end_and_belongs_to_the_model() -> None:
    critic = nn.Bilinear(3, 3, 1, bias=False)

    def scored(x: Tensor, z: Tensor) -> Tensor:
        pairs: Tensor = critic(x[:, None].expand(-1, len(z), -1).contiguous(), z.expand(len(x), -1, -1).contiguous())
        return pairs.squeeze(-1)

    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.critic = critic

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return scored(x, z)

    module = Scored()
    metric = MutualInformation("nwj", module, name="critic")
    assert not list(metric.parameters())
    assert not metric.state_dict()
    x, z = features(20, 1)
    metric.update(x, z)
    with torch.no_grad():
        critic.weight.copy_(torch.eye(3).unsqueeze(0))
    expected = estimate("nwj", (x @ z.T).double())
    torch.testing.assert_close(metric.compute()["critic"], expected, atol=1e-5, rtol=1e-5)
    assert not metric.compute()["critic"].requires_grad
    holder = nn.ModuleDict({"critic": module, "metric": metric})
    copied = copy.deepcopy(holder)
    assert copied["metric"].critic is copied["critic"]  # a copy of a model measures with its own critic


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_pooled_and_not_averaged(name: str) -> None:
    matrices = [inner_products(*features(n, seed)).double() for seed, n in enumerate((8, 8, 5))]
    metric = BatchMutualInformation(name, tau=2.0)
    for scores in matrices:
        metric.update(scores)
    found = metric.compute()
    if name == "info_nce":
        expected = sum(len(s) * float(estimate(name, s)) for s in matrices) / 21
        assert float(found["mi/info_nce_ceiling"]) == pytest.approx((16 * math.log(8) + 5 * math.log(5)) / 21)
    else:
        marginal = torch.cat([s[~torch.eye(len(s), dtype=torch.bool)] for s in matrices])
        joint = torch.cat([s.diagonal() for s in matrices]).mean()
        mean_exp = (marginal.clamp(-2, 2) if name == "smile" else marginal).exp().mean()
        expected = float(1 + joint - mean_exp if name in ("nwj", "jsd") else joint - mean_exp.log())
        assert float(found[f"mi/{name}_ceiling"]) == math.inf
    assert float(found[f"mi/{name}"]) == pytest.approx(expected)
    assert float(found[f"mi/{name}_n"]) == 21
    metric.reset()
    metric.update(matrices[0])
    assert float(metric.compute()[f"mi/{name}"]) == pytest.approx(float(estimate(name, matrices[0], tau=2.0)))


@pytest.mark.parametrize("name", ["dv", "info_nce", "smile"])
def test_property_9_learnt_critics_find_the_information(name: str) -> None:
    """One pair of correlation 0.8; 300 steps on fresh batches of 64, measured on 20 fresh sets of 512."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)

    def pairs(n: int) -> tuple[Tensor, Tensor]:
        x, noise = torch.randn(2, n, 1, generator=generator)
        return x, 0.8 * x + 0.6 * noise

    critic = ConcatCritic(1, 1, hidden=16)
    optimizer = torch.optim.Adam(critic.parameters(), lr=5e-3)
    log_moving = torch.tensor(-math.inf)
    for _ in range(300):
        scores = critic(*pairs(64))
        if name == "dv":
            log_moving = next_log_moving(log_moving, scores)
            value = dv_surrogate(scores, log_moving)
        else:
            value = info_nce(scores) if name == "info_nce" else jsd(scores)
        optimizer.zero_grad()
        (-value).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    metric, found = MutualInformation(name, critic, chunk=512), []
    for _ in range(20):
        metric.update(*pairs(512))
        found.append(float(metric.compute()[f"mi/{name}"]))
        metric.reset()
    assert sum(found) / 20 == pytest.approx(-math.log(0.6), abs=0.06)  # 0.511


def test_low_precision_features_are_scored_in_float32() -> None:
    x, z = (of.bfloat16() for of in features(16, 4))
    metric = MutualInformation("dv")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(x, z)
        found = metric.compute()["mi/dv"]
    torch.testing.assert_close(found, estimate("dv", (x.float() @ z.float().T)).double(), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(ValueError, match="No estimator of scores is named 'mine'; there are dv, nwj, jsd, info_nce, s"):
        MutualInformation("mine")
    for metric in (MutualInformation, BatchMutualInformation):
        with pytest.raises(ValueError, match="club is a loose upper bound, several times the information even with th"):
            metric("club")
        with pytest.raises(
            ValueError, match="tau must be positive, the largest score of a marginal sample; inf is pla"
        ):
            metric("smile", tau=0)
    with pytest.raises(ValueError, match="chunk must be at least 1, the rows and columns of a block of pairs. Got 0."):
        MutualInformation(chunk=0)
    x, z = features(4, 0)
    with pytest.raises(ValueError, match=re.escape("x and z must have a row for each example. Got (4, 3) and (3, 3).")):
        MutualInformation().update(x, z[:3])
    alone = MutualInformation()
    alone.update(x[:1], z[:1])
    with pytest.raises(RuntimeError, match=re.escape("needs at least 2 examples; call update(x, z) before compute()")):
        alone.compute()
    flat = MutualInformation(critic=lambda x, z: (x * z).sum(1))
    flat.update(x, z)
    with pytest.raises(ValueError, match=re.escape("critic must score every pair of 4 x and 4 z: (4, 4). Got (4,).")):
        flat.compute()
    with pytest.raises(ValueError, match=re.escape("scores must be (N, N)")):
        BatchMutualInformation().update(torch.zeros(3, 4))


class Measured(LightningModule):
    """Logs what the metrics report, as a user's module would."""

    def __init__(self) -> None:
        super().__init__()
        self.information = MutualInformation("info_nce")
        self.units = ActiveUnits()
        self.weight = nn.Parameter(torch.zeros(()))

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.information.update(batch[0], batch[1])
        self.units.update(batch[0])

    def on_validation_epoch_end(self) -> None:
        self.log_dict({**self.information.compute(), **self.units.compute()})


def test_lightning_logs_value_and_count() -> None:
    x, z = features(20, 5)
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    found = trainer.validate(Measured(), DataLoader(TensorDataset(x, z), batch_size=8), verbose=False)[0]
    assert found == pytest.approx(
        {
            "mi/info_nce": float(estimate("info_nce", x @ z.T)),
            "mi/info_nce_n": 20,
            "mi/info_nce_ceiling": math.log(20),
            "au": 3,
            "au_n": 20,
        }
    )


def all_metrics(x: Tensor, z: Tensor) -> dict[str, float]:
    """Everything that is reported of these examples, as of this process."""
    found: dict[str, Tensor] = {}
    for name in NAMES:
        metric = MutualInformation(name, chunk=6)
        metric.update(x, z)
        found |= metric.compute()
        pooled = BatchMutualInformation(name, name=f"batch/{name}")
        for some, others in zip(x.split(4), z.split(4), strict=True):
            pooled.update(some @ others.T)
        found |= pooled.compute()
    aggregate, units, kl, nll = (
        AggregateMutualInformation(chunk=5),
        ActiveUnits(),
        PriorDivergence(),
        ImportanceWeightedNLL(),
    )
    aggregate.update(x, x / 4, z)
    units.update(torch.cat([x, x[:, :1] / 100], 1))
    kl.update(x, z.exp())
    nll.update(x, z, tokens=len(x))
    found |= aggregate.compute() | units.compute() | kl.compute() | nll.compute()
    return {key: float(value) for key, value in found.items()}


def _of_one_process(x: Tensor, z: Tensor) -> dict[str, float]:
    dist.init_process_group("gloo")
    own = slice(0, 12) if dist.get_rank() == 0 else slice(12, 20)
    return all_metrics(x[own], z[own])


@pytest.mark.dist
def test_two_processes_report_the_whole_set() -> None:
    """Unequal shares; and not what a mean of the processes' own values would be."""
    x, z = (of.double() for of in features(20, 6))
    alone = all_metrics(x, z)
    first, second = run_processes(2, _of_one_process, x, z)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-12)
    assert alone["mi/dv_n"] == alone["mi/aggregate_n"] == alone["nll_n"] == alone["ppl_n"] == alone["kl_n"] == 20
    mean = (12 * all_metrics(x[:12], z[:12])["mi/dv"] + 8 * all_metrics(x[12:], z[12:])["mi/dv"]) / 20
    assert abs(mean - alone["mi/dv"]) > 0.01


def test_pooled_batches_are_one_log_mean_exp() -> None:
    scores = torch.full((4, 4), 900.0) + torch.eye(4)
    metric = BatchMutualInformation("dv")
    for _ in range(3):
        metric.update(scores)
    torch.testing.assert_close(metric.compute()["mi/dv"], torch.tensor(1.0, dtype=torch.float64))
    assert float(log_mean_exp_off_diagonal(scores)) == pytest.approx(900)

"""Counting errors of drawn networks: by hand, in one process or as several would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_peft.certification.bound_set import BoundSet
from lightning_peft.certification.counting import count, errors, generator, read_logits, total
from lightning_peft.regularizers.posterior import Posterior

N, BATCH = 22, 4


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def data() -> BoundSet:
    g = torch.Generator().manual_seed(1)
    return BoundSet(TensorDataset(torch.randn(N, 3, generator=g), torch.randint(0, 3, (N,), generator=g)), BATCH)


def counted(module: nn.Module, posterior: Any, process: tuple[int, int] = (0, 1), **settings: Any) -> list[Any]:
    asked = {"passes": 3, "unit": "batch", "seed": 7, "p_min": 1e-4, **settings}
    return list(count(lambda b: (module(b[0]), b[1]), posterior, module, data(), process=process, **asked))


@pytest.mark.parametrize("unit", ["pass", "batch", "example"])
def test_counts_are_those_of_networks_drawn_by_hand(unit: Any) -> None:
    module = net()
    posterior = Posterior(module, sigma=0.5)
    found = counted(module, posterior, unit=unit)
    assert len(found) == 3 * 6
    dataset, cpu = data().dataset, torch.device("cpu")
    mean = [p.detach().clone() for p in module.parameters()]
    for each in found:
        k, i = each.index
        x, y = dataset[range(i * BATCH, min(N, (i + 1) * BATCH))]
        noise = generator(cpu, 7, k) if unit == "pass" else generator(cpu, 7, k, i)
        options = {"unit": "example", "examples": len(x)} if unit == "example" else {}
        with posterior.sampled(module, noise, **options), torch.no_grad():
            logits = module(x)
        assert each.errors == float((logits.argmax(1) != y).sum())
        loss = F.cross_entropy(logits, y, reduction="none").clamp(max=9.210340371976182).sum() / 9.210340371976182
        assert each.cross_entropy == pytest.approx(float(loss), abs=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(mean, module.parameters(), strict=True))
    rates = {unit: total(found)[0] / (3 * N)}
    assert 0 < rates[unit] < 1
    if unit == "pass":
        return
    assert len({tuple(each.errors for each in found if each.index[0] == k) for k in range(3)}) > 1  # noise is fresh


@pytest.mark.parametrize("unit", ["pass", "batch", "example"])
@pytest.mark.parametrize("world", [2, 4, 7])
def test_several_processes_count_what_one_counts(unit: Any, world: int) -> None:
    module = net()
    posterior = Posterior(module, sigma=0.5)
    alone = counted(module, posterior, unit=unit)
    parts = [counted(module, posterior, (rank, world), unit=unit) for rank in range(world)]
    together = [each for part in parts for each in part]
    assert sorted(together, key=lambda each: each.index) == alone
    assert total(together) == total(alone)
    with pytest.raises(RuntimeError, match="counted twice"):
        total([*alone, alone[0]])


def test_every_process_runs_as_many_forwards() -> None:
    module = net()
    posterior = Posterior(module)
    for rank in range(4):  # six batches for four processes: two rounds
        calls: list[int] = []
        module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        counted(module, posterior, (rank, 4), passes=1)
        assert len(calls) == 2


def test_the_seed_decides_and_the_callers_random_numbers_do_not() -> None:
    module = net()
    posterior = Posterior(module, sigma=0.5)
    state = torch.get_rng_state()
    first = counted(module, posterior)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert counted(module, posterior) == first
    assert counted(module, posterior, seed=8) != first


def test_errors_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    assert errors(logits, torch.tensor([0, 1, 0, 0])).tolist() == [0, 1, 1, 1]
    places = torch.tensor([[[1.0, 0], [0, 1.0], [1.0, 0]], [[1.0, 0], [1.0, 0], [1.0, 0]]])
    labels = torch.tensor([[0, 0, -100], [0, 0, 0]])
    assert errors(places, labels).tolist() == [0.5, 0]
    with pytest.raises(ValueError, match="has no label"):
        errors(logits[:1], torch.tensor([-100]))
    with pytest.raises(ValueError, match=r"logits of shape \(4, 2\) do not fit labels of shape \(3,\)"):
        errors(logits, torch.tensor([0, 1, 1]))


class Output(dict[str, Tensor]):
    pass


@pytest.mark.parametrize(
    ("batch", "output", "says"),
    [
        ({"labels": torch.ones(2), "x": 1}, torch.ones(2, 3), None),
        ((torch.ones(2, 3), torch.ones(2)), Output(logits=torch.ones(2, 3)), None),
        ({"x": 1}, torch.ones(2, 3), "dictionary of x, in which there is no telling what the labels are"),
        (torch.ones(2), torch.ones(2, 3), "a batch is a Tensor"),
        ((torch.ones(2, 3), torch.ones(2)), "text", "returns a str without `logits`"),
        ({"labels": torch.ones(2, 4)}, torch.ones(2, 4, 3), "at its own place or at the next"),
    ],
)
def test_what_a_batch_is_read_as(batch: Any, output: Any, says: str | None) -> None:
    class Net(nn.Module):
        def forward(self, x: Any) -> Any:
            return output

    if says is None:
        logits, labels = read_logits(Net(), batch)
        assert logits.shape == (2, 3)
        assert labels.shape == (2,)
    else:
        with pytest.raises(ValueError, match=says):
            read_logits(Net(), batch)

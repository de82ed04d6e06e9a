from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft.functional.club import categorical_log_densities, club, club_sample
from lightning_peft.functional.gaussian import gaussian_log_densities, gaussian_log_density


def pairs(n: int, d: int, rho: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, noise = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def densities(x: Tensor, z: Tensor, rho: float) -> Tensor:
    """The exact q(z | x)."""
    return gaussian_log_densities(rho * x, torch.full_like(x, math.log(1 - rho**2)), z)


def test_property_1_club_of_correlated_gaussians_is_what_theory_says() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [club(densities(*pairs(128, 4, 0.8, generator), 0.8)) for _ in range(50)]
    theory = 4 * 0.8**2 / (1 - 0.8**2)
    assert theory == pytest.approx(7.111, abs=1e-3)
    assert float(torch.stack(values).mean()) == pytest.approx(theory, abs=0.3)


def test_property_2_club_of_independent_variables_is_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    values = [club(densities(*pairs(128, 4, 0.0, generator), 0.0)) for _ in range(50)]
    assert float(torch.stack(values).mean()) == pytest.approx(0, abs=0.03)


def test_property_4_club_is_unchanged_by_the_order_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(2)
    x, z = pairs(20, 2, 0.5, generator)
    order = torch.randperm(20, generator=generator)
    torch.testing.assert_close(club(densities(x[order], z[order], 0.5)), club(densities(x, z, 0.5)))


def test_club_sample_is_club_over_all_permutations() -> None:
    x, z = pairs(4, 2, 0.6, torch.Generator().manual_seed(3))
    log_densities = densities(x, z, 0.6)
    every = [torch.tensor(order) for order in itertools.permutations(range(4))]
    mean = torch.stack([club_sample(log_densities, order) for order in every]).mean()
    torch.testing.assert_close(mean, club(log_densities))
    # what needs no matrix
    log_variance = torch.full_like(x, math.log(1 - 0.6**2))
    joint, other = (gaussian_log_density(0.6 * x, log_variance, of) for of in (z, z[every[9]]))
    torch.testing.assert_close(club_sample(log_densities, every[9]), (joint - other).mean())


def test_categorical_densities_are_those_of_labels() -> None:
    generator = torch.Generator().manual_seed(4)
    logits, labels = torch.randn(6, 3, generator=generator), torch.randint(3, (6,), generator=generator)
    found = categorical_log_densities(logits, labels)
    torch.testing.assert_close(-found.diagonal().mean(), nn.functional.cross_entropy(logits, labels))
    for i, j in itertools.product(range(6), repeat=2):
        assert float(found[i, j]) == pytest.approx(float(logits[i].log_softmax(0)[labels[j]]))
    assert categorical_log_densities(logits.bfloat16(), labels).dtype == torch.float32
    assert torch.autograd.gradcheck(
        lambda of: club(categorical_log_densities(of, labels)), (logits.double().requires_grad_(),)
    )
    # With all of the label in x, and a q that knows it, CLUB is at least the label's entropy.
    known, of = torch.eye(4).repeat(16, 1), torch.arange(4).repeat(16)
    assert float(club(categorical_log_densities(20 * known, of))) > math.log(4)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_no_tensor_holds_every_unit_of_every_pair() -> None:
    x, z = torch.randn(2, 40, 24).unbind()
    x.requires_grad_()
    with Largest() as largest:
        club(gaussian_log_densities(x, torch.zeros_like(x), z)).backward()  # type: ignore[no-untyped-call]
        club(categorical_log_densities(x, torch.arange(40) % 24)).backward()  # type: ignore[no-untyped-call]
    assert largest.numbers == 40 * 40


def test_property_15_q_and_encoder_are_trained_apart() -> None:
    """The likelihood of detached pairs moves q alone; CLUB with q frozen moves the encoder alone."""
    torch.manual_seed(0)
    encoder, q = nn.Linear(3, 2), nn.Linear(3, 4)
    x = torch.randn(16, 3)
    z = encoder(x)
    mean, log_variance = q(x).chunk(2, 1)
    (-gaussian_log_density(mean, log_variance.tanh(), z.detach()).mean()).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in encoder.parameters())
    assert all(p.grad.abs().sum() > 0 for p in q.parameters())
    before = [p.grad.clone() for p in q.parameters()]
    q.requires_grad_(False)
    mean, log_variance = q(x).chunk(2, 1)
    club(gaussian_log_densities(mean, log_variance.tanh(), z)).backward()  # type: ignore[no-untyped-call]
    assert all(torch.equal(p.grad, old) for p, old in zip(q.parameters(), before, strict=True))
    assert encoder.weight.grad.abs().sum() > 0


def test_what_is_no_matrix_of_densities_is_refused() -> None:
    for bad in (torch.zeros(3, 4), torch.zeros(1, 1), torch.zeros(3)):
        with pytest.raises(
            ValueError, match=re.escape("log_densities must be (N, N) of at least 2 samples, with [i, j]")
        ):
            club(bad)
        with pytest.raises(ValueError, match=re.escape("log_densities must be (N, N) of at least 2 samples")):
            club_sample(bad, torch.arange(3))
    with pytest.raises(ValueError, match=re.escape("permutation must have one entry for each of 3 samples. Got (4,).")):
        club_sample(torch.zeros(3, 3), torch.arange(4))
    with pytest.raises(
        ValueError, match=re.escape("logits must be (N, K), and labels (M,) integers. Got (3,), and (3,)")
    ):
        categorical_log_densities(torch.zeros(3), torch.zeros(3, dtype=torch.long))

"""The critic of a Gaussian posterior: it starts at nothing, has the log ratio in reach, and its gradient informs."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_peft import ConcatCritic
from lightning_peft.functional.latent import aggregate_mutual_information
from lightning_peft.functional.mutual_information import dv, dv_surrogate
from lightning_peft.modules import GaussianCritic
from lightning_peft.regularizers.critics import CriticFactory


def test_scores_are_the_log_ratio_by_hand() -> None:
    torch.manual_seed(0)
    critic, x, z = GaussianCritic(4, 3), torch.randn(5, 4), torch.randn(6, 3)
    assert torch.equal(critic(x, z), torch.zeros(5, 6))
    for parameter in critic.parameters():
        torch.nn.init.normal_(parameter)
    posterior = torch.distributions.Normal(critic.mean(x)[:, None], (critic.log_v / 2).exp())
    aggregate = torch.distributions.Normal(critic.c, (critic.log_u / 2).exp())
    expected = posterior.log_prob(z).sum(-1) - aggregate.log_prob(z).sum(-1)
    torch.testing.assert_close(critic(x, z), expected, rtol=1e-4, atol=1e-4)


def learnt(make: CriticFactory, steps: int) -> tuple[float, float]:
    """A critic's estimate on fresh pairs, and the cosine of its gradient with the information's own.

    4 units of 16 features, means of variance 0.05: the information of a posterior that has nearly collapsed.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = draw(16, 4) * (0.05 / 16) ** 0.5
    torch.manual_seed(0)
    critic = make(16, 4)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
    for _ in range(steps):
        x = draw(32, 16)
        optimizer.zero_grad()
        scores = critic(x, x @ weight + draw(32, 4))
        (-dv_surrogate(scores, torch.zeros(()))).backward()
        torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        optimizer.step()
    x = draw(256, 16)
    mean = (x @ weight).requires_grad_()
    true, found = torch.zeros_like(mean), torch.zeros_like(mean)
    value = 0.0
    for _ in range(50):  # one draw's gradient of the aggregate is all noise
        z = mean + draw(256, 4)
        true += torch.autograd.grad(
            aggregate_mutual_information(mean, torch.zeros_like(z), z), mean, retain_graph=True
        )[0]
        scores = critic(x, z)
        found += torch.autograd.grad(dv(scores), mean, retain_graph=True)[0]
        value += float(dv(scores).detach()) / 50
    return value, float(torch.nn.functional.cosine_similarity(true.flatten(), found.flatten(), dim=0))


def test_it_sees_little_information_sooner_than_a_network() -> None:
    (estimate, cosine), (later, worse) = (
        learnt(make, steps=200) for make in (GaussianCritic, partial(ConcatCritic, hidden=32))
    )
    assert estimate == pytest.approx(2 * math.log(1.05), abs=0.03)  # what there is
    assert later < 0.06
    assert cosine > 0.77 > worse

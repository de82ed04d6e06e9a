"""What the laws of importances and policies are tried on: a small net with adapters, trained as RankPruning would."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import AdapterFactory
from lightning_peft.adapters.dynamic_dora import DynamicDoRA
from lightning_peft.rank.budget import Budget, RankBudget
from lightning_peft.rank.importance import Importance
from lightning_peft.rank.policy import Policy
from lightning_peft.surgery.injection import inject

ADAPTER: AdapterFactory = partial(DynamicDoRA, rank=4, dropout=0.0)
"""Adapters that the laws of importances and policies use if none is given: with a gain, so removal may be soft."""
TOTAL = 20
"""Optimizer steps of a run."""
FINAL = Budget(rank=2)


def net(adapter: AdapterFactory) -> nn.Module:
    """Three adapted layers, two of one shape, and a trained head; the same at every call, moved off its start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host = nn.Sequential(
            nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)
        )
        inject(host, adapter, targets=["0", "2", "4"], train=["6"])
        with torch.no_grad():
            for site in RankBudget.of(host).values():
                for _, parameter in site.adapter.own_parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return host


class Run:
    """Training of a net while an importance watches.

    Args:
        host: the net.
        importance: watches if it is tracked; ``None`` for training alone.
    """

    def __init__(self, host: nn.Module, importance: Importance | None = None) -> None:
        self.host = host
        self.importance = importance
        self.optimizer = torch.optim.AdamW([p for p in host.parameters() if p.requires_grad], lr=0.01)

    @property
    def budget(self) -> RankBudget:
        """The net's gates as they are now."""
        return RankBudget.of(self.host)

    def backward(self, number: int) -> None:
        """Gradients of one batch, which the number of the step decides."""
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(number))
        loss = (self.host(x) - x.sum(1, keepdim=True).sin()).square().mean()
        self.optimizer.zero_grad()
        loss.backward()

    def step(self, number: int) -> None:
        """One step of training."""
        self.update(number)

    def update(self, number: int, observe: bool = True) -> None:
        """One optimizer step, and the importance's look before or after it."""
        self.backward(number)
        watching = self.importance if observe else None
        if watching is not None and watching.reads == "gradients":
            watching.update()
        self.optimizer.step()
        self.after(number)
        if watching is not None and watching.reads == "weights":
            watching.update()

    def after(self, number: int) -> None:
        """What comes right after the optimizer's step."""

    def train(self, first: int, last: int) -> None:
        """The steps from `first` to `last`, both included."""
        for number in range(first, last + 1):
            self.step(number)


class PolicyRun(Run):
    """Training of a net while a policy decides; steps are counted from 1 to :data:`TOTAL`."""

    def __init__(self, host: nn.Module, policy: Policy) -> None:
        super().__init__(host, policy.importance)
        self.policy = policy
        self.settled = False
        self.masks: dict[int, dict[str, Tensor]] = {}
        policy.track(self.budget)

    def after(self, number: int) -> None:
        if not self.settled:
            self.policy.after_steps(1, number, TOTAL)

    def step(self, number: int) -> None:
        self.update(number, self.policy.observes(number, TOTAL))
        if self.policy.is_event(number, TOTAL):
            self.masks[number] = self.policy.decide(number, TOTAL)
            self.policy.apply(self.masks[number], number, TOTAL)
            if self.policy.is_final(number, TOTAL):
                self.policy.importance.release()
                self.policy.importance.forget()
                self.settled = True

    def saved(self) -> dict[str, Any]:
        """Net, optimizer and policy as they come back from a file of tensors and plain values."""
        return through_file(
            {
                "settled": self.settled,
                "host": self.host.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "policy": self.policy.state_dict(),
            }
        )

    def load(self, saved: dict[str, Any]) -> None:
        """Go on where :meth:`saved` was called."""
        self.host.load_state_dict(saved["host"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.policy.load_state_dict(saved["policy"])
        self.settled = saved["settled"]
        if self.settled:
            self.policy.importance.release()
            self.policy.importance.forget()


@dataclass(frozen=True)
class ImportanceTrial:
    """One importance on a small net: what a law of :data:`~lightning_peft.testing.IMPORTANCE_LAWS` is about.

    Attributes:
        factory: makes the importance, a new one at each call.
        adapter: makes the adapters.
    """

    factory: Callable[[], Importance]
    adapter: AdapterFactory = ADAPTER

    def run(self, host: nn.Module | None = None) -> Run:
        """A new run with a new importance, tracked."""
        run = Run(net(self.adapter) if host is None else host, self.factory())
        self.of(run).track(run.budget)
        return run

    @staticmethod
    def of(run: Run) -> Importance:
        """The importance in a run."""
        assert run.importance is not None
        return run.importance

    def name(self) -> str:
        """The importance's class."""
        return type(self.factory()).__name__

    def where(self) -> str:
        """Where it was tried, as the end of a sentence."""
        return ""


@dataclass(frozen=True)
class PolicyTrial:
    """One policy on a small net: what a law of :data:`~lightning_peft.testing.POLICY_LAWS` is about.

    Attributes:
        factory: makes the policy for a final budget, a new one at each call.
        adapter: makes the adapters.
    """

    factory: Callable[[Budget], Policy]
    adapter: AdapterFactory = ADAPTER

    def run(self, host: nn.Module | None = None) -> PolicyRun:
        """A new run with a new policy, tracked."""
        return PolicyRun(net(self.adapter) if host is None else host, self.factory(FINAL))

    def name(self) -> str:
        """The policy's class and what it decides by."""
        policy = self.factory(FINAL)
        return f"{type(policy).__name__} of {type(policy.schedule).__name__} and {type(policy.importance).__name__}"

    def where(self) -> str:
        """Where it was tried, as the end of a sentence."""
        return ""


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    """Write and read again as a checkpoint is: tensors and plain values only.

    Raises:
        pickle.UnpicklingError: something else is in it.
    """
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read: dict[str, Any] = torch.load(file, weights_only=True)
    return read

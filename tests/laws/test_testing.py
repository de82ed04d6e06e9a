"""The laws find what they are made to find: each wrong adapter breaks the law that is named for it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft import Adapter, Gate, LoRA
from lightning_peft.testing import LAWS, LAYERS, Case, Inapplicable, check, laws


class Minimal(Adapter):
    """A third party's method on linear layers alone, without a rank: one trained scale per output."""

    def __init__(self, base: nn.Module) -> None:
        if not isinstance(base, nn.Linear):
            raise TypeError("Minimal adapts Linear layers only")
        super().__init__(base)
        self.log_scale = nn.Parameter(torch.zeros(base.out_features))

    def effective_weight(self) -> Tensor:
        base_weight: Tensor = self.base.weight  # type: ignore[assignment]
        return base_weight * self.log_scale.exp()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight * self.log_scale.exp()[:, None], self.base.bias)  # type: ignore[operator, arg-type]


class Rank(Adapter):
    """A right low-rank adapter, to be spoilt in one place at a time."""

    def __init__(self, base: nn.Module, rank: int = 3) -> None:
        if not isinstance(base, nn.Linear):
            raise TypeError("only Linear")
        super().__init__(base)
        self.rank = rank
        self.A = nn.Parameter(torch.randn(rank, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.gate = Gate(rank, cost=1)

    def value(self) -> Tensor:
        assert self.gate is not None
        return self.gate.value().to(self.A.dtype)

    def effective_weight(self) -> Tensor:
        return self.base.weight + (self.B * self.value()) @ self.A  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight().to(x.dtype), self.base.bias)  # type: ignore[arg-type]


class NotTheBase(Rank):
    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        nn.init.ones_(self.B)


class TwoEquations(Rank):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + F.linear(F.linear(x, self.A) * self.value() * 1.01, self.B)


class Ungated(Rank):
    def value(self) -> Tensor:
        return torch.ones_like(self.A[:, 0])


class StraightThrough(Rank):
    def value(self) -> Tensor:
        return super().value().detach() + (super().value() - super().value().detach()) * 2


class Detached(Rank):
    def value(self) -> Tensor:
        return super().value().detach()


class Idle(Rank):
    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.unused = nn.Parameter(torch.zeros(1))


class Forgetful(Rank):
    def __init__(self, base: nn.Module, rank: int = 3) -> None:
        super().__init__(base, rank)
        self.rank = 5


class Unsaved(Rank):
    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.signs = torch.randn(self.A.shape).sign()

    def effective_weight(self) -> Tensor:
        return self.base.weight + (self.B * self.value()) @ (self.A * self.signs)  # type: ignore[operator]


class OwnRandom(Rank):
    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        nn.init.normal_(self.A, generator=_everybodys)


_everybodys = torch.Generator()


class Branching(Rank):
    def forward(self, x: Tensor) -> Tensor:
        if self.value().sum() > 2:  # reads the mask's value: a graph break
            return super().forward(x)
        return super().forward(x)


@pytest.mark.parametrize(
    ("law", "wrong", "says"),
    [
        ("starts_as_base", NotTheBase, "the output of a new adapter differs from its base's"),
        ("forward_is_effective_weight", TwoEquations, r"forward is not effective_weight\(\) x \+ bias"),
        ("closed_component_changes_nothing", Ungated, "component 0 alone adds nothing"),
        ("closed_component_is_scored", Detached, "components without a score"),
        ("only_adapters_get_gradients", Idle, "layer.unused gets no gradient"),
        ("mask_gradient_is_finite_difference", StraightThrough, "the mask's gradient is not the loss's derivative"),
        ("survives_copies", Unsaved, "the output changes through state_dict"),
        ("arguments_rebuild", Forgetful, "its tensors differ"),
        ("same_seed_same_start", OwnRandom, "two adapters from one seed differ in layer.A"),
        ("resumes", Unsaved, "after a stop and resume layer.A differs"),
    ],
)
def test_a_wrong_adapter_breaks_its_law(law: str, wrong: type[Rank], says: str) -> None:
    LAWS[law](Case(Rank, "linear"))
    with pytest.raises(AssertionError, match=says):
        LAWS[law](Case(wrong, "linear"))


def test_a_graph_break_breaks_the_law_of_compilation() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported):
        LAWS["compiles"](Case(Branching, "linear"))


test_minimal = laws(Minimal, ("linear", "attention_in"))


def test_what_an_adapter_is_not_is_skipped_with_the_reason() -> None:
    test: Any = laws(Minimal, ("linear", "embedding"))
    with pytest.raises(pytest.skip.Exception, match="layer 'layer': Minimal adapts Linear layers only"):
        test("embedding", LAWS["starts_as_base"])
    with pytest.raises(pytest.skip.Exception, match="the adapter has no gate"):
        test("linear", LAWS["closed_component_is_scored"])


def test_an_adapter_that_takes_no_layer_fails() -> None:
    with pytest.raises(TypeError, match="Minimal adapts Linear layers only"):
        check(Minimal, ("embedding", "conv1d"))
    test: Any = laws(partial(LoRA, no_such_argument=1))
    with pytest.raises(TypeError, match="no_such_argument"):
        test("linear", LAWS["starts_as_base"])


def test_check_does_without_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAWS, "compiles", lambda case: None)  # has its own test; seconds
    check(Minimal)
    with pytest.raises(AssertionError, match="starts_as_base on linear: the output of a new adapter"):
        check(NotTheBase, ["linear"])


def test_every_law_and_layer_says_what_it_is_about() -> None:
    assert all(law.__doc__ for law in LAWS.values())
    convolutions = {"convolution_1d", "convolution_2d", "convolution_3d"}
    others = {"linear", "linear_no_bias", "conv1d", "embedding", "attention_in", "attention_out"}
    assert set(LAYERS) == convolutions | others
    assert issubclass(Inapplicable, Exception)

"""The laws find what they are made to find: each wrong adapter breaks the law that is named for it."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft import Adapter, Gate, LoRA
from lightning_peft.testing import IMPORTANCE_LAWS, LAWS, LAYERS, POLICY_LAWS, Case, Inapplicable, check, laws, remedy


class Minimal(Adapter):
    """A third party's method on linear layers alone, without a rank: one trained scale per output."""

    def __init__(self, base: nn.Module) -> None:
        if not isinstance(base, nn.Linear):
            raise TypeError("Minimal adapts Linear layers only")
        super().__init__(base)
        self.log_scale = nn.Parameter(torch.zeros(base.out_features, device=base.weight.device))

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
        device = base.weight.device
        self.A = nn.Parameter(torch.randn(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
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


class Positional(Rank):
    __call__ = nn.Module.__call__  # without the name that torch's layers have for their input


class Kept(Rank):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).exp()  # whose backward reads its output


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


class Stuck(Rank):
    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        nn.init.zeros_(self.A)


class ThreeDimensions(Rank):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.einsum("bld,od->blo", x, self.effective_weight().to(x.dtype)) + self.base.bias
        return y


class Wide(Rank):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float() if x.dtype != torch.float64 else super().forward(x)


class Counting(Rank):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + 0.1 * self.calls)


class OnOneDevice(Rank):
    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.shift = nn.Parameter(torch.zeros(1))


THREE = torch.Size([3])


class Sized(Rank):
    def __init__(self, base: nn.Module, size: torch.Size = THREE) -> None:
        super().__init__(base, size[0])
        self.size = size


class Growing(LoRA):
    """Cut away, its components grow."""

    def compacted(self, keep: Tensor | None = None) -> Adapter | None:
        small = super().compacted(keep)
        if small is not None:
            with torch.no_grad():
                small.B.mul_(2.0)  # type: ignore[operator, union-attr]
        return small


class Doubled(LoRA):
    """Exported, it is twice what it is."""

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return A, 2 * B


@pytest.mark.parametrize(
    ("law", "wrong", "says"),
    [
        ("starts_as_base", NotTheBase, "the output of a new adapter differs from its base's"),
        ("forward_is_effective_weight", TwoEquations, r"forward is not effective_weight\(\) x \+ bias"),
        ("closed_component_changes_nothing", Ungated, "component 0 alone adds nothing"),
        ("closed_component_is_scored", Detached, "components without a score"),
        ("only_adapters_get_gradients", Idle, "layer.unused gets no gradient"),
        ("may_be_called_by_keyword", Positional, r"got an unexpected keyword argument 'input'"),
        ("output_may_change_in_place", Kept, "the output cannot be changed in place: one of the variables needed"),
        ("mask_gradient_is_finite_difference", StraightThrough, "the mask's gradient is not the loss's derivative"),
        ("survives_copies", Unsaved, "the output changes through state_dict"),
        ("arguments_rebuild", Forgetful, "its tensors differ"),
        ("same_seed_same_start", OwnRandom, "two adapters from one seed differ in layer.A"),
        ("resumes", Unsaved, "after a stop and resume layer.A differs"),
        ("learns", Stuck, "20 steps of Adam on one batch bring the loss from"),
        ("takes_any_batch", ThreeDimensions, "einsum"),
        ("survives_autocast", Wide, "under autocast the output is of torch.float32, and the base's of torch.bfloat16"),
        ("survives_recomputation", Counting, "a gradient differs under activation checkpointing"),
        ("builds_without_memory", OnOneDevice, "on the meta device shift takes memory"),
        ("loads", Unsaved, "loaded, its output differs"),
        ("loads", Sized, "it cannot be saved and loaded: Sized at 'layer' has size=torch.Size"),
    ],
)
def test_a_wrong_adapter_breaks_its_law(law: str, wrong: type[Rank], says: str) -> None:
    LAWS[law](Case(Rank, "linear"))
    with pytest.raises((AssertionError, RuntimeError, TypeError), match=says):
        LAWS[law](Case(wrong, "linear"))


@pytest.mark.parametrize(
    ("law", "wrong", "says"),
    [
        ("compacts", Growing, "the output changes through compact"),
        ("compacts_in_training", Growing, "'B' of the adapter at 'layer' cannot be cut while training"),
        ("exports", Doubled, "the export was checked and is not right"),
    ],
)
def test_a_wrong_low_rank_adapter_breaks_its_law(law: str, wrong: type[LoRA], says: str) -> None:
    LAWS[law](Case(partial(LoRA, rank=3), "linear"))
    with pytest.raises((AssertionError, TypeError), match=says):
        LAWS[law](Case(partial(wrong, rank=3), "linear"))


def test_a_class_that_no_module_holds_cannot_be_loaded() -> None:
    class Local(Rank):
        pass

    with pytest.raises(AssertionError, match="Local', which is not imported; import it before loading"):
        LAWS["loads"](Case(Local, "linear"))


def test_a_graph_break_breaks_the_law_of_compilation() -> None:
    with pytest.raises(AssertionError, match="it cannot be compiled as one graph: Data-dependent branching"):
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
    with pytest.raises(AssertionError) as caught:
        check(NotTheBase, ["linear"])
    found, fix = str(caught.value).split("\n")
    assert re.fullmatch(
        r"NotTheBase\(\) breaks starts_as_base on linear: the output of a new adapter differs from its base's: "
        r"the largest difference is [\d.]+\.",
        found,
    )
    assert fix.startswith("Fix: start the update at exactly zero")


def test_an_error_inside_a_law_is_told_with_its_name() -> None:
    with pytest.raises(
        AssertionError, match=r"ThreeDimensions\(rank=3\) breaks takes_any_batch on linear: RuntimeError: einsum"
    ):
        check(ThreeDimensions, ["linear"])


@pytest.mark.parametrize("kinds", ["linear", [], ["linear", "convolution"]])
def test_kinds_that_there_are_not(kinds: Any) -> None:
    with pytest.raises(ValueError, match=r"kinds is a list of kinds of layers, of linear, .* Got "):
        laws(Rank, kinds)
    with pytest.raises(ValueError, match="kinds is a list"):
        check(Rank, kinds)


def test_a_rank_that_the_layers_do_not_have() -> None:
    with pytest.raises(ValueError, match=r"rank=17 is not possible .* The laws try layers of 24 inputs and 16 outputs"):
        check(partial(LoRA, rank=17), ["linear"])


def test_every_law_and_layer_says_what_it_is_about() -> None:
    for law in (*LAWS.values(), *IMPORTANCE_LAWS.values(), *POLICY_LAWS.values()):
        assert (law.__doc__ or "").partition("\n")[0].endswith("."), law
        assert remedy(law).endswith("."), law
    convolutions = {"convolution_1d", "convolution_2d", "convolution_3d"}
    others = {"linear", "linear_no_bias", "conv1d", "embedding", "attention_in", "attention_out"}
    assert set(LAYERS) == convolutions | others
    assert issubclass(Inapplicable, Exception)

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_peft.seams import when_built, wrap_method


class Counting(LightningModule):
    """Says who was called, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def training_step(self, batch: int, batch_idx: int = 7) -> int:
        """The user's own."""
        self.said.append("step")
        return batch


def around(name: str, times: int) -> Callable[..., int]:
    def link(call: Callable[..., int], module: Counting, *args: Any, **kwargs: Any) -> int:
        module.said.append(f"{name}>")
        result = call(*args, **kwargs)
        module.said.append(f"<{name}")
        return result * times

    return link


def test_links_stand_in_order_the_last_one_outermost() -> None:
    module = Counting()
    wrap_method(module, "training_step", around("a", 2))
    wrap_method(module, "training_step", around("b", 3))
    assert module.training_step(5, batch_idx=0) == 30
    assert module.said == ["b>", "a>", "step", "<a", "<b"]


def test_an_innermost_link_is_next_to_the_method_whoever_came_first() -> None:
    module = Counting()
    wrap_method(module, "training_step", around("a", 2))
    wrap_method(module, "training_step", around("b", 3), innermost=True)
    remove = wrap_method(module, "training_step", around("c", 5), innermost=True)
    assert module.training_step(1) == 30
    assert module.said == ["a>", "b>", "c>", "step", "<c", "<b", "<a"]
    remove()
    assert module.training_step(1) == 6


def test_the_class_and_other_instances_are_untouched() -> None:
    module, other = Counting(), Counting()
    wrap_method(module, "training_step", around("a", 2))
    assert other.training_step(5) == 5
    assert "training_step" not in vars(other)


@pytest.mark.parametrize("order", list(permutations("abc")))
def test_links_come_off_in_any_order(order: tuple[str, ...]) -> None:
    module = Counting()
    remove = {name: wrap_method(module, "training_step", around(name, 2)) for name in "abc"}
    left = list("abc")
    for name in order:
        remove[name]()
        remove[name]()  # a second time does nothing
        left.remove(name)
        module.said.clear()
        assert module.training_step(1) == 2 ** len(left)
        assert module.said == [f"{n}>" for n in reversed(left)] + ["step"] + [f"<{n}" for n in left]
    assert "training_step" not in vars(module)
    assert module.training_step.__func__ is Counting.training_step  # type: ignore[attr-defined]


def test_a_link_can_take_itself_off_while_it_runs() -> None:
    module = Counting()

    def once(call: Callable[..., int], owner: Counting, *args: Any) -> int:
        remove()
        return call(*args) + 100

    remove = wrap_method(module, "training_step", once)
    wrap_method(module, "training_step", around("a", 2))
    assert module.training_step(1) == 202
    assert module.training_step(1) == 2


def test_a_method_that_others_shadowed_comes_back() -> None:
    module = Counting()
    theirs: Callable[..., int] = lambda batch, batch_idx=0: 10 * batch  # noqa: E731
    module.training_step = theirs  # type: ignore[method-assign]
    remove = wrap_method(module, "training_step", around("a", 2))
    assert module.training_step(1) == 20
    remove()
    assert module.training_step is theirs


def test_what_others_put_on_top_later_is_left_alone() -> None:
    module = Counting()
    remove = wrap_method(module, "training_step", around("a", 2))
    ours = module.training_step
    module.training_step = lambda batch, batch_idx=0: ours(batch) + 1  # type: ignore[method-assign]
    theirs = module.training_step
    remove()
    assert module.training_step is theirs
    assert module.training_step(5) == 6  # through our wrapper, which has no link any more


def test_a_deep_copy_is_wrapped_around_the_copy() -> None:
    module = Counting()
    wrap_method(module, "training_step", around("a", 2))
    twin = copy.deepcopy(module)
    assert twin.training_step(5) == 10
    assert twin.said == ["a>", "step", "<a"]
    assert module.said == []


def test_a_copy_made_in_a_run_stands_on_its_own_after_it() -> None:
    module = Counting()
    remove = wrap_method(module, "training_step", around("a", 2))
    twin = copy.deepcopy(module)
    remove()
    assert twin.training_step(5) == 5
    again = wrap_method(twin, "training_step", around("b", 3))
    assert twin.training_step(5) == 15
    assert module.training_step(5) == 5
    again()
    assert twin.training_step(5) == 5


def test_signature_name_and_override_are_what_lightning_sees() -> None:
    module = Counting()
    before = inspect.signature(module.training_step)
    wrap_method(module, "training_step", around("a", 2))
    wrap_method(module, "validation_step", around("a", 2))
    assert inspect.signature(module.training_step) == before
    assert is_param_in_hook_signature(module.training_step, "batch_idx")
    assert module.training_step.__name__ == "training_step"
    assert module.training_step.__doc__ == "The user's own."
    assert is_overridden("training_step", module)
    assert not is_overridden("validation_step", module)


def test_an_exception_passes_and_leaves_the_chain_as_it_was() -> None:
    class Broken(Counting):
        def training_step(self, batch: int, batch_idx: int = 0) -> int:
            raise RuntimeError("theirs")

    module = Broken()
    wrap_method(module, "training_step", around("a", 2))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="theirs"):
            module.training_step(1)


class InInit(LightningModule):
    built = True


class InConfigure(LightningModule):
    built = False

    def configure_model(self) -> None:
        self.built = True


class InSetup(LightningModule):
    built = False

    def setup(self, stage: str) -> None:
        self.built = True


class InBoth(LightningModule):
    """Data in setup, layers in configure_model."""

    built = False

    def setup(self, stage: str) -> None:
        self.ready = True

    def configure_model(self) -> None:
        assert self.ready
        self.built = True


def run(module: LightningModule) -> None:
    """What Lightning calls, in its order, after the callbacks' setup."""
    module.setup("fit")
    module.configure_model()


@pytest.mark.parametrize("kind", [InInit, InConfigure, InSetup, InBoth])
def test_when_built_acts_once_the_layers_are_there(kind: type[LightningModule]) -> None:
    module, seen = kind(), []
    when_built(module, lambda owner: seen.append((owner, owner.built)))
    assert seen == ([(module, True)] if kind is InInit else [])
    run(module)
    assert seen == [(module, True)]
    run(module)
    assert len(seen) == 1
    assert not {"setup", "configure_model"} & set(vars(module))


@pytest.mark.parametrize("kind", [InConfigure, InSetup, InBoth])
def test_when_built_keeps_the_order_of_the_callbacks(kind: type[LightningModule]) -> None:
    module, seen = kind(), []
    when_built(module, lambda owner: seen.append("injection"))
    when_built(module, lambda owner: seen.append("terms"))
    run(module)
    assert seen == ["injection", "terms"]


@pytest.mark.parametrize("kind", [InConfigure, InSetup])
def test_when_built_does_not_act_if_building_failed(
    kind: type[LightningModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "configure_model" if kind is InConfigure else "setup"

    def broken(self: LightningModule, *args: str) -> None:
        raise RuntimeError("theirs")

    monkeypatch.setattr(kind, name, broken)
    module, seen = kind(), []
    when_built(module, lambda owner: seen.append(owner))
    with pytest.raises(RuntimeError, match="theirs"):
        run(module)
    assert seen == []

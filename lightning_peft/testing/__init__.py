"""The laws that every adapter must satisfy, as one test for pytest.

One line covers a class of your own:

    from functools import partial
    import lightning_peft.testing

    test_my_adapter = lightning_peft.testing.laws(partial(MyAdapter, rank=4))

pytest then runs `test_my_adapter[linear-starts_as_base]` and so on: every law on every kind of layer. A kind that the
adapter's constructor refuses with a TypeError is skipped, and so is what the class says it is not (`mergeable = False`,
no gate); refusing every kind fails. The layers have 24 inputs and 16 outputs. Without pytest, call :func:`check`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_peft.adapters.base import AdapterFactory
from lightning_peft.testing import equations, lifecycle
from lightning_peft.testing.case import LAYERS, Case, Inapplicable

__all__ = ["LAWS", "LAYERS", "Case", "Inapplicable", "Law", "check", "laws"]

Law = Callable[[Case], None]

LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        equations.starts_as_base,
        equations.forward_is_effective_weight,
        equations.weight_is_what_acts,
        equations.closed_component_changes_nothing,
        equations.closed_component_is_scored,
        equations.only_adapters_get_gradients,
        equations.mask_gradient_is_finite_difference,
        lifecycle.survives_copies,
        lifecycle.survives_casts,
        lifecycle.arguments_rebuild,
        lifecycle.same_seed_same_start,
        lifecycle.merges,
        lifecycle.compacts,
        lifecycle.ejects,
        lifecycle.compiles,
        lifecycle.resumes,
    )
}
"""The laws by name; each takes a :class:`Case` and raises AssertionError, or :class:`Inapplicable`."""


def check(factory: AdapterFactory, kinds: Sequence[str] = tuple(LAYERS)) -> None:
    """Try every law on every kind of layer that the adapter takes; what :func:`laws` does, without pytest.

    Raises:
        AssertionError: a law does not hold.
        TypeError: the adapter takes none of the kinds.
    """
    for kind in kinds:
        for name, law in LAWS.items():
            try:
                _try(law, factory, kind, kinds)
            except Inapplicable:
                continue
            except AssertionError as error:
                raise AssertionError(f"{name} on {kind}: {error}") from error


def laws(factory: AdapterFactory, kinds: Sequence[str] = tuple(LAYERS)) -> Callable[..., None]:
    """A test for pytest of every law on every kind of layer; see this module's first lines.

    Args:
        factory: builds the adapter with its default or given arguments: `partial(MyAdapter, rank=4)`; at most rank 16.
        kinds: which of :data:`LAYERS` to try.
    """
    import pytest

    @pytest.mark.parametrize("law", list(LAWS.values()), ids=list(LAWS))
    @pytest.mark.parametrize("kind", kinds)
    def test(kind: str, law: Law) -> None:
        try:
            _try(law, factory, kind, kinds)
        except Inapplicable as reason:
            pytest.skip(str(reason))

    decorated: Callable[..., None] = test
    return decorated


def _try(law: Law, factory: AdapterFactory, kind: str, kinds: Sequence[str]) -> None:
    reason = _refusal(Case(factory, kind))
    if reason is not None:
        if all(_refusal(Case(factory, other)) for other in kinds):
            raise reason  # whatever it is, it is no adapter of layers
        raise Inapplicable(str(reason))
    law(Case(factory, kind))


def _refusal(case: Case) -> TypeError | None:
    try:
        case.host()
    except TypeError as error:
        return error
    return None

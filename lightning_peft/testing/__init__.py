"""The laws that every adapter must satisfy, as one test for pytest; and those of importances and policies.

One line covers a class of your own:

    from functools import partial
    import lightning_peft.testing

    test_my_adapter = lightning_peft.testing.laws(partial(MyAdapter, rank=4))
    test_my_importance = lightning_peft.testing.importance_laws(MyImportance)
    test_my_policy = lightning_peft.testing.policy_laws(lambda final: RankPolicy(Cubic(), MyImportance(), final))

pytest then runs `test_my_adapter[linear-starts_as_base]` and so on: every law on every kind of layer. A kind that the
adapter's constructor refuses with a TypeError is skipped, and so is what the class says it is not (`mergeable = False`,
no gate); refusing every kind fails. The layers have 24 inputs and 16 outputs; an adapter that stands in the place of a
whole transformers model (`adapts = "model"`) is tried on tiny models, :data:`MODELS`. Without pytest, call
:func:`check`, :func:`check_importance` or :func:`check_policy`. What breaks a law is told by name, with what usually
mends it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_peft.adapters.base import AdapterFactory
from lightning_peft.rank.budget import Budget
from lightning_peft.rank.importance import Importance
from lightning_peft.rank.policy import Policy
from lightning_peft.surgery.choice import adapter_kind
from lightning_peft.testing import equations, files, importances, lifecycle, policies, training
from lightning_peft.testing.case import LAYERS, Case, Inapplicable
from lightning_peft.testing.models import MODELS
from lightning_peft.testing.trial import ADAPTER, ImportanceTrial, PolicyTrial

__all__ = [
    "IMPORTANCE_LAWS",
    "LAWS",
    "LAYERS",
    "MODELS",
    "POLICY_LAWS",
    "Case",
    "ImportanceTrial",
    "Inapplicable",
    "Law",
    "PolicyTrial",
    "check",
    "check_importance",
    "check_policy",
    "importance_laws",
    "laws",
    "policy_laws",
    "remedy",
]

Law = Callable[[Case], None]


def _by_name(*functions: Callable[..., None]) -> dict[str, Any]:
    return {function.__name__: function for function in functions}


LAWS: dict[str, Law] = _by_name(
    equations.starts_as_base,
    equations.forward_is_effective_weight,
    equations.weight_is_what_acts,
    equations.closed_component_changes_nothing,
    equations.closed_component_is_scored,
    equations.only_adapters_get_gradients,
    equations.may_be_called_by_keyword,
    equations.output_may_change_in_place,
    equations.mask_gradient_is_finite_difference,
    training.learns,
    training.takes_any_batch,
    training.survives_autocast,
    training.survives_recomputation,
    training.compacts_in_training,
    lifecycle.survives_copies,
    lifecycle.survives_casts,
    lifecycle.arguments_rebuild,
    lifecycle.same_seed_same_start,
    lifecycle.merges,
    lifecycle.compacts,
    lifecycle.ejects,
    lifecycle.compiles,
    lifecycle.resumes,
    files.builds_without_memory,
    files.loads,
    files.exports,
)
"""The laws by name; each takes a :class:`Case` and raises AssertionError, or :class:`Inapplicable`."""

IMPORTANCE_LAWS: dict[str, Callable[[ImportanceTrial], None]] = _by_name(
    importances.scores_every_component,
    importances.leaves_training_alone,
    importances.layers_are_measured_alone,
    importances.survives_a_state_dict,
    importances.starts_anew,
    importances.follows_a_cut,
    importances.leaves_out_what_is_not_finite,
)
"""The laws of an importance by name; each takes an :class:`ImportanceTrial`."""

POLICY_LAWS: dict[str, Callable[[PolicyTrial], None]] = _by_name(
    policies.spends_what_it_says,
    policies.ends_for_good,
    policies.decides_alike,
    policies.ties_are_counted,
    policies.resumes,
    policies.keeps_what_is_closed,
    policies.follows_a_cut,
)
"""The laws of a policy by name; each takes a :class:`PolicyTrial`."""


def check(factory: AdapterFactory, kinds: Sequence[str] | None = None) -> None:
    """Try every law on every kind of layer that the adapter takes; what :func:`laws` does, without pytest.

    Args:
        factory: builds the adapter with its default or given arguments: `partial(MyAdapter, rank=4)`; at most rank 16.
        kinds: which of :data:`LAYERS` or :data:`MODELS` to try; ``None`` for all that the adapter's class is for.

    Raises:
        AssertionError: a law does not hold; with the adapter, the law, what was found and what usually mends it.
        TypeError: the adapter takes none of the kinds.
        ValueError: there is no such kind, or the factory's arguments do not suit the layers.
    """
    kinds = _kinds(factory, kinds)
    for kind in kinds:
        for law in LAWS.values():
            _unless_inapplicable(_try_on_layer, law, factory, kind, kinds)


def check_importance(factory: Callable[[], Importance], adapter: AdapterFactory = ADAPTER) -> None:
    """Try every law of :data:`IMPORTANCE_LAWS`; what :func:`importance_laws` does, without pytest.

    Raises:
        AssertionError: a law does not hold.
    """
    for law in IMPORTANCE_LAWS.values():
        _unless_inapplicable(_try, law, ImportanceTrial(factory, adapter))


def check_policy(factory: Callable[[Budget], Policy], adapter: AdapterFactory = ADAPTER) -> None:
    """Try every law of :data:`POLICY_LAWS`; what :func:`policy_laws` does, without pytest.

    Raises:
        AssertionError: a law does not hold.
    """
    for law in POLICY_LAWS.values():
        _unless_inapplicable(_try, law, PolicyTrial(factory, adapter))


def laws(factory: AdapterFactory, kinds: Sequence[str] | None = None) -> Callable[..., None]:
    """A test for pytest of every law on every kind of layer; see this module's first lines.

    Args:
        factory: builds the adapter with its default or given arguments: `partial(MyAdapter, rank=4)`; at most rank 16.
        kinds: which of :data:`LAYERS` or :data:`MODELS` to try; ``None`` for all that the adapter's class is for.

    Raises:
        ValueError: there is no such kind.
    """
    import pytest

    chosen = _kinds(factory, kinds)

    @pytest.mark.parametrize("law", list(LAWS.values()), ids=list(LAWS))
    @pytest.mark.parametrize("kind", chosen)
    def test(kind: str, law: Law) -> None:
        try:
            _try_on_layer(law, factory, kind, chosen)
        except Inapplicable as reason:
            pytest.skip(str(reason))

    decorated: Callable[..., None] = test
    return decorated


def importance_laws(factory: Callable[[], Importance], adapter: AdapterFactory = ADAPTER) -> Callable[..., None]:
    """A test for pytest of every law of :data:`IMPORTANCE_LAWS`.

    Args:
        factory: makes the importance, a new one at each call.
        adapter: makes the adapters that are scored, on Linear layers of 8 inputs and 6 or 8 outputs.
    """
    return _pytest(IMPORTANCE_LAWS, ImportanceTrial(factory, adapter))


def policy_laws(factory: Callable[[Budget], Policy], adapter: AdapterFactory = ADAPTER) -> Callable[..., None]:
    """A test for pytest of every law of :data:`POLICY_LAWS`.

    Args:
        factory: makes the policy for a final budget, a new one with a new importance at each call. A run has 20 steps.
        adapter: makes the adapters that are pruned, on three Linear layers of 8 inputs and 6 or 8 outputs.
    """
    return _pytest(POLICY_LAWS, PolicyTrial(factory, adapter))


def remedy(law: Callable[..., None]) -> str:
    """What usually mends an object that breaks the law: the part of its docstring that begins with "Fix:"."""
    return " ".join((law.__doc__ or "").partition("Fix: ")[2].split())


def _pytest(laws_: Mapping[str, Callable[[Any], None]], trial: object) -> Callable[..., None]:
    import pytest

    @pytest.mark.parametrize("law", list(laws_.values()), ids=list(laws_))
    def test(law: Callable[[Any], None]) -> None:
        try:
            _try(law, trial)
        except Inapplicable as reason:
            pytest.skip(str(reason))

    decorated: Callable[..., None] = test
    return decorated


def _unless_inapplicable(attempt: Callable[..., None], *args: Any) -> None:
    try:
        attempt(*args)
    except Inapplicable:
        return


def _try_on_layer(law: Law, factory: AdapterFactory, kind: str, kinds: Sequence[str]) -> None:
    reason = _refusal(Case(factory, kind))
    if reason is not None:
        if all(_refusal(Case(factory, other)) for other in kinds):
            raise reason  # whatever it is, it is no adapter of layers
        raise Inapplicable(str(reason))
    _try(law, Case(factory, kind))


def _try(law: Callable[[Any], None], case: Any) -> None:
    """Try a law, and say of what breaks it: who, which law, what was found, what usually mends it."""
    try:
        law(case)
    except Inapplicable:
        raise
    except Exception as error:
        found = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        raise AssertionError(
            f"{case.name()} breaks {law.__name__}{case.where()}: {found}\nFix: {remedy(law)}"
        ) from error


def _kinds(factory: AdapterFactory, kinds: Sequence[str] | None) -> Sequence[str]:
    if kinds is None:
        kind = adapter_kind(factory)
        return tuple(MODELS if kind is not None and kind.adapts == "model" else LAYERS)
    known = {**LAYERS, **MODELS}
    odd = [kind for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind not in known or kinds == kind]
    if odd or not kinds:
        raise ValueError(f"kinds is a list of kinds of layers, of {', '.join(known)}. Got {kinds!r}.")
    return kinds


def _refusal(case: Case) -> TypeError | None:
    try:
        case.host()
    except TypeError as error:
        return error
    except ValueError as error:
        raise ValueError(f"{error} The laws try layers of 24 inputs and 16 outputs, and attentions of 24.") from error
    return None

"""Checks of arguments' types: what a constructor does not refuse fails later, far from the mistake."""

from __future__ import annotations

from math import isfinite
from numbers import Integral, Real


def require_number(name: str, value: object) -> None:
    """Check that an argument is a number.

    Raises:
        TypeError: it is none; a bool is none either.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number. Got {value!r}.")


def require_finite(name: str, value: object) -> None:
    """Check that an argument is a number, and neither infinite nor NaN.

    Raises:
        TypeError: it is no number.
        ValueError: it is infinite or NaN.
    """
    require_number(name, value)
    if not isfinite(value):  # type: ignore[arg-type]
        raise ValueError(f"{name} must be finite. Got {value!r}.")


def require_integer(name: str, value: object) -> None:
    """Check that an argument is a whole number, of Python or numpy.

    Raises:
        TypeError: it is none; a bool or 4.0 is none either.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer. Got {value!r}.")


def require_instance(name: str, value: object, kind: type, example: str) -> None:
    """Check that an argument is of a class, and not the class itself.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, kind):
        given = f"the class {value.__name__}" if isinstance(value, type) else f"{value!r}"
        raise TypeError(f"{name} must be a {kind.__name__}, such as {example}. Got {given}.")

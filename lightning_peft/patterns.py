"""Names by patterns, as every argument that names layers takes them."""

from __future__ import annotations

import re
from collections.abc import Sequence


def matches(patterns: Sequence[str], name: str) -> bool:
    """Whether one of the patterns matches the whole name, or the end of it after a dot."""
    return any(re.fullmatch(rf"(.*\.)?({pattern})", name) for pattern in patterns)


def require_patterns(what: str, patterns: object) -> None:
    """Check that an argument is a list of regular expressions.

    Raises:
        TypeError: it is one string, or one of them is none.
        ValueError: one is no regular expression.
    """
    if isinstance(patterns, str):
        raise TypeError(f"{what} must be a list of patterns, not one string. Write {what}=[{patterns!r}].")
    if not isinstance(patterns, Sequence):
        raise TypeError(f"{what} must be a list of patterns. Got {patterns!r}.")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{what} must be a list of patterns, which are strings. Got {pattern!r}.")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{what}={[pattern]!r} is not a regular expression: {error}.") from error

"""Arithmetic questions in words, made from a seed, with their answers."""

from __future__ import annotations

import random

_NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn")
_THINGS = ("apples", "books", "coins", "pens", "shells", "stamps")


def make(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Questions of one or two steps, each different, with the number that answers it.

    Args:
        count: how many.
        seed: decides names, things and numbers.
    """
    draw = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        name, other = draw.sample(_NAMES, 2)
        thing = draw.choice(_THINGS)
        a, b, c = draw.randint(12, 40), draw.randint(2, 9), draw.randint(2, 9)
        question, answer = draw.choice(
            (
                (f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", a + b),
                (f"{name} has {a} {thing} and gives {b} to {other}. How many {thing} does {name} have left?", a - b),
                (f"{name} has {b} boxes with {c} {thing} in each. How many {thing} does {name} have?", b * c),
                (
                    f"{name} has {a} {thing}, buys {b} more and gives {c} to {other}. "
                    f"How many {thing} does {name} have now?",
                    a + b - c,
                ),
                (
                    f"{name} has {a} {thing} and {other} has {b} boxes with {c} {thing} in each. "
                    f"How many {thing} do they have together?",
                    a + b * c,
                ),
            )
        )
        found[question] = str(answer)
    return list(found.items())

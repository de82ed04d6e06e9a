"""Options of presets: what says nothing is refused, and so is what cannot be, before a model is there."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_peft import RankPruning, SparseBudget, presets

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("sparta", {"batches": -5}, "batches=-5 belongs to start='gradient', and start is 'random': give that, or leave"),
    ("sparta", {"batches": 4, "start": "magnitude"}, "batches=4 belongs to start='gradient', and start is 'magni"),
    ("sparta", {"batches": 0, "start": "gradient"}, "batches"),
    (
        "sparta",
        {"interval": -1, "warmup": 9, "tail": -3},
        r"interval=-1, warmup=9, tail=-3 belong to regrow, which is 0: give that, or leave these out\.",
    ),
    ("sparta", {"interval": -1, "regrow": 0.2}, r"interval is a number of optimizer steps, at least 1\. Got -1"),
    ("sparta", {"density": float("nan")}, r"density is a share of a tensor's entries, in \[0, 1\]\. Got nan"),
    ("sparta", {"density": 0}, "density=0 trains nothing: give a share above 0"),
    ("sparta", {"density": -1}, r"density is a share .* Got -1"),
    ("sparta", {"sparsity": 2}, r"sparsity is the share .* in \[0, 1\)\. Got 2"),
    ("sparta", {"parameters": 0}, r"parameters is how many scalars are trained, at least 1\. Got 0"),
    ("sparta", {"seed": "a"}, r"seed must be an integer\. Got 'a'"),
    ("sparta", {"kernel": "dens"}, "kernel='dens': choose 'sampled', 'dense', 'chunked'"),
    ("sparta", {"sampling": "x"}, "sampling='x': choose 'exact', 'bernoulli'"),
    ("prompt_tuning", {"length": 0}, r"length must be at least 1\. Got 0"),
    ("dpt", {"rank": 0}, r"rank must be at least 1\. Got 0"),
    ("dpt", {"length": 2.5}, r"length must be an integer\. Got 2\.5"),
    ("dpt", {"rank": 3, "parameters": 48}, r"give rank or parameters, not both\. Got rank=3, parameters=48"),
    ("dpt", {"interval": -3, "warmup": 7}, "warmup=7, interval=-3 belong to final_rank, which is not given: give that"),
    ("dpt", {"compact": "final"}, "compact='final' belongs to final_rank, which is not given"),
    ("dpt", {"final_rank": 2, "interval": -3}, r"interval is a number of optimizer steps, at least 1\. Got -3"),
    ("dept", {"rank": -1}, r"rank must be at least 0\. Got -1"),
    ("dept", {"reach": 0}, r"reach must be at least 1\. Got 0"),
    ("dept", {"tail": 0.5}, r"tail=0\.5 belongs to final_rank, which is not given"),
]  # fmt: skip


@pytest.mark.parametrize(("preset", "options", "says"), WRONG, ids=lambda value: str(value)[:40])
def test_what_says_nothing_or_cannot_be_is_refused(preset: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        getattr(presets, preset)(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 5}, "SparseBudget takes of SpaRTA seed, sampling, block, kernel, scaling. Got 'k'"),
        ({"block": 0}, "block is a number of entries, at least 1. Got 0"),
        ({"block": 2, "sampling": "bernoulli"}, "goes neither with k nor with blocks"),
        ({"scaling": float("inf")}, "scaling multiplies delta and must be finite"),
    ],
)
def test_a_budget_refuses_what_no_layer_could_have(options: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        SparseBudget(0.1, **options)


def test_defaults_of_options_that_belong_to_others() -> None:
    for preset, steps in ((presets.sparta(regrow=0.2), 20), (presets.dpt(final_rank=2), 10)):
        pruning = next(each for each in preset if isinstance(each, RankPruning))
        assert pruning.policy.interval == steps
        assert pruning.policy.schedule.tail == 0.3

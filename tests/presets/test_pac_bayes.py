from __future__ import annotations

import pytest

from lightning_peft import presets
from lightning_peft.presets.pac_bayes import prior_split


def test_a_split_is_the_same_everywhere_and_leaves_the_rest() -> None:
    part = prior_split(range(100), 0.3)  # type: ignore[arg-type]
    assert len(part) == len(set(part.indices)) == 30
    assert part.indices[:8] == prior_split(range(100), 0.3).indices[:8]  # type: ignore[arg-type]
    assert part.indices != prior_split(range(100), 0.3, seed=1).indices  # type: ignore[arg-type]
    assert prior_split(range(8), 0.5).indices == [0, 1, 5, 6]  # type: ignore[arg-type]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="share=0.0 of 4 examples is 0, which leaves one side without any"):
        prior_split(range(4), 0.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="divides a data set of known length, and a list_iterator has none"):
        prior_split(iter([1, 2]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="least_sigma is a standard deviation, positive and below 0.3. Got 1.0."):
        presets.pac_tuning(least_sigma=1.0)

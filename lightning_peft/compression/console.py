"""What a job lets its libraries print."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LIGHTNING = "lightning.pytorch"


@contextmanager
def without_remarks() -> Iterator[None]:
    """Lightning's loggers tell warnings only, for a while: every Trainer repeats what devices there are."""
    logger = logging.getLogger(_LIGHTNING)
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def silence() -> Iterator[None]:
    """Warnings only, from Lightning, and no bars of transformers' that say what is loaded and saved."""
    from transformers import utils

    bars: Any = utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with without_remarks():
            yield
    finally:
        if shown:
            bars.enable_progress_bar()

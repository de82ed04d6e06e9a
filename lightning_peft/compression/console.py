"""What a job lets its libraries print."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Which of them Lightning's remarks go through depends on what of it was imported last.
_LIGHTNING = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_utilities")


@contextmanager
def without_remarks() -> Iterator[None]:
    """Lightning's loggers tell warnings only, for a while: every Trainer repeats what devices there are."""
    loggers = [logging.getLogger(name) for name in _LIGHTNING]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


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

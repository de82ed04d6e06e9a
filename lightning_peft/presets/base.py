"""Preset: the callbacks of one method, in the order that they need."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException


class Preset(list[Callback]):
    """The callbacks of one method, in the order that they need: `Trainer(callbacks=[*preset])`.

    A type of its own, so that the command line can tell a function that returns one from any other: the `peft` of a job
    takes whatever returns a Preset, yours too.
    """

    def __getattr__(self, name: str) -> Any:
        # A Trainer takes anything for a callback, and would say that a list has no attribute 'setup'.
        if hasattr(Callback, name):
            raise MisconfigurationException(
                "a preset is a list of callbacks, and was given to the Trainer as one callback. Unpack it: "
                "callbacks=[*preset, ...]."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

"""The order in which our callbacks must stand in the Trainer's list."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks, in order."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector


def require_before(trainer: Trainer, callback: Callback, *earlier: type[Callback]) -> None:
    """Check that callbacks of the kinds `earlier` do not come after `callback`.

    Raises:
        MisconfigurationException: one does.
    """
    order = callbacks_of(trainer)
    for other in order[order.index(callback) + 1 :]:
        if isinstance(other, earlier):
            name, before = type(callback).__name__, type(other).__name__
            raise MisconfigurationException(
                f"{name} comes before {before} in the Trainer's callbacks; put {before} first: "
                f"callbacks=[{before}(...), {name}(...)]."
            )


def require_one(trainer: Trainer, kind: type[Callback], instead: str) -> None:
    """Check that the Trainer has one callback of this kind.

    Args:
        trainer: the Trainer.
        kind: the class.
        instead: what to do instead.

    Raises:
        MisconfigurationException: it has several.
    """
    count = sum(isinstance(callback, kind) for callback in callbacks_of(trainer))
    if count > 1:
        raise MisconfigurationException(f"there are {count} {kind.__name__} callbacks; {instead}.")

"""Lagging: early in training the encoder gets many steps for each of the decoder's, so that it does not fall behind.

Reference:
    He et al. 2019, "Lagging Inference Networks and Posterior Collapse in Variational Autoencoders", ICLR, arXiv
    1901.05534: up to 100 encoder steps, checked every 15, until the validation set's mutual information stops rising.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from lightning_peft.arguments import require_integer

Turn = Literal["encoder", "decoder", "both"]


class Lagging:
    """Whose turn an optimizer step is.

    Aggressive at first: turns of the encoder, then one of the decoder, and so on. The encoder's end when the loss per
    word over the last `every` of them is not below that of the `every` before, or after `inner`. When a validation's
    mutual information is below the one before, aggression ends, and both train in every step.

    Departures: the encoder's turns take the batches that follow in the epoch, and not random ones, so that each batch
    is one optimizer step, of one cost, for whatever counts steps (schedules, accumulation, checkpoints) and for all
    processes alike; and `max_steps` counts the encoder's turns too.

    With accumulated gradients, a step's loss is that of its last batch.

    A checkpoint goes on exactly. One that is written at a step whose validation is still to come (ModelCheckpoint with
    every_n_train_steps) goes on, by Lightning, without that validation, and so without what it would have ended.

    Args:
        inner: the encoder's turns at most, for one of the decoder.
        every: turns over which its loss is compared.

    Raises:
        TypeError: one of them is no integer.
        ValueError: one of them is below 1.
    """

    def __init__(self, inner: int = 100, every: int = 15) -> None:
        for name, value in (("inner", inner), ("every", every)):
            require_integer(name, value)
            if value < 1:
                raise ValueError(f"{name}={value}: it is a number of turns, at least 1.")
        self.inner, self.every = inner, every
        self.active = True
        self._turns = 0  # the encoder's, since the decoder's last
        self._loss: Tensor | float = 0.0  # of the last `every`, summed; a tensor, so that not every turn waits for it
        self._words: Tensor | float = 0.0
        self._before: float | None = None  # the loss per word of the `every` before
        self._information: float | None = None

    @property
    def turn(self) -> Turn:
        """Whose turn the next optimizer step is."""
        if not self.active:
            return "both"
        return "encoder" if self._turns < self.inner else "decoder"

    def done(self, loss: Tensor, words: Tensor) -> None:
        """Note an optimizer step.

        Args:
            loss: of its sentences, summed; the same on all processes.
            words: that were predicted in them.
        """
        turn = self.turn
        if turn == "decoder":
            self._turns, self._loss, self._words, self._before = 0, 0.0, 0.0, None
        if turn != "encoder":
            return
        self._turns += 1
        self._loss, self._words = self._loss + loss.detach(), self._words + words
        if self._turns % self.every == 0:
            now = float(self._loss / self._words)
            if self._before is not None and now >= self._before:
                self._turns = self.inner  # enough: the decoder is next
            self._before, self._loss, self._words = now, 0.0, 0.0

    def validated(self, information: float) -> None:
        """Note the mutual information of a validation set: aggression ends when it no longer rises."""
        if self._information is not None and information < self._information:
            self.active = False
        self._information = information

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as numbers."""
        return {
            "active": self.active,
            "turns": self._turns,
            "loss": float(self._loss),
            "words": float(self._words),
            "before": self._before,
            "information": self._information,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.active, self._turns = bool(state["active"]), int(state["turns"])
        self._loss, self._words = float(state["loss"]), float(state["words"])
        self._before, self._information = state["before"], state["information"]

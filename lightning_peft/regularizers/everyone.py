"""Everyone: the processes that train together, as a term sees them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Everyone:
    """The processes that train together: here this one alone. The Regularization callback gives a term the others.

    A term of pairs is computed of the whole global batch, on every process alike:

        x = self.everyone.gather(x)                # (N, d) -> (world N, d), by process
        noise = torch.randn(len(x), ..., generator=self.next_generator(x.device))
        mine = self.everyone.mine(noise)           # the rows that belong to this process's examples

    Attributes:
        rank: this process's number.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, by process: (N, ...) -> (world N, ...).

        It has a gradient: that of a process's rows is the sum over processes. So where every process computes the same
        global loss and the strategy averages gradients, the gradient is exactly that of one process with all rows.

        Raises:
            RuntimeError: on all processes alike, if their tensors are not of one shape.
        """
        return tensor

    def mine(self, rows: Tensor) -> Tensor:
        """This process's rows of those of all: (world N, ...) -> (N, ...)."""
        count = len(rows) // self.world
        return rows[self.rank * count : (self.rank + 1) * count]

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes, in place."""

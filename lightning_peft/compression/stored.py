"""How a model's parameters are stored, and how they are trained."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn


class Stored:
    """The dtypes of a model's parameters, to give them back: in 16 bits, most steps of training are rounded away.

    Buffers stay as they are: what transformers keeps in 32 bits beside 16-bit weights, such as rotary frequencies,
    would be rounded on the way back.

    Args:
        model: whose parameters are as they were stored.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        kinds = Counter(parameter.dtype for parameter in model.parameters() if parameter.ndim > 1)
        self._usual = kinds.most_common(1)[0][0]

    def widen(self) -> None:
        """Parameters of fewer than 32 bits become float32, of the same values."""
        for parameter in self._model.parameters():
            if parameter.is_floating_point() and parameter.element_size() < 4:
                parameter.data = parameter.data.float()

    def narrow(self) -> bool:
        """Round to what was stored, and new parameters to what most of the matrices were. Whether anything changed."""
        changed = False
        for name, parameter in self._model.named_parameters():
            dtype: torch.dtype = self._dtypes.get(name, self._usual)
            changed |= parameter.dtype != dtype
            parameter.data = parameter.data.to(dtype)
        return changed

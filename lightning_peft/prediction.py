"""Predictions of a posterior: the average of several drawn networks, in place of the network at its mean."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.regularizers.posterior import Posterior


def posterior_predict(
    call: Callable[[], Any],
    module: nn.Module,
    posterior: Posterior,
    samples: int,
    generator: torch.Generator | None = None,
) -> Any:
    """What `call` returns, averaged over networks drawn from Q.

        p = 1/k sum_i softmax(logits_i)           logits = ln p

    So a softmax of what comes back is the average of the probabilities, and not that of averaged logits.

    Args:
        call: runs a forward of `module`; returns logits (..., classes), or something with `logits`.
        module: the module that Q is over.
        posterior: Q.
        samples: k, at least 1.
        generator: of the noise; ``None`` for the posterior's own.

    Returns:
        Like what `call` returns, with the average for its logits, and for its `loss`, if it has one, the mean of the
        losses.

    Raises:
        ValueError: samples is below 1, or there are no logits.
    """
    if samples < 1:
        raise ValueError(f"samples is how many networks are drawn, at least 1. Got {samples}.")
    outputs = []
    for _ in range(samples):
        with posterior.sampled(module, generator):
            outputs.append(call())
    first = outputs[0]
    if isinstance(first, Tensor):
        return mean_log_probability(outputs)
    found = copy.copy(first)
    _put(found, "logits", mean_log_probability([_get(each, "logits") for each in outputs]))
    losses = [_get(each, "loss") for each in outputs]
    if all(isinstance(loss, Tensor) for loss in losses):
        _put(found, "loss", torch.stack(losses).mean(0))
    return found


def mean_log_probability(logits: Sequence[Any]) -> Tensor:
    """ln( 1/k sum_i softmax(logits_i) ), over the last dimension; in float32, or wider where logits are.

    Example:
        >>> mean_log_probability([torch.tensor([0.0, 0.0]), torch.tensor([90.0, 0.0])]).exp()
        tensor([0.7500, 0.2500])
    """
    if not all(isinstance(each, Tensor) for each in logits):
        raise ValueError(f"there are no logits to average in what the module returns: got {type(logits[0]).__name__}.")
    wide = [each.to(torch.promote_types(each.dtype, torch.float32)).log_softmax(-1) for each in logits]
    return torch.stack(wide).logsumexp(0) - log(len(logits))


def _get(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _put(output: Any, name: str, value: Tensor) -> None:
    if isinstance(output, dict):
        output[name] = value  # transformers' outputs have it as an attribute then as well
    else:
        setattr(output, name, value)

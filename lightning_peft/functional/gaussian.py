"""Densities of Gaussians with independent entries, for many points under many of them at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOG_TAU = math.log(2 * math.pi)


def gaussian_log_density(mean: Tensor | float, log_variance: Tensor | float, z: Tensor) -> Tensor:
    """Log-density of each point under its own Gaussian: -1/2 sum_k [ (z_k - m_k)^2 / v_k + ln v_k + ln 2 pi ].

    Args:
        mean: m, broadcast against `z`.
        log_variance: ln v, broadcast against `z`; 0 for a standard deviation of 1.
        z: (..., d).

    Returns:
        (...), in nats; in float32, or wider where an argument is.
    """
    z = _wide(z)
    mean, log_variance = _wide_or_number(mean), _wide_or_number(log_variance)
    inverse = (-log_variance).exp() if isinstance(log_variance, Tensor) else math.exp(-log_variance)
    return -((z - mean).square() * inverse + (log_variance + _LOG_TAU)).sum(-1) / 2


def gaussian_log_densities(mean: Tensor, log_variance: Tensor, z: Tensor) -> Tensor:
    """Log-density of every point under every Gaussian, ln q(z_j | x_i), by two matrix products.

    No tensor of N x M x d numbers is made. The products of an opened square cancel: with a standard deviation of a
    thousandth of the means' spread, float32 would be off by tenths. So they are computed about the middle of z and in
    float64, where the device has it; autocast does not touch them.

    Args:
        mean: (N, d), m of each Gaussian.
        log_variance: (N, d), ln v.
        z: (M, d), the points.

    Returns:
        (N, M), in nats; in float32, or wider where an argument is.

    Raises:
        ValueError: the shapes do not fit.
    """
    if mean.ndim != 2 or mean.shape != log_variance.shape or z.ndim != 2 or z.shape[1:] != mean.shape[1:]:
        raise ValueError(
            "mean and log_variance must be (N, d), and z (M, d). "
            f"Got {tuple(mean.shape)}, {tuple(log_variance.shape)} and {tuple(z.shape)}."
        )
    dtype = _wide(mean).dtype
    for other in (log_variance, z):
        dtype = torch.promote_types(dtype, other.dtype)
    exact = exact_dtype(z)
    with torch.autocast(z.device.type, enabled=False):
        mean, log_variance, z = mean.to(exact), log_variance.to(exact), z.to(exact)
        middle = z.detach().mean(0)
        mean, z = mean - middle, z - middle
        inverse = (-log_variance).exp()
        own = (mean.square() * inverse + log_variance + _LOG_TAU).sum(1, keepdim=True)
        opened = inverse @ z.square().T - 2 * (mean * inverse) @ z.T
        return (-(own + opened) / 2).to(dtype)


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """float64, or float32 on a device that has no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _wide_or_number(value: Tensor | float) -> Tensor | float:
    return _wide(value) if isinstance(value, Tensor) else value

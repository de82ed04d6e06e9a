"""What a law is tried on: one adapter on one kind of layer, inside a small model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterFactory
from lightning_peft.rank.gate import Gate
from lightning_peft.surgery.injection import inject
from lightning_peft.testing.models import MODELS, TOKENS, ModelHost, logits

D_IN, D_OUT = 24, 16


class Inapplicable(Exception):
    """A law says nothing about this adapter; the text tells why."""


class _Host(nn.Module):
    """A model with one layer to adapt, which it calls; an attention reads its projections instead."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, x, x, need_weights=False)[0] if self.attends else self.layer(x)
        return y

    @property
    def attends(self) -> bool:
        return isinstance(self.layer, nn.MultiheadAttention)


def _transformers_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D  # seconds to import

    layer: nn.Module = Conv1D(D_OUT, D_IN)  # type: ignore[no-untyped-call]
    return layer


def _attention() -> nn.Module:
    return nn.MultiheadAttention(D_IN, 2, batch_first=True)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D_IN, D_OUT),
    "linear_no_bias": lambda: nn.Linear(D_IN, D_OUT, bias=False),
    "conv1d": _transformers_conv1d,
    "convolution_1d": lambda: nn.Conv1d(8, D_OUT, 3, stride=2, padding=1),
    "convolution_2d": lambda: nn.Conv2d(4, D_OUT, (3, 2), padding=1, padding_mode="circular"),
    "convolution_3d": lambda: nn.Conv3d(8, D_OUT, (1, 3, 2), dilation=(1, 2, 1), groups=2),
    "embedding": lambda: nn.Embedding(D_IN, D_OUT),
    "attention_in": _attention,
    "attention_out": _attention,
}
"""The kinds of layer that an adapter is tried on: "conv1d" is transformers' Conv1D, a linear layer."""

_PLACES = {"convolution_1d": (8, 7), "convolution_2d": (4, 4, 3), "convolution_3d": (8, 2, 6, 3)}

_TARGETS = {"attention_in": "in_proj", "attention_out": "out_proj"}


@dataclass(frozen=True)
class Case:
    """One adapter on one kind of layer: what a law is about.

    Attributes:
        factory: builds the adapter.
        kind: a key of :data:`LAYERS`, or of :data:`~lightning_peft.testing.models.MODELS`.
    """

    factory: AdapterFactory
    kind: str

    def name(self) -> str:
        """The adapter, as its class and arguments say it."""
        adapter = self.adapter(self.host(start=True))
        try:
            arguments = adapter.arguments()
        except Exception:  # a law is about that
            return type(adapter).__name__
        return f"{type(adapter).__name__}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"

    def where(self) -> str:
        """Where it was tried, as the end of a sentence."""
        return f" on {self.kind}"

    @property
    def target(self) -> str:
        """The pattern that names the layer in the model."""
        return _TARGETS.get(self.kind, "layer")

    @property
    def is_model(self) -> bool:
        """Whether the adapter stands in the place of a whole model."""
        return self.kind in MODELS

    def output(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What a layer, a model or its adapter gives for the inputs."""
        y: Tensor = logits(layer, x) if self.is_model else layer(x)
        return y

    def plain(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model without an adapter, in eval mode; the same one at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            host = ModelHost(MODELS[self.kind]()) if self.is_model else _Host(LAYERS[self.kind]())
            return host.to(dtype).eval()

    def host(self, dtype: torch.dtype = torch.float32, *, start: bool = False, seed: int = 1) -> nn.Module:
        """The model with the adapter; its parameters moved off their start unless `start`."""
        host = self.plain(dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject(host, self.factory, targets=[self.target], train=[])
            if not start:
                with torch.no_grad():
                    for _, parameter in self.adapter(host).own_parameters():
                        if parameter.is_floating_point():
                            parameter.add_(0.1 * torch.randn_like(parameter))
        return host

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
        """A batch: (3, 5, 24), (3, 5) indices for an embedding or a model, (3, c_in, *places) for a convolution."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "embedding" or self.is_model:
            return torch.randint(TOKENS if self.is_model else D_IN, (3, 5), generator=generator)
        return torch.randn(3, *_PLACES.get(self.kind, (5, D_IN)), generator=generator, dtype=dtype)

    @staticmethod
    def adapter(host: nn.Module) -> Adapter:
        """The adapter in the model."""
        return next(child for child in host.modules() if isinstance(child, Adapter))

    def gated(self, host: nn.Module) -> Gate:
        """The adapter's gate."""
        gate = self.adapter(host).gate
        if gate is None:
            raise Inapplicable("the adapter has no gate")
        return gate

    def mergeable(self, host: nn.Module) -> Adapter:
        """The adapter, where its effective weight says all."""
        adapter = self.adapter(host)
        if not adapter.mergeable:
            raise Inapplicable(f"{type(adapter).__name__}.mergeable is False")
        return adapter


def same(actual: Tensor, expected: Tensor, says: str) -> None:
    """Equal bit for bit."""
    if not torch.equal(actual, expected):
        if actual.shape != expected.shape:
            raise AssertionError(f"{says}: it is of shape {tuple(actual.shape)}, not {tuple(expected.shape)}.")
        largest = (actual.double() - expected.double()).abs().max().item()
        raise AssertionError(f"{says}: the largest difference is {largest:.3g}.")


def close(actual: Tensor, expected: Tensor, says: str, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Equal up to rounding."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{says}.\n{text}")


def holds(fact: bool, says: str) -> None:
    """An assert that is there under `python -O` as well."""
    if not fact:
        raise AssertionError(f"{says}.")

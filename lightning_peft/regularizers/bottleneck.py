"""BottleneckHead: a classifier that sees a noisy sample of few numbers (Karimi Mahabadi et al., ICLR 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.arguments import require_integer
from lightning_peft.head_modules import HeadModule
from lightning_peft.regularizers.counted import CountedDraws, told_by

Activation = Literal["relu", "tanh", "sigmoid"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


@dataclass(frozen=True)
class Passed:
    """What went through a bottleneck in one call.

    Attributes:
        mean: mu, (N, K).
        std: (N, K).
        logits: of all samples, (S, N, classes); the first are those that the model got.
    """

    mean: Tensor
    std: Tensor
    logits: Tensor


class BottleneckHead(CountedDraws, HeadModule):
    """A classifier that sees a noisy sample of K numbers, and their mean outside of training.

        e = MLP(x),   mu = W_1 e + b_1,   std = softplus(W_2 e + b_2),   z = mu + std eps,   logits = W z + b

    MLP has two linear layers, an activation after each. The prior of z is N(mu_p, softplus(s_p)^2), both learnt, with
    a normal start. In training the logits are those of the first of S samples; :class:`~lightning_peft.VIB` takes the
    others.

    The noise is counted: that of a call depends on the seed and on how many calls in training there were before, which
    a checkpoint knows. It is drawn for the batches of all processes together, and each takes its rows.

    Args:
        base: the linear layer in whose place it stands, of which sizes, dtype and device count.
        features: K.
        hidden: width of e; 0 for (d + K) / 2, d the layer's inputs. The MLP's other layer has (d + hidden) / 2.
        activation: "relu", "tanh" or "sigmoid".
        samples: S.
        seed: of the noise.

    Raises:
        TypeError: an argument is of another type.
        ValueError: one is out of range.

    Shape:
        (N, d) -> (N, classes).

    Reference:
        Karimi Mahabadi, Belinkov, Henderson, 2021, arXiv 2106.05469, and its code. Departure: linear layers start as
        torch starts them, which the code leaves to BERT.
    """

    def __init__(
        self,
        base: nn.Module,
        features: int = 128,
        hidden: int = 0,
        activation: Activation = "relu",
        samples: int = 5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_bottleneck(features, hidden, activation, samples, seed)
        if type(base) is not nn.Linear:
            raise TypeError(f"a bottleneck stands in the place of an nn.Linear. Got a {type(base).__name__}.")
        self.features, self.hidden, self.activation = features, hidden, activation
        self.samples, self.seed = samples, seed
        d = base.in_features
        as_base: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        width = hidden or (d + features) // 2
        between = (d + width) // 2
        kind = _ACTIVATIONS[activation]
        self.mlp = nn.Sequential(nn.Linear(d, between, **as_base), kind(), nn.Linear(between, width, **as_base), kind())
        self.mean = nn.Linear(width, features, **as_base)
        self.std = nn.Linear(width, features, **as_base)
        self.prior_mean = nn.Parameter(torch.empty(features, **as_base))
        self.prior_std = nn.Parameter(torch.empty(features, **as_base))
        self.classifier = nn.Linear(features, base.out_features, **as_base)
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64, device=base.weight.device))
        self.reset_parameters()
        self.rank, self.world = 0, 1
        """This process, of how many: whose rows of the noise it takes."""
        self.heard: list[Passed] | None = None
        """What went through since a list was put here; ``None`` while nobody asks."""

    def reset_parameters(self) -> None:
        """Start the prior anew; the linear layers start themselves."""
        for parameter in (self.prior_mean, self.prior_std):
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            mean_logits: Tensor = self.classifier(self.mean(self.mlp(x)))
            return mean_logits
        if x.dim() != 2:
            raise RuntimeError(
                f"a bottleneck takes pooled features, (N, {self.mlp[0].in_features}), and got {tuple(x.shape)}: name "
                "the head of a classifier of whole inputs."
            )
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "the bottleneck is computed again in the backward pass by activation checkpointing, where its noise "
                "would be another. Leave the head out of what is checkpointed."
            )
        e = self.mlp(x)
        mean, raw = self.mean(e), self.std(e)
        wide = torch.promote_types(mean.dtype, torch.float32)
        mean, std = mean.to(wide), F.softplus(raw.to(wide))
        z = mean + std * self.noise(mean)
        logits: Tensor = self.classifier(z.to(x.dtype))
        if self.heard is not None:
            self.heard.append(Passed(mean, std, logits))
        return logits[0].clone()  # no view: FSDP2 hooks the output of what it wraps

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def noise(self, like: Tensor) -> Tensor:
        """eps of the next call: (S, N, K), for N rows of K numbers."""
        generator = told_by(f"lightning_peft/bottleneck/v1|{self.seed}|{self.next_draw()}", like.device)
        n, k = like.shape
        shape = (self.samples, self.world * n, k)
        return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)[
            :, self.rank * n : (self.rank + 1) * n
        ]

    def prior(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the prior, each (K,), in float32 or wider."""
        wide = torch.promote_types(self.prior_mean.dtype, torch.float32)
        return self.prior_mean.to(wide), F.softplus(self.prior_std.to(wide))

    def plain(self) -> nn.Sequential:
        """The path of the mean: MLP, mu, classifier. What gives std, and the prior, are left behind."""
        return nn.Sequential(*self.mlp, self.mean, self.classifier)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"heard": None}  # what was heard is inside the graph of a step


def require_bottleneck(features: object, hidden: object, activation: object, samples: object, seed: object) -> None:
    """Check the sizes of a bottleneck.

    Raises:
        TypeError: a number is none.
        ValueError: one is out of range, or the activation is unknown.
    """
    for name, value, least in (("features", features, 1), ("hidden", hidden, 0), ("samples", samples, 1)):
        require_integer(name, value)
        if value < least:  # type: ignore[operator]
            raise ValueError(f"{name} of a bottleneck must be at least {least}. Got {value}.")
    require_integer("seed", seed)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: choose {', '.join(map(repr, _ACTIVATIONS))}.")

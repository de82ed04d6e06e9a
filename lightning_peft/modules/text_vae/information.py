"""MI-VAE: information between sentences and z, estimated by a critic and added to the objective.

    L = L_vae - w I_hat( h(x); z ),    I_hat from scores of a critic T(h, z)

Critic and encoder maximise one lower bound, so one backward pass serves both. h(x) is detached: the encoder can raise
the estimate only through z. With E KL(q(z | x) || p) = I(x; z) + KL(q(z) || p), a weight of w pays for a share w of the
divergence's information: at w = 1 only KL(q(z) || p) is left, and above 1 divergence is rewarded.

Reference:
    Qian and Cheung 2019, "Enhancing Variational Autoencoders with Mutual Information Neural Estimation for Text
    Generation", D19-1416: the idea; of the paper only the abstract was read. Estimator, weight, critic and its features
    are our choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.arguments import require_finite, require_integer
from lightning_peft.functional.mutual_information import dv_surrogate, estimate, jsd, next_log_moving, nwj
from lightning_peft.modules.text_vae.encoders import Encoded, TextEncoder
from lightning_peft.regularizers.critics import ConcatCritic, Critic, CriticFactory

Name = Literal["dv", "jsd", "nwj"]
Of = Literal["state", "tokens"]


class LatentInformation(nn.Module):
    """The term w I_hat of a TextVAE, with its critic; give each TextVAE its own.

    It is a part of the module and no term of the `Regularization` callback: it needs z with its gradient and h without,
    which only the module's step knows; its critic has a rate, a clip and steps of its own in the module's optimizer.

    Args:
        weight: w. Above 1 the divergence of single sentences is rewarded, without end.
        estimator: "dv" (the gradient corrected by a moving average), "nwj", or "jsd", which reports NWJ of its critic.
        critic: makes it, of the widths of h and z.
        of: what h is: the encoder's "state", or the mean of the "tokens"' embeddings.
        rate: eta of the moving average, for "dv" alone.
        warmup: share of the run's steps in which w rises from 0.
        lr: of the critic; it has no weight decay.
        clip: largest norm of the critic's gradient, by itself.
        critic_steps: the critic's steps on a batch; all but the last are its alone, each with a new draw of z.

    Raises:
        TypeError: a number is none, or critic makes nothing.
        ValueError: one is out of range, or a name is unknown.
    """

    log_moving: Tensor

    def __init__(
        self,
        weight: float = 0.5,
        estimator: Name = "dv",
        critic: CriticFactory = ConcatCritic,
        of: Of = "state",
        rate: float = 0.01,
        warmup: float = 0.1,
        lr: float = 1e-4,
        clip: float = 1.0,
        critic_steps: int = 1,
    ) -> None:
        super().__init__()
        for name, value in (("weight", weight), ("rate", rate), ("warmup", warmup), ("lr", lr), ("clip", clip)):
            require_finite(name, value)
        require_integer("critic_steps", critic_steps)
        if weight <= 0:
            raise ValueError(
                f"weight={weight}: information is maximised here, with a weight above 0; without it, leave out "
                "information. A lower bound cannot be minimised: for less information there is the divergence's own "
                "weight, kl_weight."
            )
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup={warmup}: it is a share of the steps, in [0, 1].")
        if not 0 < rate <= 1:
            raise ValueError(f"rate={rate}: it is the newest batch's share of the moving average, in (0, 1].")
        if min(lr, clip) <= 0:
            raise ValueError(f"lr={lr}, clip={clip}: the critic's rate and largest norm are above 0.")
        if critic_steps < 1:
            raise ValueError(f"critic_steps={critic_steps}: the critic has 1 step on each batch, or more.")
        if isinstance(critic, nn.Module) or not callable(critic):
            raise TypeError(f"critic makes a critic from two widths, such as ConcatCritic. Got {critic!r}.")
        if estimator not in get_args(Name):
            raise ValueError(f"estimator={estimator!r}: choose one of {', '.join(map(repr, get_args(Name)))}.")
        if of not in get_args(Of):
            raise ValueError(f"of={of!r}: choose 'state' or 'tokens'.")
        self.weight, self.estimator, self.of = weight, estimator, of
        self.rate, self.warmup, self.lr, self.clip, self.critic_steps = rate, warmup, lr, clip, critic_steps
        self._factory = critic
        self.critic: Critic | None = None
        self.register_buffer("log_moving", torch.tensor(-torch.inf))

    def build(self, encoder: TextEncoder, latent: int) -> None:
        """Make the critic, for an encoder's features and a latent space of such a width.

        Raises:
            RuntimeError: it is there already.
        """
        if self.critic is not None:
            raise RuntimeError("this LatentInformation belongs to a TextVAE already; give each its own.")
        self.critic = self._factory(encoder.features if self.of == "state" else encoder.embedding, latent)

    def weight_at(self, step: int, total: int) -> float:
        """w at an optimizer step, counted from 1, of so many."""
        return self.weight * min(1.0, step / max(1.0, self.warmup * total))

    def features(self, encoded: Encoded) -> Tensor:
        """h, without a gradient: (batch, features)."""
        return (encoded.state if self.of == "state" else encoded.tokens).detach()

    def scores(self, features: Tensor, z: Tensor) -> Tensor:
        """T(h_i, z_j) of all pairs of the global batch: (N, N), in float32 at least.

        Each feature is given with mean 0 and variance 1 over the batch (our choice): an encoder starts with states that
        are nearly alike, in which a critic sees nothing for hundreds of steps.
        """
        assert self.critic is not None
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        centred = features - features.mean(0)
        scores: Tensor = self.critic(centred / centred.square().mean(0).sqrt().clamp(min=1e-8), z)
        return scores

    def objective(self, scores: Tensor) -> Tensor:
        """What is maximised: a scalar with the estimator's gradient, whose value need not be the estimate."""
        if self.estimator == "dv":
            return dv_surrogate(scores, self.log_moving)
        return jsd(scores) if self.estimator == "jsd" else nwj(scores)

    @torch.no_grad()
    def estimate(self, scores: Tensor) -> Tensor:
        """The estimate of this batch, in nats."""
        return estimate(self.estimator, scores.detach())

    @torch.no_grad()
    def move(self, scores: Tensor) -> None:
        """Let the moving average follow a batch."""
        if self.estimator == "dv":
            self.log_moving.copy_(next_log_moving(self.log_moving, scores, self.rate))

    def train_critic(self, optimizer: Optimizer, features: Tensor, draws: Iterable[Tensor]) -> None:
        """The critic's steps on a batch before the last, which is everybody's: one for each draw of z.

        They are steps of the module's own optimizer, which leaves alone what has no gradient: so its state is the only
        one, and is saved and resumed as ever. Each has a z of its own, or the critic would learn the noise by heart.

        Args:
            optimizer: of which the critic is a group.
            features: (N, features), of the global batch.
            draws: of z, (N, latent) each, without a gradient.
        """
        own = [p for p in self.parameters() if p.requires_grad]
        held = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
        for p, _ in held:
            p.grad = None
        for z in draws:
            scores = self.scores(features, z)
            # Not `backward`: what listens to it, such as DDP, would take this for the step's gradient.
            for p, gradient in zip(own, torch.autograd.grad(-self.objective(scores), own), strict=True):
                p.grad = gradient
            nn.utils.clip_grad_norm_(own, self.clip)
            optimizer.step()
            self.move(scores)
        for p, gradient in held:
            p.grad = gradient

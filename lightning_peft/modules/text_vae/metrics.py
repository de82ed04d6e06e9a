"""What is reported of a variational autoencoder of sentences: likelihood, divergence, and how much z is used."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_peft.functional.latent import active_units, aggregate_mutual_information, perplexity


class LatentLanguageMetrics(Metric):
    """Figures of a whole set, over batches and processes, each with the number that it is over.

    - ``nll``: mean negative log-likelihood of a sentence, in nats, as it was given: importance weighted, or the ELBO;
    - ``ppl``: exp of its total over all predicted words, the end of a sentence being one and its start none;
    - ``reconstruction``, ``kl``: means over sentences, in nats;
    - ``mi``: I(x; z) by the aggregate posterior over all n sentences; its ceiling is ln n;
    - ``au``: units whose posterior mean has a variance of at least 0.01 over them;
    - ``n``, ``words``: sentences and predicted words.

    Args:
        chunk: sentences whose densities are in memory at once.
    """

    full_state_update = False
    is_differentiable = False
    sums: Tensor
    mean: list[Tensor]
    log_variance: list[Tensor]
    z: list[Tensor]

    def __init__(self, chunk: int = 1024) -> None:
        super().__init__()
        self.chunk = chunk
        self.add_state("sums", torch.zeros(5, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("mean", "log_variance", "z"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        nll: Tensor,
        reconstruction: Tensor,
        kl: Tensor,
        words: Tensor,
        mean: Tensor,
        log_variance: Tensor,
        z: Tensor,
    ) -> None:
        """Add a batch.

        Shape:
            nll, reconstruction, kl, words: (batch,); mean, log_variance, z: (batch, latent), z one draw.
        """
        parts = [part.detach().double().sum().to(self.sums) for part in (nll, reconstruction, kl, words)]
        # Not in place: states that were moved in inference mode could not be changed in training.
        self.sums = self.sums + torch.stack([*parts, parts[0].new_tensor(len(nll))])
        for state, value in ((self.mean, mean), (self.log_variance, log_variance), (self.z, z)):
            state.append(value.detach().float())

    def compute(self) -> dict[str, Tensor]:
        """The figures by name."""
        mean, log_variance, z = (dim_zero_cat(state) for state in (self.mean, self.log_variance, self.z))
        nll, reconstruction, kl, words, n = self.sums
        return {
            "nll": nll / n,
            "ppl": perplexity(nll, words),
            "reconstruction": reconstruction / n,
            "kl": kl / n,
            "mi": aggregate_mutual_information(mean, log_variance, z, chunk=self.chunk),
            "au": active_units(mean).double(),
            "n": n,
            "words": words,
        }

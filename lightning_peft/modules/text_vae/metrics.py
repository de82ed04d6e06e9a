"""What is reported of a variational autoencoder of sentences: likelihood, divergence, and how much z is used."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_peft.metrics import ActiveUnits, AggregateMutualInformation, ImportanceWeightedNLL, PriorDivergence


class LatentLanguageMetrics(MetricCollection):
    """Figures of a whole set, over batches and processes, with the numbers that they are over.

    - ``nll``: mean negative log-likelihood of a sentence, in nats: importance weighted, or as the ELBO has it;
    - ``ppl``: exp of its total over all predicted words, the end of a sentence being one and its start none;
    - ``reconstruction``, ``kl``: means over sentences, in nats;
    - ``mi``: I(x; z) by the aggregate posterior over all n sentences; its ceiling is ln n;
    - ``au``: units whose posterior mean has a variance of at least 0.01 over them;
    - ``n``, ``words``: sentences and predicted words.

    Args:
        chunk: sentences whose densities are in memory at once.
    """

    def __init__(self, chunk: int = 1024) -> None:
        parts: dict[str, Metric | MetricCollection] = {
            "likelihood": ImportanceWeightedNLL(),
            "reconstruction": _Reconstruction(),
            "divergence": PriorDivergence(),
            "information": AggregateMutualInformation(chunk=chunk, name="mi"),
            "units": ActiveUnits(),
        }
        super().__init__(parts, compute_groups=False)

    def add(
        self,
        log_joint: Tensor,
        log_posterior: Tensor,
        reconstruction: Tensor,
        words: Tensor,
        mean: Tensor,
        log_variance: Tensor,
        z: Tensor,
    ) -> None:
        """Add a batch.

        Shape:
            log_joint, log_posterior: (batch, draws); reconstruction, words: (batch,); mean, log_variance, z:
            (batch, latent), z one draw.
        """
        self["likelihood"].update(log_joint, log_posterior, words)
        self["reconstruction"].update(reconstruction)
        self["divergence"].update(mean, (log_variance / 2).exp())
        self["information"].update(mean, log_variance, z)
        self["units"].update(mean)

    @property
    def means(self) -> list[Tensor]:
        """This process's posterior means, a tensor for each batch."""
        units = self["units"]
        assert isinstance(units, ActiveUnits)
        return list(units.means)

    def compute(self) -> dict[str, Tensor]:
        """The figures by name."""
        found = super().compute()
        figures = {name: found[name] for name in ("nll", "ppl", "reconstruction", "kl", "mi", "au")}
        return {**figures, "n": found["nll_n"], "words": found["ppl_n"]}


class _Reconstruction(Metric):
    """Mean of -ln p(x | z) over sentences."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, reconstruction: Tensor) -> None:
        of_batch = torch.stack([reconstruction.detach().sum(), reconstruction.new_tensor(len(reconstruction))])
        # Not in place: states that were moved in inference mode could not be changed in training.
        self.sums = self.sums + of_batch.to(self.sums)

    def compute(self) -> Tensor:
        return self.sums[0] / self.sums[1]

"""What random position noise is compared with: Gaussian noise and NEFTune's, cutoff, salt and pepper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_peft.arguments import require_number
from lightning_peft.callbacks.embedding_noise import EmbeddingNoise, Mode
from lightning_peft.callbacks.hooked_steps import Numbers
from lightning_peft.callbacks.repeated_steps import Execution, Reduction
from lightning_peft.embeddings import is_causal
from lightning_peft.functional.embedding_noise import (
    gaussian_noise,
    neftune_noise,
    require_share,
    salt_and_pepper,
    token_cutoff,
)


class GaussianNoise(EmbeddingNoise):
    """Add noise to embeddings.

        gaussian:   E' = E + size eps,                eps ~ N(0, 1)
        neftune:    E' = E + size / sqrt(n d) eps,    eps ~ U(-1, 1),  n tokens of d numbers in the example

    Args:
        size: sigma of "gaussian", in the unit of the embeddings; alpha of "neftune", 5 to 15 in its paper.
        form: "gaussian" or "neftune".
        mode: "replace" for one noisy pass, or "virtual"; see `EmbeddingNoise` for it and what follows.
        passes: K of "virtual".
        reduction: "sum" or "mean" of the K + 1 losses.
        execution: "together", "apart" or "batched".
        prob: how often "replace" has noise.
        embedding: patterns of the embedding layers' names; ``None`` to find that of the model's inputs.
        protect_ids: token ids to leave alone.
        padding: "keep" leaves padding out; "noise" treats it as any token.
        seed: of the noise.

    Raises:
        TypeError, ValueError, MisconfigurationException, RuntimeError: as of :class:`RandomPositionNoise`.

    Reference:
        Jain et al., NEFTune: Noisy embeddings improve instruction finetuning, 2023, arXiv 2310.05914 (remembered). The
        Gaussian form is a baseline in the code of arXiv 2212.05961, with sigma = 0.01.
    """

    def __init__(
        self,
        size: float = 0.01,
        form: Literal["gaussian", "neftune"] = "gaussian",
        mode: Mode = "replace",
        passes: int = 1,
        reduction: Reduction = "sum",
        execution: Execution = "together",
        prob: float = 1.0,
        embedding: Sequence[str] | None = None,
        protect_ids: Sequence[int] = (),
        padding: Literal["keep", "noise"] = "keep",
        seed: int = 0,
    ) -> None:
        super().__init__(mode, passes, reduction, execution, prob, embedding, protect_ids, padding, seed)
        require_number("size", size)
        if not 0 <= size < float("inf"):
            raise ValueError(f"size is that of the noise, at least 0 and finite. Got {size}.")
        if form not in ("gaussian", "neftune"):
            raise ValueError(f"form={form!r}: choose 'gaussian' or 'neftune'.")
        self.size, self.form = size, form

    def noise(self, E: Tensor, tokens: Tensor | None, numbers: Numbers) -> Tensor:
        draw = gaussian_noise if self.form == "gaussian" else neftune_noise
        return draw(E, self.size, mask=tokens, generator=numbers.each(len(E)))


class TokenCutoff(EmbeddingNoise):
    """Put zeros in the place of whole tokens.

        E'_t = 0  with probability p,  else E_t

    Args:
        p: share of the tokens.
        mode: "replace" for one noisy pass, or "virtual"; see `EmbeddingNoise` for it and what follows.
        passes: K of "virtual".
        reduction: "sum" or "mean" of the K + 1 losses.
        execution: "together", "apart" or "batched".
        prob: how often "replace" has noise.
        embedding: patterns of the embedding layers' names; ``None`` to find that of the model's inputs.
        protect_ids: token ids to leave alone.
        padding: "keep" leaves padding out; "noise" treats it as any token.
        seed: of the noise.

    Raises:
        TypeError, ValueError, MisconfigurationException, RuntimeError: as of :class:`RandomPositionNoise`.

    Reference:
        Shen et al., A simple but tough-to-beat data augmentation approach for natural language understanding and
        generation, 2020, arXiv 2009.13818 (remembered). Departure: no divergence between predictions is added.
    """

    def __init__(
        self,
        p: float = 0.1,
        mode: Mode = "replace",
        passes: int = 1,
        reduction: Reduction = "sum",
        execution: Execution = "together",
        prob: float = 1.0,
        embedding: Sequence[str] | None = None,
        protect_ids: Sequence[int] = (),
        padding: Literal["keep", "noise"] = "keep",
        seed: int = 0,
    ) -> None:
        super().__init__(mode, passes, reduction, execution, prob, embedding, protect_ids, padding, seed)
        require_number("p", p)
        require_share("p", p)
        self.p = p

    def noise(self, E: Tensor, tokens: Tensor | None, numbers: Numbers) -> Tensor:
        return token_cutoff(E, self.p, mask=tokens, generator=numbers.each(len(E)))


class SaltAndPepper(EmbeddingNoise):
    """Put zeros in the place of some numbers, and the example's largest number in the place of as many others.

        E'_j = 0  with probability p / 2,   max(E)  with probability p / 2,   else E_j

    Args:
        p: share of the numbers.
        causal: whether it is the largest so far, up to the number's own token, which a model that predicts the next
            token needs; ``None`` to ask the model's attention.
        mode: "replace" for one noisy pass, or "virtual"; see `EmbeddingNoise` for it and what follows.
        passes: K of "virtual".
        reduction: "sum" or "mean" of the K + 1 losses.
        execution: "together", "apart" or "batched".
        prob: how often "replace" has noise.
        embedding: patterns of the embedding layers' names; ``None`` to find that of the model's inputs.
        protect_ids: token ids to leave alone.
        padding: "keep" leaves padding out; "noise" treats it as any token.
        seed: of the noise.

    Raises:
        TypeError, ValueError, MisconfigurationException, RuntimeError: as of :class:`RandomPositionNoise`.

    Reference:
        A baseline in the code of arXiv 2212.05961. Departures: see
        :func:`~lightning_peft.functional.embedding_noise.salt_and_pepper`.
    """

    def __init__(
        self,
        p: float = 0.1,
        causal: bool | None = None,
        mode: Mode = "replace",
        passes: int = 1,
        reduction: Reduction = "sum",
        execution: Execution = "together",
        prob: float = 1.0,
        embedding: Sequence[str] | None = None,
        protect_ids: Sequence[int] = (),
        padding: Literal["keep", "noise"] = "keep",
        seed: int = 0,
    ) -> None:
        super().__init__(mode, passes, reduction, execution, prob, embedding, protect_ids, padding, seed)
        require_number("p", p)
        require_share("p", p)
        self.p, self.causal = p, causal
        self._backward_only = causal is True

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._hook.attached:
            self._backward_only = is_causal(module) if self.causal is None else self.causal
        super().begin(trainer, module)

    def noise(self, E: Tensor, tokens: Tensor | None, numbers: Numbers) -> Tensor:
        return salt_and_pepper(E, self.p, mask=tokens, causal=self._backward_only, generator=numbers.each(len(E)))

"""RandomPositionNoise: numbers of embeddings copied over others (Yuan et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.arguments import require_number
from lightning_peft.callbacks.embedding_noise import EmbeddingNoise, Mode
from lightning_peft.callbacks.hooked_steps import Numbers
from lightning_peft.callbacks.repeated_steps import Execution, Reduction
from lightning_peft.embeddings import is_causal
from lightning_peft.functional.embedding_noise import (
    Scope,
    Sources,
    random_position_noise,
    require_combination,
    require_share,
)


class RandomPositionNoise(EmbeddingNoise):
    """Copy numbers of embeddings over other numbers of embeddings.

        E'_j = E_s(j)  with probability p,  else E_j;      loss = L(E) + sum_(k = 1..K) L(E'_k)

    A "position" is that of one number (token x dimension), not that of a token. Without an adversary's gradient, and
    without parameters. The paper's form is `RandomPositionNoise(p=0.3, passes=3, scope="batch",
    sources="permutation", padding="noise")`. The default keeps to one example, so that its loss does not depend on who
    shares its batch, and to what is no padding.

    Args:
        p: share of the numbers that are written over.
        passes: K, noisy passes in a step.
        scope: where values come from: "batch", "sample" (the same example), "token" (another dimension of the same
            token) or "dim" (the same dimension of another token).
        sources: "independent", or "permutation" of the whole batch. See
            :func:`~lightning_peft.functional.embedding_noise.random_position_noise`.
        causal: whether values come from earlier tokens only, which a model that predicts the next token needs;
            ``None`` to ask the model's attention.
        mode: "virtual", or "replace" for one noisy pass in the clean one's place.
        reduction: "sum" of the K + 1 losses, as in the paper's code, or their "mean".
        execution: "together", "apart" or "batched"; see
            :class:`~lightning_peft.callbacks.embedding_noise.EmbeddingNoise`.
        prob: how often "replace" has noise.
        embedding: patterns of the embedding layers' names; ``None`` to find that of the model's inputs.
        protect_ids: token ids to leave alone, neither changed nor copied, such as [CLS] and [SEP].
        padding: "keep" leaves padding out; "noise" treats it as any token.
        seed: of the noise.

    Raises:
        TypeError: an argument is of another type.
        ValueError: one is out of range, or two do not go together; the embedding cannot be told.
        MisconfigurationException: the module optimizes by hand, or another callback repeats the step too.
        RuntimeError: while training: the embedding was not called, or gives no (batch, length, d).

    Reference:
        Yuan et al., RPN: A Word Vector Level Data Augmentation Algorithm in Deep Learning for Language Understanding,
        2022, arXiv 2212.05961, and its code. Departures: the defaults; noise is drawn anew for every pass.

    Example:
        >>> RandomPositionNoise(p=0.1, passes=3).scope
        'sample'
    """

    def __init__(
        self,
        p: float = 0.1,
        passes: int = 1,
        scope: Scope = "sample",
        sources: Sources = "independent",
        causal: bool | None = None,
        mode: Mode = "virtual",
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
        require_combination(scope, sources, causal is True)
        self.p, self.scope, self.sources, self.causal = p, scope, sources, causal
        self._backward_only = causal is True

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._hook.attached:
            self._backward_only = is_causal(module) if self.causal is None else self.causal
            if self._backward_only and self.scope == "batch":
                raise MisconfigurationException(
                    f"{type(module).__name__} has a causal model, and scope='batch' copies from later tokens. Use "
                    "scope='sample', which looks back only; or, where no next token is predicted, causal=False."
                )
        super().begin(trainer, module)

    def noise(self, E: Tensor, tokens: Tensor | None, numbers: Numbers) -> Tensor:
        generator = numbers.whole() if self.scope == "batch" else numbers.each(len(E))
        return random_position_noise(
            E, self.p, mask=tokens, scope=self.scope, sources=self.sources, causal=self._backward_only,
            generator=generator,
        )  # fmt: skip

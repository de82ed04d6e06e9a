"""EmbeddingNoise: noise on the embeddings of a model that is trained, in passes of its own or in the clean one's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_peft.arguments import require_integer, require_number
from lightning_peft.callbacks.hooked_steps import HookedStep, Numbers
from lightning_peft.callbacks.repeated_steps import (
    Execution,
    Reduction,
    Step,
    reduced,
    require_apart,
    require_reduction,
    settled,
    terms_follow,
    with_loss,
)
from lightning_peft.embeddings import Called
from lightning_peft.regularizers.counted import told_by

Mode = Literal["virtual", "replace"]


class EmbeddingNoise(HookedStep):
    """Noise on the embeddings of a model's inputs, while it is trained and nowhere else.

        virtual:   loss = L(E) + sum_(k = 1..K) L(noise_k(E)),    or the mean of these K + 1
        replace:   loss = L(noise(E)),   with probability `prob`, else L(E)

    Noise is put on what the embedding layer gives, before positions and normalisation, by a hook: the model still sees
    its token ids, so positions and pooling are those that it would have. Each pass has its own dropout. Without
    gradients, and in validation, test and prediction, there is no noise.

    Noise of an example depends on the seed, the epoch, the batch, the pass and the example's place in the global batch,
    and on nobody's state: a resumed run has the noise that it would have had, two processes have that of one, and what
    activation checkpointing computes again has it again.

    How the K + 1 passes are run ("virtual"):

        "together"   one after the other, and one backward for all: memory for the activations of K + 1 passes
        "apart"      the gradient of each pass is taken before the next begins: memory for one, or for two where terms
                     of the loss look at the first. What is trained must be whole on every process
        "batched"    one pass of the batch K + 1 times over: fast on small batches, memory as "together". For a loss
                     that is a mean over examples, and no batch norm; what the step logs is of all copies

    Gradients are the same up to rounding, where the model has no dropout.

    Args:
        mode: "virtual" or "replace".
        passes: K of "virtual".
        reduction: of the K + 1 losses: "sum" or "mean".
        execution: how they are run.
        prob: how often "replace" has noise.
        embedding: patterns of the layers' names; ``None`` to find that of the model's inputs.
        protect_ids: tokens to leave alone.
        padding: "keep" or "noise".
        seed: of the noise.
    """

    def __init__(
        self,
        mode: Mode,
        passes: int,
        reduction: Reduction,
        execution: Execution,
        prob: float,
        embedding: Sequence[str] | None,
        protect_ids: Sequence[int],
        padding: Literal["keep", "noise"],
        seed: int,
    ) -> None:
        super().__init__(embedding, protect_ids, padding, seed)
        if mode not in ("virtual", "replace"):
            raise ValueError(f"mode={mode!r}: choose 'virtual' (passes beside the clean one) or 'replace'.")
        require_integer("passes", passes)
        if passes < 1:
            raise ValueError(f"passes is how many noisy passes a step has, at least 1. Got {passes}.")
        require_reduction(reduction)
        if execution not in ("together", "apart", "batched"):
            raise ValueError(f"execution={execution!r}: choose 'together', 'apart' or 'batched'.")
        require_number("prob", prob)
        if not 0 < prob <= 1:
            raise ValueError(f"prob is how often a step has noise, above 0 and at most 1. Got {prob}.")
        if mode == "virtual" and prob != 1:
            raise ValueError(f"prob={prob} is for mode='replace': with mode='virtual' every step has its noisy passes.")
        if mode == "replace" and (passes, execution) != (1, "together"):
            raise ValueError(
                f"mode='replace' has one pass, and got passes={passes}, execution={execution!r}. Use mode='virtual'."
            )
        self.mode, self.passes, self.reduction, self.execution, self.prob = mode, passes, reduction, execution, prob
        self._copies: dict[int, int] = {}

    @abstractmethod
    def noise(self, E: Tensor, tokens: Tensor | None, numbers: Numbers) -> Tensor:
        """(B, L, d) of E with noise on `tokens`, (B, L) bool or ``None`` for all."""

    @property
    def repeats(self) -> bool:
        return self.mode == "virtual"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.execution == "apart":
            require_apart(trainer, pl_module, type(self).__name__)
        if self.execution == "batched":
            norm = next((n for n, m in pl_module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)), "")
            if norm:
                raise MisconfigurationException(
                    f"{norm!r} normalises over the batch, in which execution='batched' has noisy and clean examples "
                    "together. Use execution='together'."
                )

    def run(self, step: Step) -> Any:
        if self.mode == "replace":
            return self._replaced(step)
        if self.execution == "batched":
            return self._batched(step)
        return self._one_by_one(step)

    def _replaced(self, step: Step) -> Any:
        number = self._take(step)
        if self.prob < 1:
            text = f"lightning_peft/embedding_noise/v1|prob|{self.seed}|{self._passes[number].place}"
            if torch.rand((), generator=told_by(text, "cpu")) >= self.prob:
                return step.first()
        with self._changing(number):
            outputs = step.first()
        if outputs is None or not step.module.automatic_optimization:
            return outputs
        return with_loss(outputs, self._hook.marked(step.loss(outputs), number))

    def _one_by_one(self, step: Step) -> Any:
        number = self._take(step, 1 + self.passes)
        outputs = step.first()
        if outputs is None:
            return None  # the user skips this batch
        losses = [self._settled(step, step.loss(outputs), number, keep=terms_follow(step))]
        noisy = []
        for i in range(number + 1, number + 1 + self.passes):
            with self._changing(i):
                loss = step.loss(step.again())
            noisy.append(loss.detach())
            losses.append(self._settled(step, loss, i, last=i == number + self.passes))
        step.module.log("loss/noisy", torch.stack(noisy).mean(), rank_zero_only=True)
        return with_loss(outputs, reduced(losses, self.reduction))

    def _settled(self, step: Step, loss: Tensor, number: int, last: bool = False, keep: bool = False) -> Tensor:
        loss = self._hook.marked(loss, number)
        if self.execution == "together" or last or not loss.requires_grad:
            return loss
        return settled(step.module, loss, keep_graph=keep)[0]

    def _batched(self, step: Step) -> Any:
        number = self._take(step, 1 + self.passes)
        rows = next((len(leaf) for leaf in tree_leaves(step.batch) if isinstance(leaf, Tensor) and leaf.dim()), 0)
        copies = 1 + self.passes

        def repeat(tensor: Tensor) -> Tensor:
            return torch.cat([tensor] * copies) if tensor.dim() and len(tensor) == rows else tensor

        def cut(tensor: Tensor) -> Tensor:
            return tensor[:rows] if tensor.dim() and len(tensor) == rows * copies else tensor

        step.args, step.kwargs = apply_to_collection((step.args, step.kwargs), Tensor, repeat)
        self._copies[number] = copies
        with self._changing(number):
            outputs = step.first()
        if outputs is None:
            return None
        loss = self._hook.marked(step.loss(outputs), number)
        if isinstance(outputs, Mapping):
            outputs = apply_to_collection(dict(outputs), Tensor, cut)
        return with_loss(outputs, loss * copies if self.reduction == "sum" else loss)

    def _forget(self) -> None:
        super()._forget()
        self._copies = {}

    def changed(self, E: Tensor, called: Called) -> Tensor:
        copies = self._copies.get(called.passed, 1)
        if copies == 1:
            return self._noisy(E, called.ids, called, called.passed)
        if len(E) % copies:
            raise RuntimeError(
                f"the embedding {called.name!r} was called with {len(E)} rows for a batch that is {copies} times over, "
                "so there is no telling which are to have noise. Use execution='together'."
            )
        first, *others = E.chunk(copies)
        ids = [None] * copies if called.ids is None else called.ids.chunk(copies)
        rows = enumerate(others, start=1)
        return torch.cat([first, *(self._noisy(part, ids[k], called, called.passed + k) for k, part in rows)])

    def _noisy(self, E: Tensor, ids: Tensor | None, called: Called, passed: int) -> Tensor:
        return self.noise(E, self.tokens(E, ids, called), self.numbers(called, passed, E.device))

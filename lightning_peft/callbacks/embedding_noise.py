"""Noise on embeddings while training: RandomPositionNoise (Yuan et al., 2022), and what it is compared with."""

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
from lightning_peft.embeddings import Called, is_causal
from lightning_peft.functional.embedding_noise import (
    Scope,
    Sources,
    gaussian_noise,
    neftune_noise,
    random_position_noise,
    require_combination,
    require_share,
    salt_and_pepper,
    token_cutoff,
)
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
        execution: "together", "apart" or "batched"; see :class:`EmbeddingNoise`.
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


class GaussianNoise(EmbeddingNoise):
    """Add noise to embeddings.

        gaussian:   E' = E + size eps,                eps ~ N(0, 1)
        neftune:    E' = E + size / sqrt(n d) eps,    eps ~ U(-1, 1),  n tokens of d numbers in the example

    Args:
        size: sigma of "gaussian", in the unit of the embeddings; alpha of "neftune", 5 to 15 in its paper.
        form: "gaussian" or "neftune".
        mode: "replace" for one noisy pass, or "virtual"; see :class:`EmbeddingNoise` for it and what follows.
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
        mode: "replace" for one noisy pass, or "virtual"; see :class:`EmbeddingNoise` for it and what follows.
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
        mode: "replace" for one noisy pass, or "virtual"; see :class:`EmbeddingNoise` for it and what follows.
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
        return salt_and_pepper(E, self.p, mask=tokens, generator=numbers.each(len(E)))

"""HookedStep: what changes the embeddings of a training step, with random numbers that depend on nobody else's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.arguments import require_integer
from lightning_peft.callbacks.repeated_steps import RepeatedStep, Step
from lightning_peft.distributed import rank
from lightning_peft.embeddings import Called, EmbeddingHook, find_embeddings, is_same
from lightning_peft.functional.embedding_noise import noisy_tokens
from lightning_peft.padding import shown_texts
from lightning_peft.patterns import require_patterns
from lightning_peft.regularizers.counted import told_by
from lightning_peft.surgery.layers import adapters


@dataclass(frozen=True)
class Numbers:
    """The random numbers of one call of an embedding.

    They depend on the seed, the place in the training data, the pass and the call: a run that is resumed has those that
    it would have had, whatever else draws, and nothing has to be saved.
    """

    text: str
    device: torch.device

    def each(self, count: int) -> list[torch.Generator]:
        """A generator for each of this process's examples, that of its place in the global batch.

        Processes that share a batch evenly, one after the other, draw what one process draws for all of it.
        """
        first = rank() * count
        return [told_by(f"{self.text}|{first + i}", self.device) for i in range(count)]

    def whole(self) -> torch.Generator:
        """One generator for all of this process's examples, another one on every process."""
        return told_by(f"{self.text}|process {rank()}", self.device)


@dataclass(frozen=True)
class Pass:
    """One pass whose embeddings are changed.

    Attributes:
        place: where it is in the training data: epoch, batch, number of the pass.
        texts: of the batch, ids if known, and (B, L) bool, what of them is no padding.
    """

    place: str
    texts: Sequence[tuple[Tensor | None, Tensor]]

    def mask(self, ids: Tensor | None) -> Tensor | None:
        """Of these ids what is no padding, if the batch says so. Of several texts it is that of the same ids."""
        if len(self.texts) < 2:
            return self.texts[0][1] if self.texts else None
        own = next((shown for known, shown in self.texts if is_same(known, ids)), None)
        if own is not None or ids is None:
            return own
        # Copies, which a module may have made: their numbers tell.
        alike = ((known, shown) for known, shown in self.texts if known is not None and known.shape == ids.shape)
        return next((shown for known, shown in alike if torch.equal(known, ids)), None)


class HookedStep(RepeatedStep):
    """A step whose embeddings are changed by hooks, in the passes that ask for it.

    Args:
        embedding: patterns of the embedding layers; ``None`` to find that of the model's inputs.
        protect_ids: tokens to leave alone.
        padding: "keep" leaves padding alone, "noise" treats it as any token.
        seed: of the random numbers.
    """

    def __init__(self, embedding: Sequence[str] | None, protect_ids: Sequence[int], padding: str, seed: int) -> None:
        super().__init__()
        if embedding is not None:
            require_patterns("embedding", embedding)
        given: object = protect_ids
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(f"protect_ids must be a list of token ids. Got {protect_ids!r}.")
        for token in protect_ids:
            require_integer("a token of protect_ids", token)
        if padding not in ("keep", "noise"):
            raise ValueError(f"padding={padding!r}: choose 'keep' or 'noise' (as any other token).")
        require_integer("seed", seed)
        self.embedding, self.protect_ids, self.padding, self.seed = embedding, tuple(protect_ids), padding, seed
        self._hook = EmbeddingHook(self._change)
        self._layers: dict[str, nn.Module] = {}
        self._left_alone: tuple[int, ...] = ()
        self._longer: tuple[Adapter, ...] = ()
        self._passes: dict[int, Pass] = {}
        self._batch = (-1, -1)
        self._next = 0

    @abstractmethod
    def changed(self, E: Tensor, called: Called) -> Tensor:
        """What an embedding gives in place of E; the same again wherever the call is the same.

        Args:
            E: (B, L, d).
            called: the call.
        """

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._hook.attached:
            # What is embedded for a prompt's columns is replaced: noise leaves them alone, and does not read them.
            self._longer = tuple(each for each in adapters(module).values() if each.placeholder is not None)
            own = {adapter.placeholder for adapter in self._longer}
            self._left_alone = (*self.protect_ids, *(token for token in own if token is not None))
            self._layers = dict(find_embeddings(module, self.embedding))
            self._hook.attach(self._layers)

    def end(self) -> None:
        self._hook.detach()
        self._layers, self._longer, self._passes, self._batch = {}, (), {}, (-1, -1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._batch = (-1, -1)  # a finder may have begun with the same batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._forget()

    def _forget(self) -> None:
        self._hook.forget()
        self._passes = {}

    def _take(self, step: Step, count: int = 1) -> int:
        """Numbers of so many passes, the first of them."""
        trainer = step.module.trainer
        # Also in a checkpoint from amid an epoch, and after an error, this is the place of the batch.
        batch = (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx)
        if batch != self._batch:
            self._batch, self._next = batch, 0
            self._forget()
        number, self._next = self._next, self._next + count
        texts = shown_texts(step.batch) if self.padding == "keep" else []
        for i in range(number, number + count):
            self._passes[i] = Pass(f"{batch[0]}|{batch[1]}|{i}", texts)
        return number

    def _changing(self, number: int) -> AbstractContextManager[None]:
        return self._hook.passing(number)

    def _change(self, E: Tensor, called: Called) -> Tensor:
        if E.dim() != 3:
            raise RuntimeError(
                f"the embedding {called.name!r} gives {tuple(E.shape)}, and {type(self).__name__} needs (batch, length,"
                " d). Name the one that tokens go through: embedding=['tokens']."
            )
        return self.changed(E, called)

    def tokens(self, E: Tensor, ids: Tensor | None, called: Called) -> Tensor | None:
        """(B, L) bool, the tokens of E that may be changed; ``None`` for all."""
        if ids is not None and ids.shape != E.shape[:2]:
            ids = None
        mask = self._passes[called.passed].mask(called.ids)
        if mask is not None and mask.shape != E.shape[:2] and len(mask) == len(E):
            for adapter in self._longer:
                longer = adapter.lengthened(mask.long())
                if longer is not None and longer.shape == E.shape[:2]:
                    return noisy_tokens(ids, longer, self.protect_ids)
        if mask is None or mask.shape != E.shape[:2]:
            padding = getattr(self._layers[called.name], "padding_idx", None)
            mask = None
            if self.padding == "keep" and isinstance(padding, int) and ids is not None:
                mask = ids.ne(padding)
        return noisy_tokens(ids, mask, self._left_alone)

    def numbers(self, called: Called, passed: int, device: torch.device) -> Numbers:
        """The random numbers of a call."""
        place = f"{self.seed}|{self._passes[passed].place}|{called.call}"
        return Numbers(f"lightning_peft/embedding_noise/v1|{type(self).__name__}|{place}", device)

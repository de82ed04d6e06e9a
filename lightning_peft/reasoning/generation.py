"""Texts that a frozen model writes, in batches, with random numbers that belong to a question and not to a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from lightning_peft.modules.pretrained import padding_of


class Ask(NamedTuple):
    """A prompt; a seed to sample by, or ``None`` for the most likely token each time."""

    prompt: str
    seed: int | None = None


class Written(NamedTuple):
    """A text, and the tokens that were read and written for it."""

    text: str
    n_prompt_tokens: int
    n_new_tokens: int


def seed_of(*parts: object) -> int:
    """A seed of what it is for: the same in every process, batch and order."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**63


class SeededSampling(LogitsProcessor):
    """Sampling as a greedy choice: each row's scores get Gumbel noise from the row's own generator.

    The largest of the log-probabilities plus Gumbel noise is a draw from the distribution (Gumbel, 1954), so `generate`
    chooses greedily and what a row draws depends on its seed alone: not on the other rows, nor on a global generator.

    Args:
        seeds: one per row; ``None`` leaves the row greedy.
        temperature: divides the scores, above 0.
        top_p: the fewest tokens that together have this probability can be drawn.
    """

    def __init__(self, seeds: Sequence[int | None], temperature: float, top_p: float) -> None:
        self._generators = [None if seed is None else torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature, self._top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [i for i, generator in enumerate(self._generators) if generator is not None]
        if not rows:
            return scores
        chances = (scores[rows].float() / self._temperature).log_softmax(-1)
        ordered, order = chances.sort(dim=-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        unlikely = torch.zeros_like(chances, dtype=torch.bool).scatter(-1, order, before >= self._top_p)
        # On the CPU, where generators draw the same numbers for every device.
        noise = torch.stack(
            [torch.empty(scores.shape[-1]).exponential_(generator=self._generators[i]).log().neg() for i in rows]
        ).to(chances.device)
        scores = scores.clone()
        scores[rows] = (chances + noise).masked_fill(unlikely, -torch.inf).to(scores.dtype)
        return scores


class StopsAt(StoppingCriteria):
    """Ends each row whose text has come to one of these.

    Texts are compared, with any tokenizer: transformers' own criterion looks for tokens that can end in a text, and
    fails where a vocabulary has none.

    Args:
        tokenizer: the model's.
        stop: what ends a text.
        width: tokens of the prompts, which are not looked at.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int) -> None:
        self._tokenizer, self._stop, self._width = tokenizer, tuple(stop), width
        self._tail = max(len(text.encode()) for text in stop) + 4  # a token has one byte at least

    def __call__(self, input_ids: Tensor, scores: Tensor, **how: Any) -> Tensor:
        tails = input_ids[:, max(self._width, input_ids.shape[1] - self._tail) :]
        texts = self._tokenizer.batch_decode(tails, skip_special_tokens=True)
        ended = [any(stop in text for stop in self._stop) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


class Writer:
    """A causal language model and its tokenizer, in batches that are padded on the left.

    The model's mode is put back after each batch, no gradient is made, and no global generator is used.

    Args:
        model: anything with transformers' `generate`.
        tokenizer: the model's; where it has a chat template, a prompt is a user's turn.
        max_context_tokens: what a prompt and its text may have together; ``None`` for what the model's config says.
        temperature: of what is sampled.
        top_p: likewise.
        batch_size: prompts at a time.
        stop: texts that end an answer.
        progress: told after each batch how many texts of a stage are written, and of how many.
    Raises:
        ValueError: temperature or top_p that is not above 0, top_p above 1, batch_size below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_context_tokens: int | None = None,
        temperature: float = 0.7,
        top_p: float = 0.95,
        batch_size: int = 16,
        stop: Sequence[str] = ("\nQ:",),
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        for name, value, most in (("temperature", temperature, float("inf")), ("top_p", top_p, 1.0)):
            if not 0 < value <= most:
                raise ValueError(f"{name}={value}: it is above 0{' and at most 1' if most == 1 else ''}.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: it must be at least 1.")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.temperature, self.top_p, self.stop, self.progress = temperature, top_p, tuple(stop), progress
        limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        self.max_context_tokens: int | None = limit if max_context_tokens is None else max_context_tokens

    def tokens(self, prompt: str) -> list[int]:
        """The tokens of a prompt as the model reads it."""
        ids: list[int]
        if getattr(self.tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(prompt)["input_ids"]
        return ids

    def fits(self, prompt: str, max_new_tokens: int) -> bool:
        """Whether a prompt leaves room for a text of so many tokens."""
        limit = self.max_context_tokens
        return limit is None or len(self.tokens(prompt)) + max_new_tokens <= limit

    def write(self, asks: Sequence[Ask], max_new_tokens: int, stop: Sequence[str] | None = None) -> list[Written]:
        """A text for each prompt, in their order.

        Args:
            asks: the prompts.
            max_new_tokens: of a text, at most.
            stop: texts that end one; ``None`` for the writer's own.

        Raises:
            ValueError: a prompt leaves too little room in the context.
        """
        rows = [self.tokens(ask.prompt) for ask in asks]
        limit = self.max_context_tokens
        for ids, ask in zip(rows, asks, strict=True):
            if limit is not None and len(ids) + max_new_tokens > limit:
                raise ValueError(
                    f"a prompt has {len(ids)} tokens, and with {max_new_tokens} new ones more than "
                    f"max_context_tokens={limit}: {ask.prompt[:60]!r}. Give fewer new tokens, or shorter questions."
                )
        stop = self.stop if stop is None else tuple(stop)
        found: list[Written] = []
        with _evaluating(self.model), torch.inference_mode():
            for at in range(0, len(rows), self.batch_size):
                part = slice(at, at + self.batch_size)
                found += self._batch(rows[part], [ask.seed for ask in asks[part]], max_new_tokens, stop)
                if self.progress is not None:
                    self.progress(len(found), len(rows))
        return found

    def _batch(
        self, rows: list[list[int]], seeds: list[int | None], max_new_tokens: int, stop: Sequence[str]
    ) -> list[Written]:
        pad, width = padding_of(self.tokenizer), max(map(len, rows))
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        ids = torch.tensor([[*[pad] * (width - len(row)), *row] for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        model: Any = self.model
        stopping = StoppingCriteriaList([StopsAt(self.tokenizer, stop, width)] if stop else [])
        whole = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([SeededSampling(seeds, self.temperature, self.top_p)]),
            stopping_criteria=stopping,
        )
        texts = [self._kept(row, pad) for row in whole[:, width:].tolist()]
        return [
            Written(_cut(self.tokenizer.decode(new, skip_special_tokens=True), stop), len(row), len(new))
            for new, row in zip(texts, rows, strict=True)
        ]

    def _kept(self, new: list[int], pad: int) -> list[int]:
        """The tokens before the end of a text."""
        own = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ends = {self.tokenizer.eos_token_id, pad, *(own if isinstance(own, list) else [own])}
        return new[: next((i for i, token in enumerate(new) if token in ends), len(new))]


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before whatever stops it; the model may have written a little more within one token."""
    return text[: min((at for each in stop if (at := text.find(each)) >= 0), default=len(text))].strip()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

"""Sentences from points of the latent space: the likeliest word each time, random words, or a beam."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.modules.text_vae.decoders import TextDecoder
from lightning_peft.modules.vocabulary import END, PAD, START


@torch.no_grad()
def one_by_one(
    decoder: TextDecoder,
    z: Tensor,
    length: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    known: int | None = None,
) -> Tensor:
    """One word after the other, until the sentence ends.

        w_t ~ softmax(logits_t / temperature),   the likeliest word for temperature 0

    Filling and starts are no words, and not drawn.

    Args:
        decoder: in evaluation mode, or with its dropout.
        z: (batch, latent).
        length: words at most.
        temperature: 0 for the likeliest word each time.
        generator: of the draws, on the device of z; ``None`` for the global one.
        known: words that there are, where the decoder has room for more; ``None`` for all.

    Returns:
        (batch, at most length) words with their end, filled up with PAD.

    Raises:
        ValueError: temperature is below 0, or length below 1.
    """
    _require(length)
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: it is 0 for the likeliest words, or above.")
    token = torch.full((len(z),), START, device=z.device)
    state = decoder.start(z)
    ended = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    words: list[Tensor] = []
    for _ in range(length):
        logits, state = decoder.step(token, state)
        logits = _words_only(logits, known)
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        words.append(token.masked_fill(ended, PAD))
        ended = ended | (token == END)
        if ended.all():
            break
    return torch.stack(words, 1)


@torch.no_grad()
def beam_search(decoder: TextDecoder, z: Tensor, length: int, width: int, known: int | None = None) -> Tensor:
    """The likeliest of `width` sentences that are kept at each word, by the sum of their words' log-probabilities.

    A sentence that has ended keeps its sum; there is no correction for length.

    Args:
        decoder: in evaluation mode.
        z: (batch, latent).
        length: words at most.
        width: sentences that are kept; 1 is the likeliest word each time.
        known: words that there are, where the decoder has room for more; ``None`` for all.

    Returns:
        (batch, at most length) words with their end, filled up with PAD.

    Raises:
        ValueError: width or length is below 1.
    """
    _require(length)
    if width < 1:
        raise ValueError(f"beam={width}: at least 1 sentence is kept.")
    rows = len(z)
    state = decoder.start(z.repeat_interleave(width, 0))
    token = torch.full((rows * width,), START, device=z.device)
    # At first all kept sentences are the same: only one of them may go on.
    scores = torch.full((rows, width), -torch.inf, device=z.device)
    scores[:, 0] = 0.0
    ended = torch.zeros(rows, width, dtype=torch.bool, device=z.device)
    words = torch.empty(rows, width, 0, dtype=torch.int64, device=z.device)
    for _ in range(length):
        logits, state = decoder.step(token, state)
        steps = _words_only(logits, known).float().log_softmax(-1).view(rows, width, -1)
        only_pad = torch.full_like(steps, -torch.inf)
        only_pad[..., PAD] = 0.0
        total = scores[..., None] + torch.where(ended[..., None], only_pad, steps)
        scores, best = total.flatten(1).topk(width, dim=1)
        origin, token = best // steps.shape[-1], best % steps.shape[-1]
        words = torch.cat([words.gather(1, origin[..., None].expand_as(words)), token[..., None]], -1)
        ended = ended.gather(1, origin) | (token == END)
        flat = (origin + width * torch.arange(rows, device=z.device)[:, None]).flatten()
        state = tuple(part[flat] for part in state)
        token = token.flatten()
        if ended[:, 0].all():
            break
    return words[:, 0]


def _words_only(logits: Tensor, known: int | None) -> Tensor:
    numbers = torch.arange(logits.shape[-1], device=logits.device)
    barred = (numbers == PAD) | (numbers == START)
    if known is not None:
        barred |= numbers >= known
    return logits.masked_fill(barred, -torch.inf)


def _require(length: int) -> None:
    if length < 1:
        raise ValueError(f"length={length}: a sentence has at least 1 word.")

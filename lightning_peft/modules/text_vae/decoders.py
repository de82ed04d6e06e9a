"""Decoders of sentences: p(x | z), one word after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_peft.modules.text_vae.encoders import start_uniform
from lightning_peft.modules.text_vae.noise import PrivateDropout

State = tuple[Tensor, ...]
"""What a decoder knows of the words so far; the first dimension of each tensor is the batch."""


class TextDecoder(nn.Module, ABC):
    """Predicts each word of a sentence from z and the words before it."""

    @abstractmethod
    def forward(self, z: Tensor, tokens: Tensor) -> Tensor:
        """Scores of the next word behind each given one.

        Shape:
            z: (batch, latent), tokens: (batch, length) -> logits (batch, length, vocabulary)
        """

    @abstractmethod
    def start(self, z: Tensor) -> State:
        """The state before the first word."""

    @abstractmethod
    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Scores of the next word, and the state behind this one.

        Shape:
            token: (batch,) -> logits (batch, vocabulary)
        """


DecoderFactory = Callable[[int, int], TextDecoder]
"""Makes a decoder for so many words and a latent space of such a width."""


class LSTMDecoder(TextDecoder):
    """An LSTM that sees z beside every word, and starts from it.

        c_0 = W z,   h_0 = tanh(c_0)

    Args:
        vocabulary_size: words.
        latent: width of z.
        embedding: width of a word's embedding.
        hidden: width of the LSTM.
        dropout: of its inputs and of its outputs.
        start: weights start in U(-start, start), see :class:`LSTMEncoder`.

    Raises:
        ValueError: dropout is outside [0, 1), or start not above 0.

    Reference:
        He et al. 2019, "Lagging Inference Networks", arXiv 1901.05534: their released code.
    """

    def __init__(
        self,
        vocabulary_size: int,
        latent: int,
        embedding: int = 512,
        hidden: int = 1024,
        dropout: float = 0.5,
        start: float = 0.01,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary_size, embedding)
        self.cell = nn.Linear(latent, hidden, bias=False)
        self.lstm = nn.LSTM(embedding + latent, hidden, batch_first=True)
        self.output = nn.Linear(hidden, vocabulary_size, bias=False)
        self.drop_in, self.drop_out = PrivateDropout(dropout), PrivateDropout(dropout)
        start_uniform(self, start)

    def forward(self, z: Tensor, tokens: Tensor) -> Tensor:
        logits, _ = self._run(z, tokens, self.start(z))
        return logits

    def start(self, z: Tensor) -> State:
        cell: Tensor = self.cell(z)
        return cell.tanh(), cell, z

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        logits, state = self._run(state[2], token[:, None], state)
        return logits[:, 0], state

    def _run(self, z: Tensor, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        words = self.drop_in(self.embed(tokens))
        inputs = torch.cat([words, z[:, None].expand(-1, tokens.shape[1], -1)], -1)
        hidden, cell, _ = state
        # Under autocast the given state is of another dtype than what the LSTM computes in.
        outputs, (hidden, cell) = self.lstm(inputs, (hidden.to(inputs)[None], cell.to(inputs)[None]))
        return self.output(self.drop_out(outputs)), (hidden[0], cell[0], z)


class Block(nn.Module):
    """Causal self-attention and a feed-forward part, each behind a layer norm and with a shortcut.

    Args:
        width: of the words.
        heads: of the attention.
        dropout: of what each part adds.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = PrivateDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """One layer. Shape: (batch, length, width) -> the same."""
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.drop(self.out(seen.transpose(1, 2).reshape(batch, length, width)))
        added: Tensor = self.drop(self.feed(self.norm2(x)))
        return x + added


class TransformerDecoder(TextDecoder):
    """A small transformer, with z added to every word. Its shape is our choice.

        x_t = E[w_t] + P[t] + W z

    Args:
        vocabulary_size: words.
        latent: width of z.
        width: of the words.
        layers: number of blocks.
        heads: of the attention; they divide the width.
        dropout: of the words, and of what each part of a block adds.
        positions: words of the longest sentence.

    Raises:
        ValueError: heads do not divide the width.
    """

    def __init__(
        self,
        vocabulary_size: int,
        latent: int,
        width: int = 256,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
        positions: int = 128,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} do not divide width={width}; choose one of its divisors.")
        self.embed, self.place = nn.Embedding(vocabulary_size, width), nn.Embedding(positions, width)
        self.latent = nn.Linear(latent, width, bias=False)
        self.drop = PrivateDropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary_size, bias=False)

    def forward(self, z: Tensor, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.place.num_embeddings:
            raise ValueError(
                f"a sentence has {length} words, and positions={self.place.num_embeddings}: cut sentences shorter "
                "(Sentences(most=...)), or give the decoder more positions."
            )
        words = self.embed(tokens) + self.place.weight[:length] + self.latent(z)[:, None]
        logits: Tensor = self.output(self.norm(self.blocks(self.drop(words))))
        return logits

    def start(self, z: Tensor) -> State:
        return z, torch.empty(len(z), 0, dtype=torch.int64, device=z.device)

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        z, before = state
        tokens = torch.cat([before, token[:, None]], 1)  # all of it again: sentences are short
        return self(z, tokens)[:, -1], (z, tokens)

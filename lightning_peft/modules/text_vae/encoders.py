"""Encoders of sentences: what q(z | x) is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel

from lightning_peft.modules.pretrained import from_folder_or_hub
from lightning_peft.modules.sentence_data import SentenceBatch
from lightning_peft.modules.vocabulary import PAD


class Encoded(NamedTuple):
    """What an encoder makes of a batch.

    Attributes:
        state: (batch, features), from which mean and variance are read.
        tokens: (batch, embedding), the mean of the tokens' embeddings.
    """

    state: Tensor
    tokens: Tensor


class TextEncoder(nn.Module, ABC):
    """Makes one vector of a sentence.

    Attributes:
        features: its width.
        embedding: width of a token's embedding.
    """

    features: int
    embedding: int

    @abstractmethod
    def forward(self, batch: SentenceBatch) -> Encoded:
        """Encode a batch."""


EncoderFactory = Callable[[int], TextEncoder]
"""Makes an encoder for a vocabulary of so many words: a class, or `partial(LSTMEncoder, hidden=256)`."""


def start_uniform(module: nn.Module, start: float) -> None:
    """U(-start, start), and ten times that for embeddings: 0.01 gives the start values of He et al. 2019."""
    if start <= 0:
        raise ValueError(f"start={start}: weights are drawn from (-start, start); give a number above 0, such as 0.01.")
    embeddings = [part.weight for part in module.modules() if isinstance(part, nn.Embedding)]
    for parameter in module.parameters():
        bound = 10 * start if any(parameter is weight for weight in embeddings) else start
        nn.init.uniform_(parameter, -bound, bound)


class LSTMEncoder(TextEncoder):
    """The last state of an LSTM that has read the sentence.

    Args:
        vocabulary_size: words.
        embedding: width of a word's embedding.
        hidden: width of the LSTM.
        start: its weights start in U(-start, start), embeddings in ten times that. With 0.01, that of He et al. for
            long training by SGD of rate 1, all sentences have nearly one state at first; 0.1 tells them apart.

    Raises:
        ValueError: start is not above 0.

    Shape:
        tokens: (batch, length) -> state (batch, hidden), tokens (batch, embedding)

    Reference:
        He et al. 2019, "Lagging Inference Networks", arXiv 1901.05534: their released code.
    """

    def __init__(self, vocabulary_size: int, embedding: int = 512, hidden: int = 1024, start: float = 0.01) -> None:
        super().__init__()
        self.features, self.embedding = hidden, embedding
        self.embed = nn.Embedding(vocabulary_size, embedding)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)
        start_uniform(self, start)

    def forward(self, batch: SentenceBatch) -> Encoded:
        tokens = batch["tokens"]
        words = self.embed(tokens)
        # Behind a sentence's end the LSTM reads on, and what it makes of the filling is not looked at: cheaper than
        # packing, with batches of like length.
        states, _ = self.lstm(words)
        last = batch["lengths"].to(tokens.device)
        present = (tokens != PAD)[..., None]
        mean = (words * present).sum(1) / present.sum(1)
        return Encoded(states[torch.arange(len(tokens), device=tokens.device), last], mean)


class PretrainedEncoder(TextEncoder):
    """The mean of a frozen transformer's last hidden states; `AdapterInjection` makes it trainable.

    Its own dropout is off: it draws from the global generator, and the noise of z takes its place. `SentenceData` needs
    the same `tokenizer`.

    Args:
        vocabulary_size: words of the decoder; the encoder has its own.
        backbone: hub name, or folder with a ``config.json`` and weights.

    Shape:
        input_ids, attention_mask: (batch, length) -> state, tokens (batch, width of the transformer)

    Raises:
        ValueError: the backbone cannot be found.
    """

    def __init__(self, vocabulary_size: int, backbone: str) -> None:
        super().__init__()
        self.backbone, _ = from_folder_or_hub(AutoModel, backbone)
        self.backbone.requires_grad_(False)
        for part in self.backbone.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        width: Any = self.backbone.get_input_embeddings().embedding_dim  # type: ignore[operator]
        config: Any = self.backbone.config
        self.features, self.embedding = int(config.hidden_size), int(width)

    def forward(self, batch: SentenceBatch) -> Encoded:
        if "input_ids" not in batch:
            raise ValueError(
                "PretrainedEncoder reads subwords, and the batch has none: give SentenceData the tokenizer=... of its "
                "backbone."
            )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        hidden = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        share = (mask / mask.sum(1, keepdim=True)).to(hidden.dtype)[..., None]
        with torch.no_grad():
            words = self.backbone.get_input_embeddings()(ids)  # type: ignore[operator]
        return Encoded((hidden * share).sum(1), (words * share).sum(1))

"""Where prompts start: the embeddings of tokens, of a text or drawn from the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_peft.adapters.prompts.text_model import TextModel, embedded
from lightning_peft.arguments import require_integer

Start = Literal["vocabulary", "text", "random"]


def first_rows(base: nn.Module, length: int, init: Start, text_ids: Sequence[int] | None) -> Tensor:
    """What a prompt starts with: (length, d), in float32 or wider.

    Args:
        base: a transformers model.
        length: how many rows.
        init: "vocabulary": embeddings of different tokens, drawn at random; "text": those of `text_ids`; "random":
            normal numbers with the embeddings' mean square.
        text_ids: see :func:`token_rows`.
    """
    if init != "random":
        return token_rows(base, length, text_ids)
    embedding = TextModel.of(base).embedding()
    weight = embedding.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows = torch.randn(length, embedding.embedding_dim, dtype=dtype, device=weight.device)
    return rows * embeddings_size(base)


def token_rows(base: nn.Module, length: int, text_ids: Sequence[int] | None) -> Tensor:
    """Embeddings of tokens as the model embeds them: (length, d), in float32 or wider.

    Args:
        base: a transformers model.
        length: how many rows.
        text_ids: token ids of a text, repeated and cut; ``None`` for different tokens, drawn by torch's global
            generator.
    """
    embedding = TextModel.of(base).embedding()
    if text_ids is not None:
        ids = torch.tensor(text_ids).repeat(-(-length // len(text_ids)))[:length]
    else:
        # More than the vocabulary has: over again.
        rounds = -(-length // embedding.num_embeddings)
        ids = torch.cat([torch.randperm(embedding.num_embeddings) for _ in range(rounds)])[:length]
    return embedded(embedding, ids)


def embeddings_size(base: nn.Module) -> float:
    """Root mean square of the entries of the model's token embeddings, as the model embeds them."""
    embedding = TextModel.of(base).embedding()
    square = embedded(embedding, torch.arange(embedding.num_embeddings)).square().mean()
    return float(square.sqrt())


def without_values(base: nn.Module) -> bool:
    """Whether the model is on the meta device, where there is nothing to start from."""
    return TextModel.of(base).embedding().weight.device.type == "meta"


def require_start(base: nn.Module, init: Start, text_ids: Sequence[int] | None) -> list[int] | None:
    """The ids as a list, checked together with what they are for.

    Raises:
        TypeError: one is no integer.
        ValueError: `init` is unknown; `text_ids` are missing, not asked for, or not in the vocabulary.
    """
    if init not in get_args(Start):
        raise ValueError(f"init must be 'vocabulary', 'text' or 'random'. Got {init!r}.")
    if (init == "text") != (text_ids is not None):
        raise ValueError(
            f"text_ids are the token ids of a text to start with, for init='text' alone. Got init={init!r} and "
            f"text_ids={text_ids!r}."
        )
    return require_text(base, text_ids)


def require_text(base: nn.Module, text_ids: Sequence[int] | None) -> list[int] | None:
    """The ids as a list, checked.

    Raises:
        TypeError: one is no integer.
        ValueError: there is none, or one is not in the vocabulary.
    """
    if text_ids is None:
        return None
    vocabulary = TextModel.of(base).embedding().num_embeddings
    if len(text_ids) == 0:
        raise ValueError("text_ids are the token ids of a text to start with, at least one. Got none.")
    for token in text_ids:
        require_integer("a token id in text_ids", token)
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"text_ids has {token}, and the model's vocabulary {vocabulary} tokens. Take the ids from the model's "
                "own tokenizer."
            )
    return [int(token) for token in text_ids]

"""Prompt tuning: one trained vector per virtual token.

Lester, Al-Rfou, Constant, The Power of Scale for Parameter-Efficient Prompt Tuning, 2021, arXiv 2104.08691.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapters.prompts.base import Prompt, PromptPosition
from lightning_peft.adapters.prompts.text_model import TextModel, embedded
from lightning_peft.arguments import require_integer
from lightning_peft.rank.gate import Gate

Start = Literal["vocabulary", "text", "random"]


class SoftPrompt(Prompt):
    """Trained vectors in front of the text, and nothing else.

        H = [ diag(value) P ; X ]

    P: (m, d), trained.  value: (m,), the gate's mask: a virtual token is a component. One that is closed is a zero
    vector; it keeps its column and its position, so it is not cut out.

    Args:
        base: a transformers model that reads token ids; frozen and kept.
        length: m, virtual tokens.
        init: where P starts. "vocabulary": embeddings of m different tokens, drawn at random; "text": those of
            `text_ids`, repeated and cut to m; "random": normal numbers with the embeddings' mean square.
        text_ids: token ids of a text that says what the task is, for init="text".
        prompt_position: "start", or "after_cls": after the first token of each text.

    Raises:
        TypeError: the base is no transformers model that reads token ids; or a token id is no integer.
        ValueError: length or init is out of range; `text_ids` are missing, not asked for, or not in the vocabulary.

    Reference:
        Lester et al. 2021, sections 2 and 2.1 (their three ways to start; "class labels" is text here).

    Departures:
        The gate is ours. "random" takes its width from the embeddings, not the paper's U(-0.5, 0.5), which is made for
        T5's (remembered). "vocabulary" draws from all tokens, the paper from the 5,000 most frequent (remembered).
    """

    P: nn.Parameter
    gate: Gate

    def __init__(
        self,
        base: nn.Module,
        length: int = 20,
        init: Start = "vocabulary",
        text_ids: Sequence[int] | None = None,
        prompt_position: PromptPosition = "start",
    ) -> None:
        super().__init__(base, length, prompt_position)
        if init not in ("vocabulary", "text", "random"):
            raise ValueError(f"init must be 'vocabulary', 'text' or 'random'. Got {init!r}.")
        self.init: Start = init
        self.text_ids = None if text_ids is None else list(text_ids)
        if (init == "text") != bool(self.text_ids):
            raise ValueError(
                f"text_ids are the token ids of a text to start with, for init='text' alone. Got init={init!r} and "
                f"text_ids={text_ids!r}."
            )
        embedding = TextModel.of(base).embedding()
        for token in self.text_ids or ():
            require_integer("a token id in text_ids", token)
            if not 0 <= token < embedding.num_embeddings:
                raise ValueError(
                    f"text_ids has {token}, and the model's vocabulary {embedding.num_embeddings} tokens. Take the ids "
                    "from the model's own tokenizer."
                )
        weight = embedding.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.P = nn.Parameter(torch.empty(length, self.width, dtype=dtype, device=weight.device))
        self.gate = Gate(length, cost=self.width)
        self.gate.to(weight.device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill P as `init` says, with torch's global generator; on the meta device there is nothing to fill."""
        embedding = TextModel.of(self.base).embedding()
        if self.P.device.type == "meta" or embedding.weight.device.type == "meta":
            return
        if self.init == "random":
            square = embedded(embedding, torch.arange(embedding.num_embeddings)).square().mean()
            self.P.normal_().mul_(square.sqrt())
            return
        if self.text_ids is not None:
            ids = torch.tensor(self.text_ids).repeat(-(-self.length // len(self.text_ids)))[: self.length]
        else:
            # More than the vocabulary has: over again.
            rounds = -(-self.length // embedding.num_embeddings)
            ids = torch.cat([torch.randperm(embedding.num_embeddings) for _ in range(rounds)])[: self.length]
        self.P.copy_(embedded(embedding, ids))

    def prompt(self) -> Tensor:
        return self.P * self.gate.value().to(self.P.dtype)[:, None]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, init={self.init!r}"

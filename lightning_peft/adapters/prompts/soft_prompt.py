"""Prompt tuning: one trained vector per virtual token.

Lester, Al-Rfou, Constant, The Power of Scale for Parameter-Efficient Prompt Tuning, 2021, arXiv 2104.08691.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_peft.adapters.prompts.base import Prompt, PromptPosition
from lightning_peft.adapters.prompts.starts import Start, first_rows, require_start, without_values
from lightning_peft.adapters.prompts.text_model import TextModel
from lightning_peft.rank.gate import Gate


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
        self.init: Start = init
        self.text_ids = require_start(base, init, text_ids)
        weight = TextModel.of(base).embedding().weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.P = nn.Parameter(torch.empty(length, self.width, dtype=dtype, device=weight.device))
        self.gate = Gate(length, cost=self.width).to(weight.device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill P as `init` says, with torch's global generator; on the meta device there is nothing to fill."""
        if self.P.device.type != "meta" and not without_values(self.base):
            self.P.copy_(first_rows(self.base, self.length, self.init, self.text_ids))

    def prompt(self) -> Tensor:
        return self.P * self.gate.value().to(self.P.dtype)[:, None]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, init={self.init!r}"

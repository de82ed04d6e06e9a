"""DePT: a shorter soft prompt, and low-rank offsets of the text's embeddings by their positions.

Shi, Lipani, DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning, ICLR 2024, arXiv 2309.05173. In the
order of what is in it: the offsets, the two parts' sizes, their start, their two learning rates.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, sqrt
from operator import index
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapters.prompts.base import Prompt, PromptPosition
from lightning_peft.adapters.prompts.starts import Start, first_rows, require_start, without_values
from lightning_peft.adapters.prompts.text_model import TextModel
from lightning_peft.arguments import require_integer, require_number
from lightning_peft.functional.prompts import dept_split, position_offsets
from lightning_peft.rank.gate import Gate

_AUTHORS_RATE = 5e-4 / 0.3


def scale_of(alpha: float | None, rank: int) -> float:
    """gamma = alpha / sqrt(r), what multiplies the offsets; 1 for the text of the paper and where there are none."""
    return 1.0 if alpha is None or not rank else alpha / sqrt(rank)


class DePT(Prompt):
    """Decomposed prompt tuning: as many numbers as a long prompt has, in a shorter input.

        H = [ P ; X + O ]     O = gamma A diag(value) B, row by row at the tokens' places     gamma = alpha / sqrt(r)

    P: (m, d), A: (s, r) and B: (r, d), trained.  value: (r,), the gate's mask: a rank-one term of the offsets is a
    component. B starts at zero, so a new one is the prompt of m tokens alone; so is one without an open component. The
    prompt's own columns have no offset.

    Offsets depend on the place alone, the same for all texts and tokens: the index among the tokens that are shown, so
    that padding changes nothing, or with align="absolute" the column, as in the authors' code.

    Args:
        base: a transformers model that reads token ids; frozen and kept.
        length: m, virtual tokens; the authors recommend 40 or 60.
        rank: r, components of the offsets, at most min(s, d); 0 for none, which is a plain prompt.
        reach: s, places that have an offset; later tokens have none, and a warning says so once.
        alpha: scale of the offsets, gamma = alpha / sqrt(r) with the rank given here, as in the authors' code; ``None``
            for gamma = 1, the text of the paper.
        init: where P starts: "vocabulary", "text" or "random", as for :class:`~lightning_peft.SoftPrompt`.
        text_ids: token ids of a text that says what the task is, for init="text".
        rate: what multiplies the learning rate for A and B; ``None`` for 1/600 where the model is like T5, an
            encoder with a decoder that knows distances alone (0.3 and 5e-4), and else for 1.
        align: "tokens" or "absolute".
        prompt_position: "start", or "after_cls": after the first token of each text.

    Raises:
        TypeError: the base is no transformers model that reads token ids; or a number is of another type.
        ValueError: a number is out of range, an option is unknown, or `text_ids` are missing or not asked for.

    Reference:
        Shi and Lipani 2024, section 3 (remembered; start, scale and rates as in the authors' code).

    Departures:
        The gate is ours. The code adds all s offsets and needs texts padded to s. It gives none to tokens that are
        generated; here these have the offset of their place, as they had in training, with a cache and without.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> DePT(BertModel(config), length=4, rank=2, reach=32).table().shape
        torch.Size([32, 16])
    """

    P: nn.Parameter
    A: nn.Parameter
    B: nn.Parameter

    def __init__(
        self,
        base: nn.Module,
        length: int = 60,
        rank: int = 30,
        reach: int = 256,
        alpha: float | None = 8.0,
        init: Start = "vocabulary",
        text_ids: Sequence[int] | None = None,
        rate: float | None = None,
        align: Literal["tokens", "absolute"] = "tokens",
        prompt_position: PromptPosition = "start",
    ) -> None:
        super().__init__(base, length, prompt_position)
        require_integer("rank", rank)
        require_integer("reach", reach)
        if reach < 1:
            raise ValueError(f"reach is how many places of a text have an offset, at least 1. Got {reach}.")
        if not 0 <= rank <= min(reach, self.width):
            raise ValueError(
                f"rank={rank} is not possible for offsets of {reach} places and width {self.width}: give a rank from 0 "
                f"to {min(reach, self.width)}."
            )
        for name, value in (("alpha", alpha), ("rate", rate)):
            if value is not None:
                require_number(name, value)
                if not (value > 0 and isfinite(value)):
                    raise ValueError(f"{name} multiplies and must be positive. Got {value}.")
        if align not in ("tokens", "absolute"):
            raise ValueError(f"align must be 'tokens' or 'absolute'. Got {align!r}.")
        self.rank, self.reach = index(rank), index(reach)
        self.alpha = None if alpha is None else float(alpha)
        self.init: Start = init
        self.text_ids = require_start(base, init, text_ids)
        self.rate = None if rate is None else float(rate)
        self.align: Literal["tokens", "absolute"] = align
        self._told = False
        weight = TextModel.of(base).embedding().weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.P = nn.Parameter(torch.empty(length, self.width, dtype=dtype, device=weight.device))
        if rank:
            self.A = nn.Parameter(torch.empty(reach, rank, dtype=dtype, device=weight.device))
            self.B = nn.Parameter(torch.empty(rank, self.width, dtype=dtype, device=weight.device))
            self.gate = Gate(rank, cost=reach + self.width).to(weight.device)
        self.reset_parameters()

    @classmethod
    def within(
        cls, base: nn.Module, parameters: int, reach: int = 256, length: int | None = None, **arguments: object
    ) -> DePT:
        """One of so many parameters at most, shared as :func:`~lightning_peft.functional.prompts.dept_split` says.

        Args:
            base: a transformers model that reads token ids.
            parameters: what may be trained, at most; l d is what a plain prompt of l tokens has.
            reach: s, places that have an offset.
            length: m, virtual tokens; ``None`` for 60 % of what a plain prompt could have.
            arguments: the others of the class.

        Raises:
            ValueError: the prompt alone costs more.
        """
        split = dept_split(parameters, TextModel.of(base).embedding().embedding_dim, reach, length)
        return cls(base, split.length, split.rank, reach, **arguments)  # type: ignore[arg-type]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill P as `init` says, A in U(-1/sqrt(r), 1/sqrt(r)) and B with zeros; nothing on the meta device."""
        if self.P.device.type == "meta" or without_values(self.base):
            return
        self.P.copy_(first_rows(self.base, self.length, self.init, self.text_ids))
        if self.rank:
            bound = 1 / sqrt(self.rank)
            self.A.uniform_(-bound, bound)
            self.B.zero_()

    @property
    def scaling(self) -> float:
        """gamma, what multiplies the offsets."""
        return scale_of(self.alpha, self.rank)

    def rates(self) -> Mapping[str, float]:
        rate = self.rate
        if rate is None:
            rate = _AUTHORS_RATE if TextModel.of(self.base).is_like_t5() else 1.0
        return {} if rate == 1.0 or not self.rank else {"A": rate, "B": rate}

    def prompt(self) -> Tensor:
        return self.P

    def offsets(self, positions: Tensor) -> Tensor | None:
        if self.gate is None:
            return None
        # Only where there are more columns is the device waited for, to see whether they are more than padding.
        if not self._told and positions.shape[1] > self.reach:
            self._tell_of_reach(int(positions.max()) + 1)
        return position_offsets(positions, self.A, self.B, self._value(self.gate))

    def _tell_of_reach(self, places: int) -> None:
        if places <= self.reach:
            return
        self._told = True
        warnings.warn(
            f"a text has {places} {'tokens' if self.align == 'tokens' else 'columns'}, and DePT's offsets reach "
            f"{self.reach}: tokens from place {self.reach} on have none. Cut texts, or give a larger `reach`.",
            stacklevel=3,
        )

    def table(self) -> Tensor:
        """The offsets of all places that have one: (s, d), what A, B, gate and scale come to."""
        if self.gate is None:
            return self.P.new_zeros(self.reach, self.width)
        return (self.A * self._value(self.gate).to(self.A.dtype)) @ self.B

    def _value(self, gate: Gate) -> Tensor:
        return gate.value() * self.scaling

    def lasting_parameters(self) -> Iterator[nn.Parameter]:
        yield self.P

    def kept(self, keep: Tensor) -> Tensor:
        """One component at least: without offsets it is still a prompt, and not its base."""
        return keep if bool(keep.any()) else torch.arange(len(keep), device=keep.device) == 0

    @torch.no_grad()
    def compacted(self, keep: Tensor | None = None) -> DePT:
        gate = self.gate
        if gate is None:
            raise TypeError("DePT of rank 0 has no components to cut.")
        keep = self.kept(gate.open() if keep is None else keep)
        rank = int(keep.sum())
        # gamma belongs to the rank that it was trained with: alpha follows the root of the rank down.
        alpha = None if self.alpha is None else self.alpha * sqrt(rank / self.rank)
        small = type(self)(self.base, **self.arguments() | {"rank": rank, "alpha": alpha})
        assert small.gate is not None
        small.P = nn.Parameter(self.P.clone())
        small.A = nn.Parameter(self.A[:, keep])
        small.B = nn.Parameter(self.B[keep])
        small.gate.mask.copy_(gate.mask[keep])
        return small.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, reach={self.reach}"

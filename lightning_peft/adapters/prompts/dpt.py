"""DPT: a soft prompt as a product of two thin factors.

Xiao, Xu, Li, Lu, Li, Decomposed Prompt Tuning via Low-Rank Reparameterization, Findings of EMNLP 2023, arXiv
2310.10094. In the order of what is in it: the observation that a prompt's rank is low, the product, its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from operator import index
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapters.prompts.base import Prompt, PromptPosition
from lightning_peft.adapters.prompts.starts import embeddings_size, require_text, token_rows, without_values
from lightning_peft.adapters.prompts.text_model import TextModel
from lightning_peft.arguments import require_integer, require_number
from lightning_peft.functional.prompts import dpt_rank, half_width, svd_start
from lightning_peft.rank.gate import Gate

Form = Literal["product", "relu"]
_AUTHORS_HALF_WIDTH = 0.5


class RectifiedGate(Gate):
    """A gate whose gain counts where it is positive: the ReLU(Sigma) of the paper's observation.

        value = relu(gain) * mask

    What trains a gain to zero or below has closed the component by itself, and no gradient reopens it; so the number of
    open ones is the rank that the paper watches. There is no soft removal: it would be for good.

    Example:
        >>> gate = RectifiedGate(3, cost=8, gain=torch.tensor([2.0, -1.0, 1.0]))
        >>> gate.value().tolist(), gate.open().tolist()
        ([2.0, 0.0, 1.0], [True, False, True])
    """

    closes_itself: ClassVar[bool] = True

    gain: nn.Parameter

    def value(self) -> Tensor:
        return torch.relu(self.gain) * (self.mask if self.drawn is None else self.drawn)

    @property
    def removes_softly(self) -> bool:
        return False

    def open(self) -> Tensor:
        return (self.mask != 0) & (self.gain.detach() > 0)

    def keep(self, which: Tensor, soft: bool = False) -> None:
        if soft:
            raise ValueError(
                "soft removal lets a component return, and one whose gain is 0 never does; use soft=False."
            )
        super().keep(which)


class DPT(Prompt):
    """Decomposed prompt tuning: as long a prompt from far fewer numbers.

        H = [ P ; X ]        P = A diag(value) B

    A: (e, b) and B: (b, d), trained.  value: (b,), the gate's mask: a rank-one term of the prompt is a component. With
    form="relu" it is relu(gain) * mask with a trained gain, the U ReLU(Sigma) V in which the authors saw that few
    singular values stay positive: `RankMonitor` then shows how many do. b (e + d) numbers are trained instead of e d.

    A component that is closed leaves the prompt, and its columns stay: a prompt of no component is e zero vectors.

    Args:
        base: a transformers model that reads token ids; frozen and kept.
        length: e, virtual tokens.
        rank: b, components; at most min(e, d), and worth it below e d / (e + d).
        init: where P starts. "uniform": both factors in U(-a, a), with deviation sqrt(b) a^2 / 3; "svd": the best
            approximation of token embeddings, A = U S^1/2 and B = S^1/2 V (with "relu" the gain is S).
        half_width: a, for "uniform"; ``None`` for the authors' 0.5 where the model is like T5, an encoder with a
            decoder that knows distances alone, and else for the a that gives P the deviation of the model's embeddings.
        text_ids: token ids of a text whose embeddings "svd" starts from; ``None`` for tokens drawn at random.
        form: "product" or "relu".
        prompt_position: "start", or "after_cls": after the first token of each text.

    Raises:
        TypeError: the base is no transformers model that reads token ids; or a number is of another type.
        ValueError: a number is out of range, an option is unknown, or goes with another `init`.

    Reference:
        Xiao et al. 2023, sections 3.1 (the observation) and 3.2 (the product); start, form and place as in the authors'
        code. That few singular values stay positive, and how they train U ReLU(Sigma) V, is remembered.

    Departures:
        The gate, the widths for models other than T5 and "svd" are ours (that start is PT-MoE's). The authors' code
        multiplies the learning rate by the square root of the number of processes; give that rate yourself.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> DPT(BertModel(config), length=8, rank=2).prompt().shape
        torch.Size([8, 16])
    """

    A: nn.Parameter
    B: nn.Parameter
    gate: Gate

    def __init__(
        self,
        base: nn.Module,
        length: int = 100,
        rank: int = 10,
        init: Literal["uniform", "svd"] = "uniform",
        half_width: float | None = None,
        text_ids: Sequence[int] | None = None,
        form: Form = "product",
        prompt_position: PromptPosition = "start",
    ) -> None:
        super().__init__(base, length, prompt_position)
        require_integer("rank", rank)
        if not 1 <= rank <= min(length, self.width):
            raise ValueError(
                f"rank={rank} is not possible for a prompt of {length} tokens of width {self.width}: give a rank from "
                f"1 to {min(length, self.width)}."
            )
        if init not in ("uniform", "svd"):
            raise ValueError(f"init must be 'uniform' or 'svd'. Got {init!r}.")
        if form not in ("product", "relu"):
            raise ValueError(f"form must be 'product' or 'relu'. Got {form!r}.")
        if half_width is not None:
            require_number("half_width", half_width)
            if not (half_width > 0 and isfinite(half_width)):
                raise ValueError(f"half_width is how far from zero factors start, above 0. Got {half_width}.")
        if init == "svd" and half_width is not None:
            raise ValueError(f"half_width={half_width} is of init='uniform', and init is 'svd'. Leave it out.")
        if init == "uniform" and text_ids is not None:
            raise ValueError("text_ids are what init='svd' starts from, and init is 'uniform'. Leave them out.")
        self.rank = index(rank)
        self.init: Literal["uniform", "svd"] = init
        self.half_width = None if half_width is None else float(half_width)
        self.text_ids = require_text(base, text_ids)
        self.form: Form = form
        weight = TextModel.of(base).embedding().weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.A = nn.Parameter(torch.empty(length, rank, dtype=dtype, device=weight.device))
        self.B = nn.Parameter(torch.empty(rank, self.width, dtype=dtype, device=weight.device))
        cost = length + self.width
        gain = torch.ones_like(self.A[0]) if form == "relu" else None
        self.gate = (Gate(rank, cost) if gain is None else RectifiedGate(rank, cost, gain)).to(weight.device)
        self.reset_parameters()

    @classmethod
    def within(cls, base: nn.Module, parameters: int, length: int = 100, **arguments: object) -> DPT:
        """One of as many components as so many parameters allow: `partial(DPT.within, parameters=8_680)`.

        Args:
            base: a transformers model that reads token ids.
            parameters: what may be trained, at most.
            length: e, virtual tokens.
            arguments: the others of the class.

        Raises:
            ValueError: not one component fits.
        """
        rank = dpt_rank(parameters, length, TextModel.of(base).embedding().embedding_dim)
        return cls(base, length, rank, **arguments)  # type: ignore[arg-type]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill A, B and the gain as `init` says; on the meta device there is nothing to fill."""
        if self.A.device.type == "meta" or without_values(self.base):
            return
        if self.init == "uniform":
            a = self._half_width()
            self.A.uniform_(-a, a)
            self.B.uniform_(-a, a)
            if self.gate.gain is not None:
                self.gate.gain.fill_(1.0)
            return
        U, S, V = svd_start(token_rows(self.base, self.length, self.text_ids), self.rank)
        if self.gate.gain is None:
            U, V = U * S.sqrt(), S.sqrt()[:, None] * V
        else:
            self.gate.gain.copy_(S)
        self.A.copy_(U)
        self.B.copy_(V)

    def _half_width(self) -> float:
        if self.half_width is not None:
            return self.half_width
        if TextModel.of(self.base).is_like_t5():
            return _AUTHORS_HALF_WIDTH
        return half_width(embeddings_size(self.base), self.rank)

    def prompt(self) -> Tensor:
        return (self.A * self.gate.value().to(self.A.dtype)) @ self.B

    def kept(self, keep: Tensor) -> Tensor:
        """One component at least: a prompt of none is zero vectors, and no less a prompt."""
        return keep if bool(keep.any()) else torch.arange(len(keep), device=keep.device) == 0

    @torch.no_grad()
    def compacted(self, keep: Tensor | None = None) -> DPT:
        keep = self.kept(self.gate.open() if keep is None else keep)
        small = type(self)(self.base, **self.arguments() | {"rank": int(keep.sum())})
        small.A = nn.Parameter(self.A[:, keep])
        small.B = nn.Parameter(self.B[keep])
        if self.gate.gain is not None:
            small.gate.gain = nn.Parameter(self.gate.gain[keep])
        small.gate.mask.copy_(self.gate.mask[keep])
        return small.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, form={self.form!r}"

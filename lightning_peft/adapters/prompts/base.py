"""Prompt: trained vectors in front of the text that a frozen transformers model reads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.prompts.passes import columns_of, listening, outside_graphs, prefix_of
from lightning_peft.adapters.prompts.text_model import TextModel
from lightning_peft.arguments import require_integer

PromptPosition = Literal["start", "after_cls"]


class Prompt(Adapter):
    """Stands in the place of a whole transformers model, which it freezes, and puts m vectors in front of its text.

        H = [ P ; X + O ]        mask [ 1_m ; M ]        P: (m, d), X: (B, L, d), O: (B, L, d) or nothing

    Around the whole model, and not around its backbone or its embedding, because only there are all things at hand that
    a longer text changes: labels, the token that is pooled, rows of the output, the mask that a decoder sees, and the
    cache of a generation. What calls the model gives and gets what it would without a prompt:

    - The prompt's columns are in the mask; positions are counted over all tokens that are shown, so that padding on the
      left, on the right or nowhere gives the same. Models without `position_ids` (BART, T5) number them themselves.
    - Labels per token get -100 in the prompt's columns. A causal model's first token is then predicted by the prompt,
      and its label, if it has one, counts.
    - Rows of `logits`, of `last_hidden_state` and of `hidden_states` that are the prompt's are left out;
      `attentions`, `encoder_last_hidden_state` and `past_key_values` have them.
    - Token types get 0; positions of answers (`start_positions`) move with the text.
    - A classifier on a decoder pools the last token that is shown, by the mask. A classifier on an encoder pools its
      first column: the prompt's first vector for `prompt_position="start"`, as PEFT does, and the text's own first
      token for "after_cls". Where columns count (MPNet, DeBERTa, windows) and texts are padded on the left, that is
      padding, as without a prompt.

    The model is called with token ids that have m more columns, and what its own embedding returns for these is
    replaced: by a hook that is there during the call alone. So scaled embeddings (BART, Gemma) are scaled before, and
    embeddings that FSDP shards are gathered as ever. Compiled, the model runs outside the graph.

    What a subclass has to do is fill :meth:`prompt`, and :meth:`offsets` if it has some. Parameters are float32, or the
    embedding's dtype where that is wider; the result is cast to what the embedding returns. `gate`, if there is one,
    has the components of the paper.

    Args:
        base: a transformers model that reads token ids.
        length: m, vectors in the prompt.
        prompt_position: "start", or "after_cls": after the first token of each text.

    Attributes:
        length: m.
        width: d, of the model's token embeddings.
        align: what :meth:`offsets` counts: "tokens" (those that are shown, so padding does not count) or "absolute"
            (columns).

    Raises:
        TypeError: the base is no transformers model that reads token ids; or length is no integer.
        ValueError: length is below 1 or leaves no position for a text, or the position of the prompt is unknown.
    """

    mergeable: ClassVar[bool] = False
    identity_at_start: ClassVar[bool] = False
    adapts: ClassVar[Literal["layer", "model"]] = "model"
    align: Literal["tokens", "absolute"] = "tokens"

    def __init__(self, base: nn.Module, length: int = 20, prompt_position: PromptPosition = "start") -> None:
        text_model = TextModel.of(base)
        require_integer("length", length)
        if length < 1:
            raise ValueError(f"length is how many vectors the prompt has, at least 1. Got {length}.")
        if prompt_position not in ("start", "after_cls"):
            raise ValueError(f"prompt_position must be 'start' or 'after_cls'. Got {prompt_position!r}.")
        positions = text_model.positions()
        if positions is not None and length >= positions:
            raise ValueError(
                f"length={length} leaves no position for a text: {type(text_model.model).__name__} has {positions}. "
                "Give a shorter prompt."
            )
        super().__init__(base)
        self.length = length
        self.prompt_position: PromptPosition = prompt_position
        self.width = text_model.embedding().embedding_dim
        self._prefix: Any = None

    @property
    def placeholder(self) -> int:
        """The token id in the prompt's columns."""
        return TextModel.of(self.base).placeholder()

    def lengthened(self, mask: Tensor) -> Tensor:
        """A mask of the text, (B, L), with 0 in the prompt's columns: (B, m + L)."""
        return columns_of(self, mask).filled(mask, 0)

    @abstractmethod
    def prompt(self) -> Tensor:
        """The prompt P, in float32 or wider: (m, d)."""

    def offsets(self, positions: Tensor) -> Tensor | None:
        """What is added to the embeddings of the text's own tokens; ``None`` if nothing is, the default.

        Tokens that are generated have offsets as those of the text that they continue, with a cache and without.

        Args:
            positions: (B, L) int64, each token's place in the text, from 0: its index among the tokens that are shown,
                cumsum(mask) - 1, or its column where :attr:`align` is "absolute". -1 where the text is padded.

        Returns:
            (B, L, d), zeros where positions are -1.
        """
        return None

    def effective_weight(self) -> Tensor:
        raise TypeError(f"{type(self).__name__} stands in the place of a whole model, which has no single weight.")

    @outside_graphs
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with the prompt; takes and returns what the model does."""
        with listening(self):
            return self.base(*args, **kwargs)

    @outside_graphs
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, with the prompt: token ids go in and come back as without one.

        Raises:
            ValueError: a cache that is filled already, or a way to decode that cuts the cache by the text's own length.
        """
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "generate was given past_key_values that are filled, and takes their length for the text's, which the "
                "prompt is not a part of. Give the whole text without them; prefix_cached() keeps the prompt's own."
            )
        settings = kwargs.get("generation_config")
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if (kwargs.get(name) or getattr(settings, name, None)) is not None:
                raise ValueError(
                    f"generate with {name} cuts the cache to the text's own length, which the prompt is not a part of. "
                    "Leave it out."
                )
        with listening(self):
            return self.base.generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def prefix_cached(self) -> Iterator[None]:
        """Inside, the prompt's keys and values are computed once, and copied into the cache of every generation.

        For inference: what needs a gradient, or has no cache, computes them as ever, and so does a model that counts
        columns (sliding windows, recurrences), in whose batches the prompt does not stand in one place. Parameters must
        not change inside. Dropout is off while they are computed.

        Raises:
            ValueError: the model does not generate from a cache that begins with the prompt.
        """
        model = TextModel.of(self.base)
        if model.decoder is not None or not model.model.can_generate() or self.prompt_position != "start":
            raise ValueError(
                f"prefix_cached is for a causal language model whose text begins with the prompt, and not for "
                f"{type(model.model).__name__} with prompt_position={self.prompt_position!r}. Leave it out."
            )
        outer, self._prefix = self._prefix, None
        if not model.counts_columns():
            modes = [(module, module.training) for module in self.modules()]
            self.eval()
            try:
                self._prefix = prefix_of(self)
            finally:
                for module, mode in modes:
                    module.training = mode
        try:
            yield
        finally:
            self._prefix = outer

    def extra_repr(self) -> str:
        return f"length={self.length}, prompt_position={self.prompt_position!r}"

"""What has to be known of a transformers model that gets a prompt; found by what it offers, not by its name."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

_KINDS = ("layer_types", "layers_block_type", "block_types", "attention_layers")
"""Where configs name the kinds of their layers."""
_EVERYWHERE = {"full_attention", "attention", "global"}
"""Kinds that see all columns alike."""
_WINDOWS = {"sliding_attention", "chunked_attention", "local"}
"""Kinds that see the nearest columns."""
_WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class TextModel:
    """A transformers model of text, and the parts of it that a prompt meets.

    Attributes:
        model: the model itself, without what wraps it.
        stack: what reads the text: the encoder of an encoder with a decoder, else the model itself.
        decoder: what reads the encoder's output, if there is one.
    """

    model: Any
    stack: Any
    decoder: Any

    @classmethod
    def of(cls, base: nn.Module) -> TextModel:
        """Find the parts.

        Raises:
            TypeError: it is no transformers model that reads token ids.
        """
        model = _unwrapped(base)
        kind = type(model).__name__
        if not (hasattr(type(model), "base_model_prefix") and hasattr(model, "get_input_embeddings")):
            raise TypeError(
                f"a prompt goes in front of what a transformers model reads, and this is a {kind}. In `inject` and "
                "AdapterInjection give the class itself or partial(SoftPrompt, length=20), not a function around it."
            )
        found = cls(model, model, None)
        if getattr(model.config, "is_encoder_decoder", False):
            found = cls(model, _unwrapped(model.get_encoder()), _unwrapped(model.get_decoder()))
        if not found.embeddings():
            raise TypeError(f"{kind} has no embedding of token ids, so there is nothing to put a prompt in front of.")
        return found

    def embeddings(self) -> list[nn.Embedding]:
        """The modules that may embed the text; T5 names one that it never calls, so there may be two."""
        encoder: Any = self.stack.get_encoder() if hasattr(self.stack, "get_encoder") else None
        found: dict[int, nn.Embedding] = {}
        for owner in (self.stack, encoder):
            if not hasattr(owner, "get_input_embeddings"):
                continue
            try:
                embedding = _unwrapped(owner.get_input_embeddings())
            except NotImplementedError:
                continue
            if isinstance(embedding, nn.Embedding):
                found[id(embedding)] = embedding
        return list(found.values())

    def embedding(self) -> nn.Embedding:
        """One of :meth:`embeddings`: their weight is the same."""
        return self.embeddings()[-1]

    def position_table(self) -> tuple[nn.Embedding, int] | None:
        """The table of learned positions and its first row in use; ``None`` where positions are computed.

        RoBERTa's rows begin after its padding index, BART's and OPT's after two that are not used.
        """
        for name, child in self.stack.named_modules():
            last = name.rpartition(".")[2]
            if isinstance(child, nn.Embedding) and last in ("position_embeddings", "embed_positions", "wpe"):
                offset = getattr(child, "offset", None)
                if offset is None:
                    offset = 0 if child.padding_idx is None else child.padding_idx + 1
                return child, int(offset)
        return None

    def positions(self) -> int | None:
        """How many positions a text can have; ``None`` where there is no end."""
        table = self.position_table()
        return None if table is None else table[0].num_embeddings - table[1]

    def first_position(self) -> int:
        """The `position_ids` of a text's first token: 0, but for models like RoBERTa."""
        table = self.position_table()
        # A table with an offset of its own (BART, OPT) adds it itself.
        return 0 if table is None or hasattr(table[0], "offset") else table[1]

    @cached_property
    def arguments(self) -> list[str]:
        """What the stack's forward takes."""
        return list(inspect.signature(self.stack.forward).parameters)

    def counts_columns(self) -> bool:
        """Whether it matters which columns lie between two tokens, be their positions what they may.

        So it does for T5, which knows distances alone, for MPNet and DeBERTa, which know them as well, for windows of
        attention, and for recurrences.
        """
        if "position_ids" not in self.arguments or self._knows_distances():
            return True
        config = self.stack.config.get_text_config()
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        return bool(window) or not self._kinds() <= _EVERYWHERE or self.carries_state()

    def _knows_distances(self) -> bool:
        names = (
            name.rpartition(".")[2] for name, child in self.stack.named_modules() if isinstance(child, nn.Embedding)
        )
        return any(name in ("relative_attention_bias", "rel_embeddings") for name in names)

    def carries_state(self) -> bool:
        """Whether layers carry what they have read along (recurrences, convolutions), whatever attention is shown."""
        config = self.stack.config.get_text_config()
        return not self._kinds() <= _EVERYWHERE | _WINDOWS or any(name.startswith("mamba_") for name in vars(config))

    def _kinds(self) -> set[str]:
        config = self.stack.config.get_text_config()
        return {kind for name in _KINDS for kind in getattr(config, name, None) or ()}

    def is_like_t5(self) -> bool:
        """Whether it is an encoder with a decoder that knows distances alone; such have large embeddings."""
        return self.decoder is not None and self.position_table() is None

    def placeholder(self) -> int:
        """A token id for the columns of a prompt, whose embeddings are replaced; it is not the one of padding."""
        return 1 if self.model.config.get_text_config().pad_token_id == 0 else 0


def _unwrapped(module: Any) -> Any:
    while (inner := next((name for name in _WRAPPERS if name in getattr(module, "_modules", ())), None)) is not None:
        module = module._modules[inner]
    return module


@torch.no_grad()
def embedded(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """Rows of an embedding as its forward gives them, scale included, in float32 or wider: (n,) -> (n, d)."""
    weight: Any = embedding.weight
    if hasattr(weight, "full_tensor"):  # sharded by FSDP2, which gathers it in the model's own forward alone
        rows: Tensor = weight.full_tensor()[ids.to(weight.device)]
        scale = getattr(embedding, "embed_scale", None)
        rows = rows if scale is None else rows * scale
    else:
        rows = embedding(ids.to(weight.device))
    return rows.to(torch.promote_types(rows.dtype, torch.float32))

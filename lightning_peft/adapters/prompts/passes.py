"""Passes: one call of a model whose text gets a prompt in front, by hooks that are there during the call alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_peft.adapters.prompts.columns import Columns
from lightning_peft.adapters.prompts.text_model import TextModel

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:
    from lightning_peft.adapters.prompts.base import Prompt


def outside_graphs(method: F) -> F:
    """Run a method as it is written where it is called from what was compiled: a graph would keep its first hooks."""
    disabled: F = torch.compiler.disable(method)
    return disabled


@contextmanager
def listening(adapter: Prompt) -> Iterator[None]:
    """Until the end, every call of the adapter's model has the prompt."""
    passes = _Passes(adapter, TextModel.of(adapter.base))
    model = passes.parts
    with ExitStack() as hooks:
        for handle in (
            model.stack.register_forward_pre_hook(passes.extend, with_kwargs=True),
            model.stack.register_forward_hook(passes.finish),
            *(embedding.register_forward_hook(passes.embed) for embedding in model.embeddings()),
        ):
            hooks.callback(handle.remove)
        if model.decoder is not None:
            handle = model.decoder.register_forward_pre_hook(passes.extend_decoder, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def columns_of(adapter: Prompt, mask: Tensor) -> Columns:
    """Where the prompt's columns stand among those of texts that begin anew: mask is (B, L), 0 for padding."""
    return Columns(adapter.length, _Passes(adapter, TextModel.of(adapter.base))._first(mask, mask))


@torch.no_grad()
def prefix_of(adapter: Prompt) -> Any:
    """Keys and values of the prompt alone: a cache for a batch of one."""
    from transformers import DynamicCache

    parts = TextModel.of(adapter.base)
    cache = DynamicCache(config=parts.model.config)
    nothing = torch.empty(1, 0, dtype=torch.long, device=parts.embedding().weight.device)
    with listening(adapter):
        adapter.base(input_ids=nothing, past_key_values=cache, use_cache=True)
    return cache


@dataclass
class _Call:
    """What the hooks of one call tell each other.

    Attributes:
        columns: where the prompt's columns are; ``None`` where they are in the cache already.
        positions: (B, L) places of the text's tokens, for offsets.
        rows: texts of the call.
        length: columns of the call, those of the prompt included.
        as_tuple: whether the caller wants a tuple.
        embedded: whether the model has called its embedding by now.
    """

    columns: Columns | None
    positions: Tensor | None
    rows: int
    length: int
    as_tuple: bool
    embedded: bool = False


class _Passes:
    """The hooks. A call of the stack begins in :meth:`extend` and ends in :meth:`finish`."""

    def __init__(self, adapter: Prompt, parts: TextModel) -> None:
        self.adapter = adapter
        self.parts = parts
        self.names = parts.arguments
        self.columns = parts.counts_columns()
        self.calls: list[_Call] = []

    def extend(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the stack a longer text: ids, mask, positions, token types, labels."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        ids, vectors, mask = (given.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        text = ids if vectors is None else vectors
        if text is None:
            return None  # the model says itself what is missing
        cache, m = given.get("past_key_values"), self.adapter.length
        # before the mask: transformers may have made it 4-dimensional for such a cache
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                "past_key_values are a static cache, made for the text's own length, which the prompt is not a part "
                "of. Leave cache_implementation out."
            )
        if given.get("cache_params") is not None or given.get("state") is not None:
            raise ValueError(
                f"{type(self.parts.model).__name__} goes on from a state, which does not tell whether the prompt has "
                "been read. Generate with use_cache=False."
            )
        _require_text(ids, vectors, mask)
        past = 0 if cache is None else cache.get_seq_length()
        if past == 0 and cache is not None and self._copy_prefix(cache, len(text)):
            past = m
        if 0 < past < m:
            raise ValueError(
                f"past_key_values hold {past} positions, fewer than the prompt's {m}: they were not made with it. "
                "Begin with an empty cache."
            )
        self._require_room(text.shape[1] + (past or m), m)
        columns = Columns(m, self._first(text, mask))
        positions = self._text_positions(text, mask, max(0, past - m))
        new = dict(given)
        if mask is not None:
            new["attention_mask"] = columns.filled(mask, 1)
        if "position_ids" in self.names:
            new["position_ids"] = self._position_ids(given.get("position_ids"), mask, columns, text, past)
        length = text.shape[1] + (0 if past else m)
        call = _Call(None if past else columns, positions, len(text), length, False, ids is None)
        if given.get("cache_position") is not None:
            # Older transformers tells a model which columns of the cache a call fills: the text's, without ours.
            new["cache_position"] = torch.arange(past, past + call.length, device=text.device)
        if not past:
            self._insert(new, call, columns)
        if ids is None:
            new["inputs_embeds"] = self._joined(text, call)
        if self.parts.decoder is None:
            call.as_tuple = _wants_tuple(given, stack) and not past
            if call.as_tuple:
                new["return_dict"] = True
        self.calls.append(call)
        return (), new

    def _insert(self, new: dict[str, Any], call: _Call, columns: Columns) -> None:
        """Put the prompt's columns into what has a column per token."""
        ids, mask = new.get("input_ids"), new.get("attention_mask")
        shape = (new["inputs_embeds"] if ids is None else ids).shape[:2]
        if ids is not None:
            pad = self.parts.model.config.get_text_config().pad_token_id
            ids = columns.filled(ids, self.parts.placeholder())
            # A classifier on a decoder pools the last id that is not the one of padding.
            new["input_ids"] = ids if mask is None or pad is None else ids.masked_fill(mask == 0, pad)
        types = new.get("token_type_ids")
        if types is not None:
            new["token_type_ids"] = columns.filled(types, 0)
        if self.parts.decoder is not None:
            return
        labels = new.get("labels")
        if isinstance(labels, Tensor) and labels.shape == shape and not labels.is_floating_point():
            new["labels"] = columns.filled(labels, -100)
        for name in ("start_positions", "end_positions"):
            if new.get(name) is not None:
                new[name] = columns.moved(new[name])
        kept = new.get("logits_to_keep")
        if isinstance(kept, Tensor):
            first = None if columns.first is None else columns.first[:1]  # of one row: it names columns, not rows
            new["logits_to_keep"] = Columns(columns.length, first).moved(kept[None])[0]
        elif kept is not None and kept >= shape[1]:
            new["logits_to_keep"] = 0  # all, of which the prompt's are left out

    def embed(self, embedding: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Put the prompt in the place of what was embedded for its columns; offsets are added to the rest."""
        call = self.calls[-1] if self.calls else None
        # A model may embed other things with the same module: the text comes first.
        if call is None or call.embedded:
            return None
        call.embedded = True
        if output.shape[0] != call.rows or output.shape[1] < call.length:
            raise RuntimeError(
                f"{type(self.parts.model).__name__} embeds {tuple(output.shape[:2])} tokens where a text of "
                f"{(call.rows, call.length)}, the prompt's {self.adapter.length} columns included, was given. Models "
                "that turn the text around inside are not known."
            )
        return self._joined(output if call.columns is None else call.columns.text_of(output), call)

    def _joined(self, text: Tensor, call: _Call) -> Tensor:
        with torch.autocast(text.device.type, enabled=False):  # the prompt is made in its own precision
            offsets = None if call.positions is None else self.adapter.offsets(call.positions)
            prompt = None if call.columns is None else self.adapter.prompt()
        if offsets is not None:
            further = text.shape[1] - offsets.shape[1]  # columns that the model pads a text with itself (Longformer)
            text = text + nn.functional.pad(offsets.to(text.dtype), (0, 0, 0, further))
        return text if prompt is None or call.columns is None else call.columns.put_together(prompt[None], text)

    def finish(self, stack: nn.Module, args: Any, output: Any) -> Any:
        """Leave the prompt's rows out of what the caller gets."""
        if not self.calls:
            return None
        call = self.calls.pop()
        if not call.embedded:
            raise RuntimeError(
                f"{type(stack).__name__} did not call {type(self.parts.embedding()).__name__}, which it names as its "
                "embedding of the text, so the prompt is not in front of it. Models that embed otherwise are not known."
            )
        if call.columns is None or self.parts.decoder is not None:
            return None
        for name, value in list(output.items()) if isinstance(output, Mapping) else ():
            if name == "hidden_states" and isinstance(value, tuple):
                output[name] = tuple(_rows(each, call) for each in value)
            elif isinstance(value, Tensor) and (value.dim() == 3 or name in ("start_logits", "end_logits")):
                output[name] = _rows(value, call)
        return output.to_tuple() if call.as_tuple else output

    def extend_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Show the decoder the prompt's columns of the encoder's output."""
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if mask is None or states is None or states.shape[1] != mask.shape[1] + self.adapter.length:
            return None
        columns = Columns(self.adapter.length, self._first(mask, mask))
        return args, kwargs | {"encoder_attention_mask": columns.filled(mask, 1)}

    def _first(self, text: Tensor, mask: Tensor | None) -> Tensor | None:
        """After which column of each text the prompt comes; ``None`` for before all."""
        if self.adapter.prompt_position == "start":
            # Who counts columns has the padding before the prompt, not between it and the text.
            if mask is None or not self.columns or self.adapter._prefix is not None:
                return None
            return (mask != 0).int().argmax(1) - 1
        if mask is None:
            return torch.zeros(len(text), dtype=torch.long, device=text.device)
        return (mask != 0).int().argmax(1)

    def _text_positions(self, text: Tensor, mask: Tensor | None, past: int) -> Tensor | None:
        """Where the tokens of this call are in their texts, of which `past` columns came before."""
        if type(self.adapter).offsets is _no_offsets():
            return None
        columns = torch.arange(past, past + text.shape[1], device=text.device).expand(text.shape[:2])
        if mask is None:
            return columns
        shown = mask[:, -text.shape[1] :] != 0
        if self.adapter.align == "tokens":
            columns = (mask != 0).long().cumsum(1)[:, -text.shape[1] :] - 1
        return columns.masked_fill(~shown, -1)

    def _position_ids(
        self, given: Tensor | None, mask: Tensor | None, columns: Columns, text: Tensor, past: int
    ) -> Tensor:
        """Positions counted over all tokens that are shown, the prompt's included; or the caller's, moved."""
        start, m = self.parts.first_position(), columns.length
        size = text.shape[1] if past else text.shape[1] + m
        if given is not None:
            given = given.expand(len(text), -1)
            if past:
                return given + m
            ours = torch.arange(start, start + m, device=text.device)[None]
            if columns.first is None:
                return columns.put_together(ours, given + m)
            column = torch.arange(text.shape[1], device=text.device).expand(len(text), -1)
            if self.adapter.prompt_position == "after_cls":
                ours = ours - start + 1 + given.gather(1, columns.first[:, None])
            return columns.put_together(ours.expand(len(text), -1), given + columns.moved(column) - column)
        if mask is None:
            return torch.arange(past + start, past + start + size, device=text.device).expand(len(text), -1)
        count = columns.filled((mask != 0).long(), 1).cumsum(1)
        return (count[:, -size:] - 1).clamp(min=0) + start

    def _require_room(self, total: int, m: int) -> None:
        most = self.parts.positions()
        if most is not None and total > most:
            raise ValueError(
                f"a text of {total - m} tokens and a prompt of {m} need {total} positions, and "
                f"{type(self.parts.model).__name__} has {most}. Cut texts to {most - m} tokens, or give a shorter "
                "prompt."
            )

    def _copy_prefix(self, cache: Any, batch: int) -> bool:
        """Fill an empty cache with the prompt's keys and values, if they are at hand."""
        from transformers import DynamicCache

        prefix = self.adapter._prefix
        if prefix is None or torch.is_grad_enabled() or type(cache) is not DynamicCache:
            return False
        for i, layer in enumerate(prefix.layers):
            cache.update(layer.keys.expand(batch, -1, -1, -1), layer.values.expand(batch, -1, -1, -1), i)
        return True


def _no_offsets() -> Any:
    from lightning_peft.adapters.prompts.base import Prompt

    return Prompt.offsets


def _require_text(ids: Tensor | None, vectors: Tensor | None, mask: Tensor | None) -> None:
    if ids is not None and vectors is not None:
        raise ValueError(
            "input_ids and inputs_embeds were both given, and a prompt goes in front of one text. Give one of the two."
        )
    if ids is not None and ids.dim() != 2:
        raise ValueError(
            f"input_ids are of shape {tuple(ids.shape)}, and a prompt goes in front of (batch, length). Flatten what "
            "is before the length."
        )
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"attention_mask is of shape {tuple(mask.shape)}, and a prompt is put into one of (batch, length). Give "
            "texts that are padded, not packed into one sequence with borders."
        )


def _wants_tuple(given: Mapping[str, Any], stack: Any) -> bool:
    asked = given.get("return_dict")
    return not (getattr(stack.config, "return_dict", True) if asked is None else asked)


def _rows(value: Tensor, call: _Call) -> Tensor:
    return call.columns.text_of(value) if call.columns is not None and value.shape[1] == call.length else value

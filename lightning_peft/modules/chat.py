"""Conversations as tokens, by the tokenizer's own chat template; what the assistant says is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_peft.modules.documents import IGNORED, Document
from lightning_peft.modules.pair_files import Message


def require_template(tokenizer: Any, name: str) -> None:
    """Check that conversations can be written.

    Raises:
        ValueError: the tokenizer has no chat template, or cannot say where in a text its tokens are.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"tokenizer={name!r} has no chat template: that of an instruction-tuned model has one. Without one, give "
            "prompt=..., answer=... and template='plain'."
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer={name!r} is no fast tokenizer and does not say where in a text its tokens are, so an "
            "assistant's cannot be told from a user's. Give one with a tokenizer.json."
        )


def conversation(tokenizer: Any, messages: Sequence[Message]) -> Document:
    """One conversation, of which each turn of the assistant is learned, the token that ends it included.

    The text is tokenised whole, as it is when a model is to answer. Where a turn of the assistant begins and ends is
    read from the template itself: what it writes for the turns before, with its cue for an answer, and for those up to
    the turn.

    Raises:
        ValueError: the template refuses these turns, or writes earlier turns otherwise when others follow.
    """
    text = _written(tokenizer, messages)
    spans: list[tuple[int, int]] = []
    for i, turn in enumerate(messages):
        if turn["role"] == "assistant":
            before = _written(tokenizer, messages[:i], add_generation_prompt=True)
            after = _written(tokenizer, messages[: i + 1]).rstrip()  # not the line that ends behind the last token
            if not (text.startswith(before) and text.startswith(after)):
                raise ValueError(
                    "the chat template writes a turn otherwise once more turns follow, so it is not known which tokens "
                    f"are the assistant's: turn {i + 1} of {len(messages)}, {turn['content'][:40]!r}. Give "
                    "conversations that end with their first answer."
                )
            spans.append((len(before), len(after)))
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = found["input_ids"]
    starts = [start for start, _ in found["offset_mapping"]]
    labels = [
        number if any(first <= start < last for first, last in spans) else IGNORED
        for number, start in zip(ids, starts, strict=True)
    ]
    return Document(ids, labels)


def question(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation up to where the assistant is to speak; a last turn of its own is taken off.

    Raises:
        ValueError: the template refuses these turns.
    """
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    text = _written(tokenizer, asked, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _written(tokenizer: Any, messages: Sequence[Message], **how: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template([dict(turn) for turn in messages], tokenize=False, **how))
    except Exception as error:  # jinja's errors, and those that a template raises itself
        roles = ", ".join(turn["role"] for turn in messages) or "none"
        raise ValueError(f"the tokenizer's chat template refuses turns of these roles: {roles} ({error}).") from error

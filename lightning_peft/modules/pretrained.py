"""A pretrained transformers model or tokenizer by folder or hub name, or a sentence why not."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import AutoTokenizer


def from_folder_or_hub(auto_class: Any, backbone: str, **arguments: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """Load a model, in training mode, and say what of it is new.

    Args:
        auto_class: transformers class with `from_pretrained`.
        backbone: hub name, or folder with a ``config.json`` and weights.
        arguments: passed on.

    Returns:
        The model, and the names of the parameters that it did not get from there, such as a new head's.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        # trust_remote_code: a model's folder or hub page brings weights, never code
        model, found = auto_class.from_pretrained(
            backbone, trust_remote_code=False, output_loading_info=True, **arguments
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"backbone={backbone!r} cannot be loaded: it is neither a folder with a config.json and weights nor a name "
            "of a model that the hub answers for. Give the path of such a folder, or check the name and the network."
        ) from error
    # from_pretrained leaves the model in eval mode, and Lightning trains a module in the mode it finds it: no dropout.
    model.train()
    mismatched = {entry[0] for entry in found["mismatched_keys"]}
    return cast(nn.Module, model), tuple(sorted({*found["missing_keys"], *mismatched}))


def tokenizer_from(name: str) -> Any:
    """Load a tokenizer, a fast one where there is one.

    Args:
        name: hub name, or folder.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer={name!r} cannot be loaded: it is neither a folder with tokenizer files nor a name that the hub "
            "answers for. Give the model's own, or check the name and the network."
        ) from error


def padding_of(tokenizer: Any) -> int:
    """The token that fills rows up: its own, or one that is never looked at where it has none."""
    for number in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if number is not None:
            return int(number)
    return 0

"""A pretrained transformers model or tokenizer by folder or hub name, or a sentence why not."""

from __future__ import annotations

from typing import Any, cast

from torch import nn


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

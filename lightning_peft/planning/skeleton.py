"""A transformers model without weights, from its config.json alone."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""What weights can be loaded in."""


def skeleton(path: str | PathLike[str], architecture: str | None = None, dtype: str | None = None) -> nn.Module:
    """Build a model on the meta device: all shapes, no numbers, no memory, no network, no code from the folder.

    Args:
        path: a folder with a config.json, or that file.
        architecture: the transformers class to build, such as "LlamaForCausalLM". ``None`` is the first one that the
            config names.
        dtype: what the weights are loaded in. ``None`` is what the config names, else "float32".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no config of a model that the installed transformers has, or the class or dtype is unknown.

    Example:
        >>> skeleton("no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: there is no config.json at 'no/such/folder'; ...
    """
    # Here: importing transformers takes seconds, and the package is imported without it.
    import transformers

    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no config.json at {str(path)!r}; give a model's folder or its config.json. A name "
            "on a hub is not looked up: download its config.json first."
        )
    settings = _read(file)
    kind = str(settings.get("model_type"))
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"{file} is of model_type {kind!r}, which transformers {transformers.__version__} does not have. "
            "Code that a folder brings along is not run: build the model in Python and call lightning_peft.plan."
        )
    named = settings.get("architectures") or []
    chosen = architecture or (named[0] if named else None)
    if chosen is None:
        raise ValueError(
            f"{file} names no architecture; say which class is meant, such as --architecture LlamaForCausalLM."
        )
    wanted = dtype or settings.get("dtype") or settings.get("torch_dtype") or "float32"
    if wanted not in DTYPES:
        raise ValueError(f"dtype={wanted!r}: choose {', '.join(DTYPES)}.")
    found = getattr(transformers, str(chosen), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"architecture {chosen!r} is no model class of transformers {transformers.__version__}; name one, such as "
            "--architecture LlamaForCausalLM."
        )
    config = transformers.CONFIG_MAPPING[kind].from_dict(settings)
    if found.config_class is None or not isinstance(config, found.config_class):
        raise ValueError(f"architecture {chosen!r} is no class for model_type {kind!r}, which {file} names.")
    with torch.device("meta"):
        model: nn.Module = found(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, wanted))
    return model


def _read(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # text or JSON that is none
        raise ValueError(f"{file} is no JSON file: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is no model's config.json: it holds a {type(settings).__name__}.")
    return settings

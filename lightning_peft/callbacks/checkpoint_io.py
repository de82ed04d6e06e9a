"""Checkpoint files that are there whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_peft.atomic import write_whole
from lightning_peft.seams import wrap_method


def write_checkpoints_whole(strategy: Any) -> Callable[[], None]:
    """Let a strategy's checkpoint files be written by :func:`lightning_peft.atomic.write_whole`; returns the undoing.

    Lightning writes to the folder for temporary files and moves the result. Where that is another file system the move
    is a copy onto the final name: killed in its middle, or short of space, it leaves half a file in place of the whole
    one that was there before.
    Remote paths and CheckpointIO plugins of other kinds are left to their own means.
    """
    plugin = strategy.checkpoint_io
    while (inner := getattr(plugin, "checkpoint_io", None)) is not None:
        plugin = inner  # what AsyncCheckpointIO calls in its thread
    if type(plugin) is not TorchCheckpointIO:
        return lambda: None
    return wrap_method(plugin, "save_checkpoint", _save)


def _save(call: Callable[..., Any], plugin: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> Any:
    if storage_options is not None or "://" in str(path) or "::" in str(path):
        return call(checkpoint, path, storage_options)
    # Through memory: torch turns an error of a file's `write` into one that does not say what happened.
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return write_whole(path, buffer.getbuffer())

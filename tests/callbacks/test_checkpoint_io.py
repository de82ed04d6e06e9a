"""Lightning's checkpoint files are written by ours, whoever asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_peft.callbacks.checkpoint_io import write_checkpoints_whole


def strategy(plugin: Any) -> SingleDeviceStrategy:
    return SingleDeviceStrategy(device="cpu", checkpoint_io=plugin)


@pytest.mark.parametrize("wrapper", [lambda plugin: plugin, AsyncCheckpointIO])
def test_the_plugin_that_writes_is_found_and_let_go(tmp_path: Path, wrapper: Any, monkeypatch: Any) -> None:
    synced: list[int] = []
    monkeypatch.setattr("lightning_peft.atomic.os.fsync", synced.append)
    own = TorchCheckpointIO()
    used = strategy(wrapper(own))
    undo = write_checkpoints_whole(used)
    used.checkpoint_io.save_checkpoint({"a": torch.ones(3)}, tmp_path / "a.ckpt")
    used.checkpoint_io.teardown()  # waits for the thread
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["a"].tolist() == [1, 1, 1]
    assert len(synced) == 2  # the file and its folder
    undo()
    assert "save_checkpoint" not in vars(own)


def test_what_is_not_a_local_file_is_left_to_its_own_means(tmp_path: Path) -> None:
    used = strategy(TorchCheckpointIO())
    write_checkpoints_whole(used)
    used.checkpoint_io.save_checkpoint({"a": 1}, "memory://folder/a.ckpt")
    with fsspec.open("memory://folder/a.ckpt") as file:
        assert torch.load(file, weights_only=True) == {"a": 1}
    with pytest.raises(TypeError, match="storage_options"):
        used.checkpoint_io.save_checkpoint({"a": 1}, tmp_path / "a.ckpt", storage_options={"some": 1})

    class Theirs(TorchCheckpointIO):
        pass

    plugin = Theirs()
    write_checkpoints_whole(strategy(plugin))
    assert "save_checkpoint" not in vars(plugin)

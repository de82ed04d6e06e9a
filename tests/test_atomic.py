"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_peft.atomic import write_checkpoints_whole, write_whole


def strategy(plugin: Any) -> SingleDeviceStrategy:
    return SingleDeviceStrategy(device="cpu", checkpoint_io=plugin)


def test_a_file_is_written_into_a_new_folder_with_the_usual_permissions(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_whole(path, b"some")
    plain = tmp_path / "plain"
    plain.touch()
    assert path.read_bytes() == b"some"
    assert path.stat().st_mode == plain.stat().st_mode
    write_whole(path, b"other")
    assert os.listdir(path.parent) == ["file"]
    assert path.read_bytes() == b"other"


def test_a_file_that_cannot_take_its_name_is_an_error_of_its_kind_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError, match=r"taken could not be written: Is a directory\. What it was before sta"):
        write_whole(tmp_path / "taken", b"some")
    assert os.listdir(tmp_path) == ["taken"]


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

"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_peft.atomic import write_whole


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

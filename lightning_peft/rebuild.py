"""Build again the LightningModule that a checkpoint was trained on, from the hyper-parameters in it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from os import PathLike
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_peft.checkpoint import AdapterFileError, check_entry, read


def rebuild(path: str | PathLike[str], named: str | None = None) -> LightningModule:
    """Build the module, without adapters and with its base's own weights; :func:`lightning_peft.load` does the rest.

    A file never makes us import code: a class outside this package has to be named by the user, or imported already.

    Args:
        path: a checkpoint that AdapterCheckpoint has filtered, of a module that calls `save_hyperparameters`.
        named: the class, as package.module.Class. ``None`` is the one that LightningCLI noted in the checkpoint, or
            TextClassifier if the hyper-parameters are its arguments.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: it is damaged or no adapter checkpoint, or does not say what is to be built.
        ValueError: `named` is no LightningModule.
    """
    checkpoint, source = read(path), str(path)
    check_entry(checkpoint, source)
    saved = dict(checkpoint.get("hyper_parameters", {}))
    saved.pop("_instantiator", None)
    noted = saved.pop("_class_path", None)
    kind = _named(named) if named else _noted(noted, saved, source)
    parameters = inspect.signature(kind).parameters
    whole = checkpoint.get("hparams_name")  # the module takes all its hyper-parameters in one argument of this name
    if whole in parameters:
        saved = {whole: saved}
    elif not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        saved = {name: value for name, value in saved.items() if name in parameters}
    missing = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in _STARRED and n not in saved]
    if missing:
        raise AdapterFileError(
            f"{source} does not hold {missing[0]!r}, which {kind.__name__} needs: a module that is to be built from a "
            "checkpoint calls self.save_hyperparameters(). Or build it in Python and use lightning_peft.load."
        )
    named_classes = set(_classes(saved))
    for path_in_file in sorted(named_classes):
        _imported(path_in_file, source)
    module = _instantiate(kind, saved) if named_classes else kind(**saved)
    if is_overridden("configure_model", module, LightningModule):
        module.configure_model()
    return module


_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _noted(noted: str | None, saved: Mapping[str, Any], source: str) -> type[LightningModule]:
    from lightning_peft.modules import TextClassifier

    if noted is None:
        own = inspect.signature(TextClassifier).parameters.keys()
        if saved and saved.keys() <= own and {"backbone", "num_labels"} <= saved.keys():
            return TextClassifier
        raise AdapterFileError(
            f"{source} does not say which LightningModule it was trained on; name it: --model package.module.Class."
        )
    module_name, _, name = noted.rpartition(".")
    if module_name.partition(".")[0] == "lightning_peft":
        return _named(noted)
    found = getattr(sys.modules.get(module_name), name, None)
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        raise AdapterFileError(
            f"{source} was trained on {noted}, and a file does not make us import code; if you trust it, name the "
            f"class: --model {noted}."
        )
    return found


def _named(path: str) -> type[LightningModule]:
    module_name, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module_name), name, None) if module_name else None
    except ModuleNotFoundError as error:
        if not module_name.startswith(str(error.name)):
            raise  # the module is there and lacks something itself
        found = None
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        raise ValueError(f"{path!r} is no LightningModule that can be imported; write it as package.module.Class.")
    return found


def _classes(value: object) -> Iterator[str]:
    """The classes that hyper-parameters name with their arguments, as LightningCLI writes them."""
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield str(value["class_path"])
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _classes(item)


def _imported(path: str, source: str) -> None:
    """Refuse a class that nobody has imported: a file does not make us import code."""
    module_name, _, name = path.rpartition(".")
    if module_name.partition(".")[0] != "lightning_peft" and not hasattr(sys.modules.get(module_name), name):
        raise AdapterFileError(
            f"{source} names the class {path!r} in its hyper-parameters, which is not imported; if you trust it, build "
            "the module in Python and use lightning_peft.load."
        )


def _instantiate(kind: type[LightningModule], saved: Mapping[str, Any]) -> LightningModule:
    """Build nested classes as LightningCLI did."""
    from lightning.pytorch.cli import instantiate_module

    path = f"{kind.__module__}.{kind.__qualname__}"
    module: LightningModule = instantiate_module(kind, {"_class_path": path, **saved})
    return module

"""Build again the LightningModule that a checkpoint was trained on, from the hyper-parameters in it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

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
    saved = checkpoint.get("hyper_parameters", {})
    if not isinstance(saved, Mapping) or not all(type(name) is str for name in saved):
        raise AdapterFileError(f"{source} has hyper-parameters that are no dictionary by name; use another copy.")
    saved = dict(saved)
    saved.pop("_instantiator", None)
    noted = saved.pop("_class_path", None)
    kind = _named(named) if named else _noted(noted, saved, source)
    parameters = inspect.signature(kind).parameters
    whole = checkpoint.get("hparams_name")  # the module takes all its hyper-parameters in one argument of this name
    if isinstance(whole, str) and whole in parameters:
        saved = {whole: saved}
    elif not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        saved = {name: value for name, value in saved.items() if name in parameters}
    missing = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in _STARRED and n not in saved]
    if missing:
        raise AdapterFileError(
            f"{source} does not hold {missing[0]!r}, which {kind.__name__} needs: a module that is to be built from a "
            "checkpoint calls self.save_hyperparameters(). Or build it in Python and use lightning_peft.load."
        )
    named_classes = set(_classes(saved, source))
    if named_classes:
        for path_in_file in sorted({*named_classes, *_dotted(saved)}):
            _check_named(path_in_file, path_in_file in named_classes, source)
    module = _instantiate(kind, saved) if named_classes else kind(**saved)
    if is_overridden("configure_model", module, LightningModule):
        module.configure_model()
    return module


# Hyper-parameters within each other, and the classes that they may name with arguments.
_DEPTH = 32
_PARTS = (nn.Module, Optimizer, LRScheduler, ReduceLROnPlateau)
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _noted(noted: object, saved: Mapping[str, Any], source: str) -> type[LightningModule]:
    from lightning_peft.modules import TextClassifier  # and with it all our modules are imported: see `_found`

    if noted is None:
        own = inspect.signature(TextClassifier).parameters.keys()
        if saved and saved.keys() <= own and {"backbone", "num_labels"} <= saved.keys():
            return TextClassifier
        raise AdapterFileError(
            f"{source} does not say which LightningModule it was trained on; name it: --model package.module.Class."
        )
    found = _found(noted) if isinstance(noted, str) else None
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        raise AdapterFileError(
            f"{source} was trained on {noted}, and a file does not make us import code; if you trust it, name the "
            f"class: --model {noted}."
        )
    return found


def _found(path: str) -> object:
    """What a dotted path names in a module that has been imported; ``None`` if there is none.

    Not by getattr: a package may import a part of itself when it is asked for an attribute.
    """
    module_name, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module_name), "__dict__", {}).get(name)


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


def _classes(value: object, source: str, depth: int = 0) -> Iterator[str]:
    """The classes that hyper-parameters name with their arguments, as LightningCLI writes them."""
    if depth > _DEPTH:
        raise AdapterFileError(f"{source} has hyper-parameters that are nested too deep to be built from.")
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield str(value["class_path"])
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _classes(item, source, depth + 1)


def _dotted(value: object) -> Iterator[str]:
    """Text in hyper-parameters that a parser may take for the path of a function or class, and import."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            yield from _dotted(item)
    elif isinstance(value, str) and "." in value and all(part.isidentifier() for part in value.split(".")):
        yield value


def _check_named(path: str, called: bool, source: str) -> None:
    """Refuse what nobody has imported, and what is no part of a model: a file does not choose which code runs."""
    found = _found(path)
    if found is None and (called or _importable(path.partition(".")[0])):
        raise AdapterFileError(
            f"{source} names the class {path!r} in its hyper-parameters, which is not imported; if you trust it, build "
            "the module in Python and use lightning_peft.load."
        )
    if found is not None and not (isinstance(found, type) and issubclass(found, _PARTS)):
        raise AdapterFileError(
            f"{source} names {path!r} in its hyper-parameters, which is no nn.Module, optimizer or learning rate "
            "scheduler; if you trust it, build the module in Python and use lightning_peft.load."
        )


def _importable(name: str) -> bool:
    return name in sys.modules or find_spec(name) is not None


def _instantiate(kind: type[LightningModule], saved: Mapping[str, Any]) -> LightningModule:
    """Build nested classes as LightningCLI did."""
    from lightning.pytorch.cli import instantiate_module

    path = f"{kind.__module__}.{kind.__qualname__}"
    module: LightningModule = instantiate_module(kind, {"_class_path": path, **saved})
    return module

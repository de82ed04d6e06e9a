"""What is checked of an adapter checkpoint's contents before anything is built from them.

A digest is no signature: whoever writes the file writes the digest too. So all that is used of a file is checked for
its type and its bounds, and adapters are first built without memory, to see whether the file holds their tensors.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping
from math import isfinite
from reprlib import repr as shortened
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_peft.adapters.attention import has_in_proj
from lightning_peft.adapters.base import Adapter
from lightning_peft.archive import AdapterFileError
from lightning_peft.fingerprint import SAMPLES

M = TypeVar("M", bound=nn.Module)
CUT = "compacted"
"""In the entry of a run that was compacted: what its adapters were before, as `WHOLE` of `rank.budget` has it."""
_DEPTH = 32
"""Lists and dictionaries within each other."""
_LENGTH = 2**25
"""Characters and values in all; text can be repeated in a file that does not grow with it."""
_PLAIN = "a number, text, a list or a dictionary"
_RECORD = {"class", "arguments", "components", "cost", "dense"}
"""What is said of an adapter before components were cut out of it."""
_NAMES = 64
"""Names of one tensor: a shared parameter is saved under each of its names, and digested as often."""


def check_tensors(state: Mapping[Any, Any], base: Mapping[Any, Any], source: str) -> None:
    """Check that all are plain dense tensors, no larger than the memory that they have.

    Raises:
        AdapterFileError: one is not.
    """
    total, stored = 0, {}
    for tensors in (state, base):
        for name, value in tensors.items():
            _require(_is_name(name), source, "the name of a tensor", name, "text that can be printed")
            if type(value) not in (Tensor, nn.Parameter):
                raise AdapterFileError(f"{source}: {name!r} is a {type(value).__name__}, not a tensor.")
            if (kind := _odd(value)) is not None:
                raise AdapterFileError(
                    f"{source}: {name!r} is {kind} tensor; a checkpoint of adapters holds plain dense ones."
                )
            storage = value.untyped_storage()
            stored[storage.data_ptr()] = storage.nbytes()
            total += value.numel() * value.element_size()
    _require(total <= _NAMES * sum(stored.values()), source, "the tensors' size", total, "what the file holds")
    for name, value in base.items():
        _require(value.dim() == 1 and len(value) <= SAMPLES, source, f"base[{name!r}]", value.shape, "a few values")


def check_plain(value: Any, source: str) -> None:
    """Check that a value from a file is made of plain ones, is not too deep, and is not endless.

    Raises:
        AdapterFileError: it is not.
    """
    measured: dict[int, tuple[int, int]] = {}

    def measure(item: Any, depth: int) -> tuple[int, int]:
        """Length and height as written out. A list within many lists is measured once, and counts as often as it is."""
        if type(item) not in (dict, list, tuple):
            plain = item is None or type(item) in (bool, float, str) or _is_whole(item)
            _require(plain, source, "a value", item, _PLAIN)
            return 16 + (len(item) if type(item) is str else 0), 0
        if id(item) not in measured:
            _require(depth < _DEPTH, source, "an entry", "too long or too deep", "shorter")
            parts = item
            if type(item) is dict:
                _require(all(type(key) is str for key in item), source, "a value", item, f"{_PLAIN} by name")
                parts = [*item, *item.values()]
            sizes = [measure(part, depth + 1) for part in parts]
            measured[id(item)] = 16 + sum(n for n, _ in sizes), 1 + max((height for _, height in sizes), default=0)
        length, height = measured[id(item)]
        _require(length <= _LENGTH and depth + height <= _DEPTH, source, "an entry", "too long or too deep", "shorter")
        return length, height

    measure(value, 0)


def check_structure(entry: Mapping[str, Any], source: str) -> None:
    """Check that an entry has the fields that it is read for, each of its type.

    Raises:
        AdapterFileError: a field is missing or of another type.
    """
    recipe = entry.get("recipe")
    _require(type(recipe) is dict, source, "recipe", recipe, "a dictionary")
    assert isinstance(recipe, dict)
    groups, trained = recipe.get("adapters"), recipe.get("trained")
    _require(_is_list(groups), source, "recipe['adapters']", groups, "a list")
    _require(_are_names(trained), source, "recipe['trained']", trained, "a list of names")
    seen: set[str] = set()
    for group in groups or ():
        _require(type(group) is dict, source, "an adapter", group, "a dictionary")
        kind, arguments, layers = group.get("class"), group.get("arguments"), group.get("layers")
        _require(_is_name(kind), source, "an adapter's class", kind, "text, module:class")
        _require(type(arguments) is dict, source, "an adapter's arguments", arguments, "a dictionary")
        _require(_are_names(layers), source, "an adapter's layers", layers, "a list of names")
        for name in layers:
            _require(name not in seen, source, "an adapted layer", name, "named once")
            seen.add(name)
    beside, heads = recipe.get("beside", []), recipe.get("heads", [])
    _require(_is_list(beside), source, "recipe['beside']", beside, "a list")
    _require(_is_list(heads), source, "recipe['heads']", heads, "a list")
    for other in [*beside, *heads]:
        _require(type(other) is dict, source, "what is beside adapters", other, "a dictionary")
        for field in ("class", "path"):
            _require(_is_name(other.get(field)), source, f"its {field}", other.get(field), "text that can be printed")
        _require(type(other.get("arguments")) is dict, source, "its arguments", other.get("arguments"), "a dictionary")
    for field, least in (("ranks", 0), ("costs", 1)):
        numbers = entry.get(field)
        _require(type(numbers) is dict, source, field, numbers, "a dictionary")
        assert isinstance(numbers, dict)
        for name, number in numbers.items():
            _require(_is_name(name), source, f"a name in {field}", name, "text that can be printed")
            good = type(number) is int and least <= number
            _require(good, source, f"{field}[{name!r}]", number, f"a whole number from {least}")
    derived = entry.get("derived", {})
    _require(type(derived) is dict, source, "derived", derived, "a dictionary")
    for name, each in derived.items():
        good = _is_name(name) and _is_name(each)
        _require(good, source, f"derived[{name!r}]", each, "a digest as text, by name")
    _check_records(entry.get(CUT, {}), source)


def _check_records(records: Any, source: str) -> None:
    """What adapters were before components were cut out of them, by layer."""
    _require(type(records) is dict, source, CUT, records, "a dictionary")
    for name, record in records.items():
        where = f"{CUT}[{name!r}]"
        _require(_is_name(name), source, f"a name in {CUT}", name, "text that can be printed")
        _require(type(record) is dict, source, where, record, "a dictionary")
        _require(record.keys() == _RECORD, source, where, record, "as we write it")
        _require(_is_name(record["class"]), source, where, record["class"], "a class as text, module:class")
        _require(type(record["arguments"]) is dict, source, where, record["arguments"], "arguments by name")
        for key in ("components", "cost", "dense"):
            _require(_is_whole(record[key]) and record[key] > 0, source, where, record[key], f"{key}, at least 1")


def check_ranks(entry: Mapping[str, Any], source: str) -> None:
    """Check that the ranks and costs of a checked entry are those of its layers.

    Raises:
        AdapterFileError: a layer is missing or unknown, or has more open components than it was given.
    """
    ranks, costs = entry["ranks"], entry["costs"]
    given = {name: group["arguments"].get("rank") for group in entry["recipe"]["adapters"] for name in group["layers"]}
    given |= {name: record["components"] for name, record in entry.get(CUT, {}).items()}
    odd = sorted(ranks.keys() ^ costs.keys()) or sorted(ranks.keys() - given.keys())
    _require(not odd, source, "a layer with a rank", odd[:1], "a layer with an adapter and a cost")
    for name, rank in ranks.items():
        most = given[name]
        _require(type(most) is not int or rank <= most, source, f"ranks[{name!r}]", rank, f"at most {most}")


def adapter_class(path: str, source: str) -> type[Adapter]:
    """The adapter class that a recipe names, which must have been imported: a file never makes us import anything.

    Raises:
        AdapterFileError: there is no such class, or it is no adapter.
    """
    return imported_class(path, Adapter, "adapter", source)  # type: ignore[type-abstract]


def imported_class(path: str, kind: type[M], what: str, source: str) -> type[M]:
    """The class that a recipe names, which must have been imported: a file never makes us import anything.

    Raises:
        AdapterFileError: there is no such class, or it is none of `kind`.
    """
    module_name, _, qualname = path.partition(":")
    found: Any = sys.modules.get(module_name)
    for part in qualname.split("."):
        # Not getattr: a package may import a part of itself when it is asked for an attribute.
        found = getattr(found, "__dict__", {}).get(part)
    if not (isinstance(found, type) and issubclass(found, kind)) or inspect.isabstract(found):
        raise AdapterFileError(
            f"{source} was made with the {what} class {path!r}, which is not imported; import it before loading."
        )
    return found


def check_arguments(kind: type[nn.Module], arguments: Mapping[str, Any], source: str) -> None:
    """Check that a class takes these arguments: their names, and the types of its own defaults.

    Raises:
        AdapterFileError: a name is unknown or missing, or a value is of another type.
    """
    parameters = dict(list(inspect.signature(kind).parameters.items())[1:])
    unknown = sorted(arguments.keys() - parameters.keys())
    if unknown:
        raise AdapterFileError(
            f"{source} gives {kind.__name__} the argument {unknown[0]!r}, which it does not have; it has "
            f"{', '.join(parameters) or 'none'}. It was made with another version, or changed."
        )
    for name, parameter in parameters.items():
        default = parameter.default
        if name not in arguments:
            _require(default is not parameter.empty, source, f"{kind.__name__}'s {name}", None, "given")
            continue
        value, where = arguments[name], f"{kind.__name__}'s {name}"
        if type(default) is float:
            finite = type(value) in (int, float) and isfinite(value)
            _require(finite, source, where, value, "a finite number")
        elif type(default) in (bool, int, str):
            right = type(value) is type(default)
            _require(right, source, where, value, f"of type {type(default).__name__}")


def check_sizes(
    kind: type[nn.Module],
    arguments: Mapping[str, Any],
    layer: nn.Module,
    path: str,
    state: Mapping[str, Tensor],
    source: str,
) -> None:
    """Check that the file holds the tensors of the adapter that it asks for, before memory is taken for them.

    The adapter is built around a copy of the layer without memory, on the meta device. A class whose start depends on
    the layer's values cannot be built so; it is built around the layer itself, and its arguments are its own concern.

    Args:
        kind: the adapter's class, or a head's.
        arguments: its arguments, of the right names and types.
        layer: what it is to adapt; an attention stands for its `in_proj`.
        path: the adapter's name in the state dict.
        state: what the file holds.
        source: the file's name, for the message.

    Raises:
        AdapterFileError: the class refuses the arguments, or a tensor is missing or of another shape.
    """
    try:
        with torch.device("meta"):
            built = kind(_without_memory(layer), **arguments)
    except (TypeError, ValueError, OverflowError) as error:
        raise AdapterFileError(f"{source} asks for an adapter that cannot be: layer {path!r}: {error}") from error
    except (NotImplementedError, RuntimeError) as error:
        if "overflow" in str(error):  # more bytes than can be counted, and not a start that depends on values
            raise AdapterFileError(f"{source} asks for more memory at {path!r} than there can be.") from error
        return
    for key, value in built.state_dict().items():
        saved = state.get(f"{path}.{key}")
        if key.startswith("base."):
            continue
        if saved is None:
            raise AdapterFileError(f"{source} lacks {f'{path}.{key}'!r}, which the adapter that it asks for has.")
        if saved.shape != value.shape:
            raise AdapterFileError(
                f"{source}: {f'{path}.{key}'!r} has shape {tuple(saved.shape)}, and {tuple(value.shape)} in the "
                "adapter that it asks for."
            )


def _without_memory(layer: nn.Module) -> nn.Module:
    if has_in_proj(layer):
        weight: Tensor = layer.in_proj_weight  # type: ignore[assignment]
        return nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    return _shadow(layer)


def _shadow(layer: nn.Module) -> nn.Module:
    shadow = copy.copy(layer)
    shadow._parameters = {
        name: None if p is None else nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for name, p in layer._parameters.items()
    }
    # A model that an adapter stands in the place of has layers inside.
    shadow._modules = {name: None if c is None else _shadow(c) for name, c in layer._modules.items()}
    return shadow


def _odd(value: Tensor) -> str | None:
    """What is odd about a tensor, with its article; ``None`` for a plain dense one."""
    if value.is_nested:
        return "a nested"
    if value.layout != torch.strided:
        return "a sparse"
    if value.is_quantized:
        return "a quantized"
    if value.is_meta:
        return "a meta"
    if value.is_conj() or value.is_neg():
        return "a lazily conjugated or negated"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return "an expanded"  # to copy it, as its digest does, could take any amount of memory
    return None


def _is_whole(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_list(value: object) -> bool:
    return type(value) in (list, tuple)


def _is_name(value: object) -> bool:
    """Text that can be shown: a name is printed, and a terminal obeys what cannot be."""
    return type(value) is str and value.isprintable()


def _are_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_name, value))


def _require(right: bool, source: str, what: str, value: object, wanted: str) -> None:
    if not right:
        raise AdapterFileError(
            f"{source} says that {what} is {shortened(value)}; it must be {wanted}. The file is damaged, or was not "
            "written by AdapterCheckpoint."
        )

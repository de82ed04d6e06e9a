"""What is checked of a file of tensors before torch reads it: nothing is allocated that is not really in the file.

`torch.load(weights_only=True)` runs no code from a file, but it believes what a file says of sizes. So here the records
of the zip archive are compared with the file's size, and the pickle that names them is walked with stand-ins that do
nothing: every storage has to be as long as its record, every tensor has to lie within its storage.
"""

from __future__ import annotations

import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import SEEK_END, BytesIO
from os import PathLike
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO, ClassVar
from zipfile import ZIP_STORED, ZipFile

import torch

# What torch.save writes. A pickle in another dialect could be read in two ways, by this check and by torch.
_OPERATIONS = {
    "APPEND", "APPENDS", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINPERSID", "BINPUT", "BINUNICODE",
    "BUILD", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "EMPTY_TUPLE", "GLOBAL", "LONG1", "LONG_BINGET", "LONG_BINPUT",
    "MARK", "NEWFALSE", "NEWOBJ", "NEWTRUE", "NONE", "PROTO", "REDUCE", "SETITEM", "SETITEMS", "SHORT_BINSTRING",
    "STOP", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
}  # fmt: skip
# The records that end a zip archive: length and start of the directory, place of the first record, length of a comment.
_END = Struct("<4s36xQQ4s4xQ4x4s16xH")


class AdapterFileError(RuntimeError):
    """A file does not hold what it should, or not for this model."""


class _Refused(ValueError):
    """Why a file is not read, as a part of a sentence."""


def unreadable(path: object, error: BaseException) -> str:
    """The sentence for a file that cannot be read."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{path} cannot be read: it is cut short, damaged, or holds more than tensors ({first}). Use another copy."


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn whatever reading a damaged file raises into AdapterFileError; a missing file stays a missing file.

    Raises:
        AdapterFileError: the block raised; what torch raises on a damaged file is not documented.
    """
    try:
        yield
    except (FileNotFoundError, AdapterFileError):
        raise
    except Exception as error:
        raise AdapterFileError(unreadable(path, error)) from error


def check_archive(path: str | PathLike[str]) -> None:
    """Check a file that torch.save wrote, before it is loaded; a file of an older format is no zip and is refused.

    Args:
        path: an existing file.

    Raises:
        AdapterFileError: it is cut or damaged, is no such file, holds other than tensors and plain values, or says of
            itself that it holds more than it does.
    """
    with reading(path), Path(path).open("rb") as file, ZipFile(file) as archive:
        records = _records(archive, _directory(file))
        data = archive.read(records.pop("data.pkl")[0])
        sizes = {name.removeprefix("data/"): size for name, (_, size) in records.items() if name.startswith("data/")}
        _check_operations(data)
        _Walk(data, sizes).load()


def _directory(file: BinaryIO) -> int:
    """Where the archive's directory begins; the records are before it.

    The directory has to end the file in the one way in which torch.save writes it: otherwise two readers could find two
    directories, this check one and torch the other.
    """
    end = file.seek(0, SEEK_END) - _END.size
    if end >= 0:
        file.seek(end)
        zip64, length, start, locator, place, last, comment = _END.unpack(file.read())
        signatures = (zip64, locator, last) == (b"PK\6\6", b"PK\6\7", b"PK\5\6")
        if signatures and place == end and start + length == end and comment == 0:
            return int(start)
    raise _Refused("not the end of a zip archive as torch.save writes it")


def _records(archive: ZipFile, length: int) -> dict[str, tuple[str, int]]:
    """Name below the archive's folder -> full name and size, of records that lie in the file as they are."""
    entries = archive.infolist()
    if not entries:
        raise _Refused("no record")
    if any(entry.compress_type != ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
        raise _Refused("a compressed record")
    if any(entry.flag_bits & 1 for entry in entries):
        raise _Refused("an encrypted record")
    if sum(entry.file_size for entry in entries) > length:
        raise _Refused("its records say that they are longer than the file")
    folder = entries[0].filename.partition("/")[0] + "/"
    for entry in entries:
        name = entry.filename
        if name != entry.orig_filename or not name.isascii() or not name.startswith(folder):
            raise _Refused(f"a record called {entry.orig_filename!r}")
    # torch looks a record up without regard to case.
    if len({entry.filename.lower() for entry in entries}) != len(entries):
        raise _Refused("two records of one name")
    found = {entry.filename.removeprefix(folder): (entry.filename, entry.file_size) for entry in entries}
    if "data.pkl" not in found:
        raise _Refused("no record data.pkl")
    return found


def _check_operations(data: bytes) -> None:
    """Refuse operations that torch.save does not write, and places in the memo that would make a reader allocate."""
    puts = 0
    for operation, argument, _ in pickletools.genops(data):
        if operation.name not in _OPERATIONS:
            raise _Refused(f"the operation {operation.name}")
        if operation.name in ("BINPUT", "LONG_BINPUT"):
            puts += 1
            if argument is None or argument > puts:
                raise _Refused("a memo with gaps")


class _Walk(pickle.Unpickler):
    """Goes through a pickle and looks at its tensors. What it names is neither looked up nor called."""

    def __init__(self, data: bytes, sizes: Mapping[str, int]) -> None:
        super().__init__(BytesIO(data), encoding="bytes")
        self.sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path in _STAND_INS:
            return _STAND_INS[path]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module in ("torch", "torch.storage") and name in _ITEM_SIZES:
            return type(name, (_StorageType,), {"itemsize": _ITEM_SIZES[name]})
        if path in _user_allowed():
            return _Inert
        kind = next((kind for word, kind in _KINDS.items() if word in name), None)
        raise _Refused(f"{kind} tensors" if kind else path)

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, numel = pid  # what else stands there, torch refuses
        if not (isinstance(kind, type) and issubclass(kind, _StorageType)) or type(numel) is not int:
            raise _Refused("a storage of an unknown kind")
        if type(key) is not str or self.sizes.get(key) != numel * kind.itemsize:
            raise _Refused(f"a storage of {numel} elements that is not in the file")
        return _Storage(numel * kind.itemsize, kind.itemsize)


class _Inert:
    """Stands for what a pickle names: takes any argument and state, and does nothing."""

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _NeverCalled(_Inert):
    """A class that a pickle may name and must not call: torch.Tensor(n) allocates."""

    def __init__(self, *arguments: Any) -> None:
        raise _Refused("a call of a tensor's class")


class _Encode(_Inert):
    """Bytes, which the pickle protocol writes as text."""

    def __init__(self, text: str, encoding: str) -> None:
        if encoding != "latin1":
            raise _Refused("bytes in a text encoding")


class _StorageType:
    """The type of a storage, which torch would allocate if it were called."""

    itemsize: ClassVar[int]

    def __new__(cls, *arguments: Any) -> Any:
        raise _Refused("a call of a storage's class")


class _Storage:
    """A storage that is not read."""

    def __init__(self, length: int, itemsize: int) -> None:
        self.length, self.itemsize = length, itemsize


class _Tensor(_Inert):
    """A tensor of any shape within its storage."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> None:
        self._require_inside(storage, storage.itemsize, offset, size, stride)

    @staticmethod
    def _require_inside(storage: Any, itemsize: int, offset: Any, size: Any, stride: Any) -> None:
        whole = all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride))
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else -1
        # Otherwise torch makes the storage longer.
        if not whole or type(storage) is not _Storage or (last + 1) * itemsize > storage.length:
            raise _Refused("a tensor that is larger than its storage")


class _TypedTensor(_Tensor):
    """A tensor whose type is not its storage's."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> None:
        self._require_inside(storage, rest[2].itemsize, offset, size, stride)


class _Wrapped(_Inert):
    """A parameter around a tensor."""

    def __init__(self, tensor: Any, *rest: Any) -> None:
        if not isinstance(tensor, _Tensor):
            raise _Refused("a parameter around something else than a tensor")


class _WithAttributes(_Inert):
    """A tensor that has attributes: function, type, arguments, state."""

    def __init__(self, function: Any, kind: Any, arguments: Any, state: Any) -> None:
        if not (isinstance(function, type) and issubclass(function, _Tensor | _Wrapped)):
            raise _Refused("a tensor with a constructor of its own")
        function(*arguments)


_STAND_INS: Mapping[str, type] = {
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": _Inert,
    "builtins.set": set,
    "builtins.complex": complex,
    "__builtin__.set": set,  # as protocol 2 writes them
    "__builtin__.complex": complex,
    "_codecs.encode": _Encode,
    "torch.Size": _Inert,
    "torch.Tensor": _NeverCalled,
    "torch.device": _Inert,
    "torch.serialization._get_layout": _Inert,
    "torch.nn.parameter.Parameter": _NeverCalled,
    "torch._utils._rebuild_tensor_v2": _Tensor,
    "torch._utils._rebuild_tensor_v3": _TypedTensor,
    "torch._utils._rebuild_parameter": _Wrapped,
    "torch._utils._rebuild_parameter_with_state": _Wrapped,
    "torch._tensor._rebuild_from_type_v2": _WithAttributes,
}
# Bytes of an element. Storages of quantized tensors are not among them, nor those of other devices.
_ITEM_SIZES = {
    "UntypedStorage": 1,
    **dict.fromkeys(("BoolStorage", "ByteStorage", "CharStorage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}
# Part of the name of the function that builds such a tensor -> the kind's name.
_KINDS = {"sparse": "sparse", "qtensor": "quantized", "nested": "nested", "njt": "nested", "meta": "meta"}


def _user_allowed() -> set[str]:
    """What the user has told torch to be safe, by name."""
    allowed = torch.serialization.get_safe_globals()
    return {f[1] if isinstance(f, tuple) else f"{f.__module__}.{f.__qualname__}" for f in allowed}

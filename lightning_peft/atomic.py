"""Files that are there whole or not at all, also when a process is killed or the disk is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from uuid import uuid4

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write a file under another name in its folder, flush it to the disk, and rename it in one step.

    Until the last step `path` is what it was before. A process that is killed on the way leaves a file `.<hex>.part`,
    which may be deleted.

    Raises:
        OSError: it could not be written, such as for lack of space; nothing is left of it.
    """
    path = Path(path)
    # Without the final name in it: Lightning and others find a folder's newest checkpoint by parts of names.
    part = path.with_name(f".{uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        flush(path.parent)
    except OSError as error:
        raise could_not_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # a folder cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def could_not_write(path: Path, error: OSError) -> OSError:
    """The error for a file or folder that could not be written, of the same kind and number."""
    advice = " Free space there, or write to another disk." if error.errno in _FULL else ""
    text = f"{path} could not be written: {error.strerror or error}. What it was before stays.{advice}"
    return OSError(error.errno, text) if error.errno else OSError(text)

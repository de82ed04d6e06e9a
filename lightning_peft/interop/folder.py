"""Write a folder whole or not at all, and say what was written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from lightning_peft.atomic import could_not_write, flush

# By this tag in its model card an export is known for one, so that it may be replaced by the next.
TAG = "lightning-peft"
_CARD = "README.md"
_OURS = (
    _CARD,
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "load_compressed.py",
    "modeling_compressed.py",
    "ranks.png",
    "report.json",
    "report.md",
)
_WHOLE = ("merged", "compressed")  # modes in which the head is a part of the model that is written


@dataclass(frozen=True)
class Export:
    """What was written, and how it was checked; print it.

    Attributes:
        folder: where it is.
        mode: "padded", "compact", "folded", "adalora", "merged" or "compressed".
        ranks: open components of every adapted layer.
        head: names of the modules whose trained weights were written beside the adapters.
        bytes: size of the weights' files.
        max_difference: largest absolute difference found by the check.
        check: what was compared.
        notes: what a user of the folder should know.
        left_out: layers that are not in the files: without an open component they act as their base.
    """

    folder: Path
    mode: str
    ranks: Mapping[str, int]
    head: tuple[str, ...]
    bytes: int
    max_difference: float
    check: str
    notes: tuple[str, ...] = field(default=())
    left_out: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        used = [rank for name, rank in self.ranks.items() if name not in self.left_out]
        lines = [
            f"Wrote {self.folder} ({self.mode}, {self.bytes:,} bytes).",
            f"  layers: {len(used)} with ranks {min(used)} to {max(used)}, {sum(used)} components in all"
            + (f"; {len(self.left_out)} of rank 0 left out" if self.left_out else ""),
            f"  head: {', '.join(self.head) or 'left out'}" if self.mode not in _WHOLE else "",
            f"  checked: {self.check}; largest difference {self.max_difference:.1e}",
        ]
        return "\n".join([line for line in lines if line] + [f"  note: {note}" for note in self.notes])


@contextmanager
def whole_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a new folder to write into, which takes the name `folder` at the end, or vanishes if anything fails.

    An earlier export is replaced. In any other folder that is not empty, `overwrite` replaces the files that an export
    consists of and keeps the rest.

    Raises:
        FileExistsError: `folder` is a file, or holds something else than an earlier export and `overwrite` is not set.
        OSError: it could not be written, such as for lack of space.
    """
    refuse_to_overwrite(folder, overwrite)
    folder = folder.resolve()  # the folder itself, if this is a link to it
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that renaming stays in one file system and is one step.
    new = folder.parent / f".{folder.name}.{uuid4().hex}.part"
    new.mkdir()
    try:
        yield new
        for file in new.rglob("*"):
            flush(file)
        flush(new)
        old = new.with_suffix(".old")
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        if old.exists():
            for entry in old.iterdir():
                if not _is_ours(entry.name):
                    entry.rename(folder / entry.name)
            shutil.rmtree(old)
        flush(folder.parent)
    except OSError as error:
        if error.errno is None:
            raise  # a reader's, who does not find what it wants; it says so
        raise could_not_write(folder, error) from error
    except SafetensorError as error:  # which keeps the system's error as text alone
        raise could_not_write(folder, OSError(_number(error), str(error))) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def refuse_to_overwrite(folder: Path, overwrite: bool) -> None:
    """Raise FileExistsError if writing `folder` would destroy what no export wrote; see :func:`whole_folder`."""
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; an export is a folder. Give another name.")
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if not entries or overwrite:
        return
    card = folder / _CARD
    known = card.is_file() and f"- {TAG}\n" in card.read_text(encoding="utf-8", errors="replace")
    if not known or not all(_is_ours(entry) for entry in entries):
        raise FileExistsError(
            f"{folder} holds files that are no earlier export ({', '.join(entries[:3])}"
            f"{', ...' if len(entries) > 3 else ''}). Give another folder, or overwrite=True to write into this one: "
            "files of an export's names are replaced, all others are kept."
        )


def write_card(folder: Path, library: str, base: str | None, text: Sequence[str]) -> None:
    """Write the model card, with the tag that marks an export; `base` is a name on a hub."""
    named = [f"base_model: {base}"] if base else []
    lines = ["---", *named, f"library_name: {library}", "tags:", f"- {TAG}", "---", "", *text, ""]
    (folder / _CARD).write_text("\n".join(lines), encoding="utf-8")


def public_name(base: str | None) -> str | None:
    """A base model's name on a hub; ``None`` for a path, which means nothing to the readers of a model card."""
    return None if not base or base.startswith((".", "/", "~")) or Path(base).exists() else base


def _number(error: SafetensorError) -> int:
    """The system's number in "I/O error: No space left on device (os error 28)"; 0 if there is none."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def _is_ours(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _OURS)

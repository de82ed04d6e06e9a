"""Labelled texts from files and from `datasets` names, as plain rows."""

from __future__ import annotations

import csv
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".tab")
_FIELD_SIZE_LOCK = threading.Lock()  # csv has one limit for the whole process


class Row(NamedTuple):
    """One text and its label; the label is empty where the file has none."""

    text: str
    label: str


def read_file(path: str | Path, text: str | None = None, label: str | None = None) -> list[Row]:
    """Read a csv, tsv, jsonl or Orange `.tab` file.

    A `.tab` file has three header lines: names, kinds, roles. The column with role ``class`` is its label and the first
    ``string`` column its text, if no names are given. In the other formats the names default to ``text`` and ``label``.

    Args:
        path: file; its suffix says the format.
        text: name of the column with the text.
        label: name of the column with the label. A file without the default label column has empty labels.
    Raises:
        ValueError: unknown suffix, no such file, or no such column.
    """
    path = table_file(path)
    if path.suffix == ".jsonl":
        return list(_jsonl(path, text, label))
    with path.open(encoding="utf-8", newline="") as file, long_fields():
        reader = csv.reader(file, dialect=dialect_of(path))
        names = next(reader, [])
        if path.suffix == ".tab":
            kinds, roles = next(reader, []), next(reader, [])
            text = text or _first(names, kinds, "string") or "text"
            label = label or _first(names, roles, "class")
        text_at, label_at = _columns(path, names, text, label)
        return [
            Row(row[text_at], row[label_at].strip() if label_at is not None and label_at < len(row) else "")
            for row in reader
            if len(row) > text_at
        ]


def table_file(path: str | Path, suffixes: Sequence[str] = _SUFFIXES) -> Path:
    """The path of a file that is there, in one of these formats.

    Raises:
        ValueError: unknown suffix, or no such file.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise ValueError(f"{str(path)!r} has suffix {path.suffix!r}; files end in {', '.join(suffixes)}.")
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r} (looked in {str(Path.cwd())!r}).")
    return path


def dialect_of(path: Path) -> str:
    """What `csv` calls the format."""
    return "excel" if path.suffix == ".csv" else "excel-tab"


def read_texts(path: str | Path, text: str | None = None) -> list[str]:
    """The texts of a file, for a model of language: labels are neither needed nor looked at.

    Args:
        path: a `.txt` file, which is one text from start to end, or any file that :func:`read_file` takes.
        text: name of the column with the text.
    Raises:
        ValueError: unknown suffix, no such file, or no such column; a column named for a `.txt` file, which has none.
    """
    path = Path(path)
    if path.suffix != ".txt":
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"{str(path)!r} has suffix {path.suffix!r}; files end in .txt, {', '.join(_SUFFIXES)}.")
        return [row.text for row in read_file(path, text)]
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r} (looked in {str(Path.cwd())!r}).")
    if text is not None:
        raise ValueError(f"{str(path)!r} is plain text and has no column {text!r}; leave text out.")
    return [path.read_text(encoding="utf-8")]


def load_split(name: str, split: str) -> Any:
    """One split of a data set, by its `datasets` name.

    Raises:
        ModuleNotFoundError: the optional package `datasets` is missing.
    """
    try:
        datasets = import_module("datasets")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"dataset={name!r} is read with the package 'datasets', which is not installed: "
            "run `pip install datasets`, or give csv, tsv, jsonl or tab files as train, val and test."
        ) from error
    return datasets.load_dataset(name, split=split)


def read_dataset(name: str, split: str, text: str | None = None, label: str | None = None) -> list[Row]:
    """Read one split of a data set by its `datasets` name; class indices become their names where the set has them.

    Raises:
        ModuleNotFoundError: the optional package `datasets` is missing.
        ValueError: no such column.
    """
    table = load_split(name, split)
    text_at, label_at = _columns(name, table.column_names, text, label)
    texts = table[table.column_names[text_at]]
    if label_at is None:
        return [Row(str(value), "") for value in texts]
    column = table.column_names[label_at]
    class_names = getattr(table.features[column], "names", None)
    return [
        # -1 is how such sets mark a row whose label is held back
        Row(str(value), "" if index in (None, -1) else class_names[index] if class_names else str(index))
        for value, index in zip(texts, table[column], strict=True)
    ]


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a jsonl file, each with the number of its line.

    Raises:
        ValueError: a line is not JSON.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{str(path)!r}, line {number}, is not JSON: {error}.") from error
            yield number, fields


def _jsonl(path: Path, text: str | None, label: str | None) -> Iterator[Row]:
    for number, fields in json_lines(path):
        if not isinstance(fields, dict) or (text or "text") not in fields:
            raise ValueError(
                f"{str(path)!r}, line {number}, has no {text or 'text'!r}; it has {names_in(fields)}. "
                "Name the field with text=..."
            )
        if label is not None and label not in fields:
            raise ValueError(f"{str(path)!r}, line {number}, has no {label!r}; it has {names_in(fields)}.")
        value = fields.get(label or "label")
        yield Row(str(fields[text or "text"]), "" if value is None else str(value).strip())


def _columns(source: Path | str, names: list[str], text: str | None, label: str | None) -> tuple[int, int | None]:
    """Where text and label are; the label may be absent only if nobody asked for it by name."""
    for role, name in (("text", text or "text"), ("label", label)):
        if name is not None and name not in names:
            given = names_in(names)
            raise ValueError(f"{str(source)!r} has no column {name!r}; it has {given}. Name it with {role}=...")
    label = label or "label"
    return names.index(text or "text"), names.index(label) if label in names else None


def _first(names: list[str], marks: list[str], wanted: str) -> str | None:
    return next((name for name, mark in zip(names, marks, strict=False) if mark.strip() == wanted), None)


def names_in(fields: Any) -> str:
    """The names of columns or fields, for a sentence."""
    return ", ".join(map(repr, fields)) if isinstance(fields, dict | list) and fields else "no columns"


@contextmanager
def long_fields() -> Iterator[None]:
    """Lift csv's limit of 131,072 characters a field, which a long document passes, and put it back."""
    with _FIELD_SIZE_LOCK:
        before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a C long: 32 bits on Windows
        try:
            yield
        finally:
            csv.field_size_limit(before)

"""Pairs of texts, and conversations, from files and from `datasets` names, as plain rows."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_peft.modules.text_files import dialect_of, json_lines, load_split, long_fields, names_in, table_file

Message = Mapping[str, str]
"""One turn of a conversation: its ``role`` and its ``content``."""


class Pair(NamedTuple):
    """Two texts, the second of which is what a model is to write; it is empty where the file has none."""

    source: str
    target: str


def read_pairs(
    path: str | Path,
    source: str,
    target: str,
    roles: tuple[str, str] = ("source", "target"),
    dataset: str | None = None,
) -> list[Pair]:
    """Read two columns of a csv, tsv, jsonl or Orange `.tab` file, or of a split of a data set.

    Texts stay as they are, spaces included. The second column may be absent, as it is where answers are not known yet.

    Args:
        path: file; its suffix says the format. With `dataset`, the name of a split.
        source: name of the first column.
        target: name of the second.
        roles: what the arguments are called in an error's sentence.
        dataset: a `datasets` name.

    Raises:
        ModuleNotFoundError: the optional package `datasets` is missing.
        ValueError: unknown suffix, no such file, or no such column.
    """
    found: Iterator[Pair]
    if dataset is not None:
        table = load_split(dataset, str(path))
        _require(source, table.column_names, dataset, roles[0])
        second = table[target] if target in table.column_names else [None] * len(table)
        found = (Pair(_text(a), _text(b)) for a, b in zip(table[source], second, strict=True))
    else:
        path = table_file(path)
        if path.suffix == ".jsonl":
            found = _from_lines(path, source, target, roles[0])
        else:
            found = _from_table(path, source, target, roles[0])
    return list(found)


def read_conversations(path: str | Path, column: str, dataset: str | None = None) -> list[list[Message]]:
    """Read conversations: lists of turns, each with ``role`` and ``content``, as chat templates take them.

    Args:
        path: a `.jsonl` file; with `dataset`, the name of a split.
        column: field that holds the list.
        dataset: a `datasets` name.

    Raises:
        ModuleNotFoundError: the optional package `datasets` is missing.
        ValueError: no such file or field, or a row that is no list of turns.
    """
    rows: Iterable[tuple[str, Any]]
    if dataset is not None:
        table = load_split(dataset, str(path))
        _require(column, table.column_names, dataset, "messages")
        rows = ((f"{dataset!r}, row {i}", value) for i, value in enumerate(table[column]))
    else:
        path = table_file(path, (".jsonl",))
        rows = _fields(path, column, "messages")
    return [_turns(value, where) for where, value in rows]


def _from_table(path: Path, source: str, target: str, role: str) -> Iterator[Pair]:
    with path.open(encoding="utf-8", newline="") as file, long_fields():
        reader = csv.reader(file, dialect=dialect_of(path))
        names = next(reader, [])
        if path.suffix == ".tab":
            next(reader, []), next(reader, [])  # kinds and roles of the columns
        _require(source, names, str(path), role)
        first = names.index(source)
        second = names.index(target) if target in names else None
        for row in reader:
            if len(row) > first:
                yield Pair(row[first], row[second] if second is not None and second < len(row) else "")


def _from_lines(path: Path, source: str, target: str, role: str) -> Iterator[Pair]:
    for number, fields in json_lines(path):
        _require(source, fields, f"{path}, line {number}", role)
        yield Pair(_text(fields[source]), _text(fields.get(target)))


def _fields(path: Path, column: str, role: str) -> Iterator[tuple[str, Any]]:
    for number, fields in json_lines(path):
        where = f"{path}, line {number}"
        _require(column, fields, where, role)
        yield f"{where!r}", fields[column]


def _turns(value: Any, where: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"{where}: a conversation is a list of turns, and not empty. Got {value!r}.")
    for turn in value:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: each turn has a 'role' and a 'content', which are text. Got {turn!r}.")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _require(name: str, names: Any, source: str, role: str) -> None:
    if not isinstance(names, Mapping | Sequence) or isinstance(names, str) or name not in names:
        given = list(names) if isinstance(names, Mapping) else names
        raise ValueError(f"{source!r} has no column {name!r}; it has {names_in(given)}. Name it with {role}=...")


def _text(value: Any) -> str:
    return "" if value is None else str(value)

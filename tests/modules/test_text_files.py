"""Rows from every format, and what is said about files that are wrong."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.modules import TextData
from lightning_peft.modules.text_files import read_dataset, read_file


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.tab"])
def test_every_format_gives_the_same_rows(name: str, write: Any, rows: Any) -> None:
    assert [tuple(row) for row in read_file(write(name, rows))] == rows


def test_columns_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("topic,id,body\nx,1,one\ny,2,two\n")
    (tmp_path / "a.tab").write_text("kind\ttopic\tbody\nd\td\tstring\n\tclass\tmeta\na\tx\tone\n\na\ty\ttwo\n")
    assert read_file("a.csv", text="body", label="topic") == read_file("a.tab") == [("one", "x"), ("two", "y")]
    assert read_file("a.tab", label="kind") == [("one", "a"), ("two", "a")]


def test_long_field_is_read_and_the_limit_put_back(write: Any) -> None:
    before = csv.field_size_limit()
    long = "red " * 50_000
    assert len(long) > before
    assert read_file(write("long.tab", [(long, "a")]))[0].text == long
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "arguments", "sentence"),
    [
        ("a.txt", "x", {}, r"suffix '\.txt'; files end in \.csv, \.tsv, \.jsonl, \.tab"),
        ("", None, {"path": "none.csv"}, r"there is no file 'none\.csv' \(looked in '.+'\)"),
        ("a.csv", "body,label\n", {}, r"'a\.csv' has no column 'text'; it has 'body', 'label'\. Name it with text="),
        ("a.csv", "text,tag\n", {"label": "x"}, r"has no column 'x'; it has 'text', 'tag'\. Name it with label="),
        ("a.csv", "", {}, r"has no column 'text'; it has no columns"),
        ("a.jsonl", '{"text": "a"}\n{oops', {}, r"'a\.jsonl', line 2, is not JSON"),
        ("a.jsonl", '{"body": "a"}', {}, r"line 1, has no 'text'; it has 'body'\. Name the field with text="),
        ("a.jsonl", '{"text": "a"}', {"label": "y"}, r"line 1, has no 'y'; it has 'text'"),
    ],
)
def test_bad_files_say_what_and_where(name: str, content: str | None, arguments: Any, sentence: str) -> None:
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_file(**{"path": name, **arguments})


def test_missing_datasets_package_names_the_command(monkeypatch: pytest.MonkeyPatch, tiny_bert: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    data = TextData("train", tokenizer=tiny_bert, dataset="imdb")
    with pytest.raises(ModuleNotFoundError, match=r"dataset='imdb' .* not installed: run `pip install datasets`"):
        data.setup("fit")


def test_datasets_name(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the optional package 'datasets' is not installed")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.csv").write_text("text,label\none,1\ntwo,\nthree,0\n")
    assert [row.text for row in read_dataset(str(folder), "train")] == ["one", "two", "three"]
    assert [row.label == "" for row in read_dataset(str(folder), "train")] == [False, True, False]

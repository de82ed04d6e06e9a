"""The package's own source: nothing in it could run what a file says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lightning_peft

PACKAGE = Path(lightning_peft.__file__).parent
# What could run code or read pickled code, and where it may stand: file, name of the call -> why.
REASONED = {
    (
        "archive.py",
        "pickle.Unpickler",
    ): "resolves no name: everything that is named becomes a stand-in that does nothing",
    ("testing/lifecycle.py", "pickle.loads"): "a law pickles a module and loads that very pickle, in memory",
    ("testing/lifecycle.py", "pickle.dumps"): "the other half of it",
    (
        "testing/processes.py",
        "pickle.dumps",
    ): "the answer of a process that a test has forked, through a pipe of its own",
    ("testing/processes.py", "pickle.loads"): "the other end of that pipe",
    (
        "rebuild.py",
        "import_module",
    ): "the class that the user names with --model; a file's classes are looked up, not imported",
    (
        "interop/fresh_load.py",
        "trust_remote_code",
    ): "run by another process on the folder that this one has just written, to check that it loads",
    ("modules/text_files.py", "import_module"): "an optional dependency, by a constant name",
}
DANGEROUS = {"eval", "exec", "compile", "__import__", "import_module", "execfile", "run_path", "run_module"}


def uses(path: Path) -> set[str]:
    """Names in a file, dotted as they are written, that load pickles or run text."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if name == "torch.load" and not safe:
                found.add("torch.load without weights_only")
            if isinstance(node.func, ast.Name) and node.func.id in DANGEROUS:
                found.add(node.func.id)
            if name.endswith((".import_module", ".run_path", ".run_module")):
                found.add(name.rpartition(".")[2])
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(
            ("pickle.", "marshal.", "shelve.", "joblib.")
        ):
            found.add(ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "shelve", "joblib", "dill"):
            found.add(f"from {node.module}")
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
            found.add("trust_remote_code")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.add("allow_pickle")
    return found


def test_nothing_runs_what_a_file_says() -> None:
    sources = sorted(PACKAGE.rglob("*.py"))
    assert len(sources) > 50
    found = {(path.relative_to(PACKAGE).as_posix(), use) for path in sources for use in uses(path)}
    assert found == set(REASONED)


@pytest.mark.parametrize(("source", "use"), [
    ("import torch; torch.load(path)", "torch.load without weights_only"),
    ("import torch; torch.load(path, weights_only=False)", "torch.load without weights_only"),
    ("import pickle; pickle.load(file)", "pickle.load"),
    ("from pickle import load", "from pickle"),
    ("eval(text)", "eval"),
    ("exec(text)", "exec"),
    ("importlib.import_module(name)", "import_module"),
    ("model.from_pretrained(name, trust_remote_code=True)", "trust_remote_code"),
])  # fmt: skip
def test_the_scan_finds(tmp_path: Path, source: str, use: str) -> None:
    (tmp_path / "source.py").write_text(source)
    assert uses(tmp_path / "source.py") == {use}

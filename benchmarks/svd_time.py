"""What it costs to decompose every layer of an encoder, and how exact it is: ours beside `torch.linalg.svd`.

    python benchmarks/svd_time.py                        # BERT-base's 72 layers, one thread, a Markdown table
    python benchmarks/svd_time.py --layers 6 --ways ours gesdd64

The weights are random, as large as BERT's, the columns of very different importance, and a few of none: a
decomposition of W diag(d), and diag(d)^-1 taken out of it. An error is |U diag(s) Vh - W| / |W| of a column; the table
gives the largest of all columns and layers. `whiten` is ours by a full matrix of second moments. The clock is the CPU
time of the process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from lightning_peft.functional.weighted_svd import scale, weighted_svd, whitened_svd

RESULTS = Path(__file__).parent / "results" / "svd_time.jsonl"
SHAPES = [*[(768, 768)] * 4, (3072, 768), (768, 3072)] * 12
"""(d_out, d_in): query, key, value, output, and the two of the feed-forward part, 12 times."""

Factors = tuple[Tensor, Tensor, Tensor]


def gesdd(W: Tensor, d: Tensor, dtype: torch.dtype) -> Factors:
    """The textbook's way."""
    U, s, Vh = torch.linalg.svd(W.to(dtype) * d.to(dtype), full_matrices=False)
    return U.float(), s.float(), (Vh / d.to(dtype)).float()


def reduced(W: Tensor, d: Tensor) -> Factors:
    """The same in float64, after a QR that makes the matrix square."""
    A = W.double() * d.double()
    wide = A.shape[1] > A.shape[0]
    Q, R = torch.linalg.qr(A.mT if wide else A)
    U, s, Vh = torch.linalg.svd(R.mT if wide else R)
    U, Vh = (U, Vh @ Q.mT) if wide else (Q @ U, Vh)
    return U.float(), s.float(), (Vh / d.double()).float()


def moments(d_in: int) -> Tensor:
    """Those of strongly correlated inputs, of fewer positions than channels."""
    X = torch.randn(d_in // 2, d_in, generator=torch.Generator().manual_seed(1)).cumsum(1)
    return X.mT @ X


MOMENTS = {d_in: moments(d_in) for d_in in {d_in for _, d_in in SHAPES}}
WAYS: dict[str, Callable[[Tensor, Tensor], Factors]] = {
    "ours": weighted_svd,
    "gesdd64": lambda W, d: gesdd(W, d, torch.float64),
    "qr-gesdd64": reduced,
    "gesdd32": lambda W, d: gesdd(W, d, torch.float32),
    "whiten": lambda W, d: whitened_svd(W, MOMENTS[W.shape[1]]),
}


def measured(way: str, shapes: list[tuple[int, int]]) -> tuple[float, float]:
    """Seconds for all layers, and the largest error of a column."""
    generator = torch.Generator().manual_seed(0)
    seconds, worst = 0.0, 0.0
    for shape in shapes:
        W = 0.04 * torch.randn(shape, generator=generator)
        importance = 10 ** (-8 * torch.rand(shape[1], generator=generator))
        importance[:5] = 0
        d = scale(importance)
        start = time.process_time()
        U, s, Vh = WAYS[way](W, d)
        seconds += time.process_time() - start
        error = (U.double() * s.double()) @ Vh.double() - W
        worst = max(worst, float((error.norm(dim=0) / W.norm(dim=0)).max()))
    return seconds, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--layers", type=int, default=len(SHAPES), help="the first so many of BERT-base's 72")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| way | seconds for {arguments.layers} layers | largest error of a column |\n|---|---|---|")
    for way in arguments.ways:
        seconds, worst = measured(way, SHAPES[: arguments.layers])
        print(f"| {way} | {seconds:.1f} | {worst:.1e} |", flush=True)
        line = {"way": way, "layers": arguments.layers, "seconds": seconds, "error": worst, "torch": torch.__version__}
        line["when"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

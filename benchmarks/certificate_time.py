"""What passes over R8's training set take in a certificate, and what the encoder alone takes for as many texts.

    python benchmarks/certificate_time.py [--batches 13]

MiniLM-L6 as in `certificate.py`: RLoRA on all layers and the head in Q, a draw for every example, batches of 32 texts
up to 64 tokens. Batches from short to long, evenly over the training set, are run by the plain encoder, by the adapted
one without noise, and as a certificate does; float32 and bf16 autocast, in turn. Seconds of CPU time of one thread for
ten passes over all batches, from those that were run. One line each in `results/certificate_time.jsonl`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "reuters")]  # this checkout is what is measured

import runs  # noqa: E402
import torch  # noqa: E402
from inputs import minilm_folder, reuters  # noqa: E402

from lightning_peft import PACBayes, RLoRA, inject  # noqa: E402
from lightning_peft.certification.bound_set import BoundSet  # noqa: E402
from lightning_peft.certification.counting import generator  # noqa: E402
from lightning_peft.modules import TextClassifier, TextData  # noqa: E402

PASSES, ROUNDS = 10, 3


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=13, help="how many of the set's batches are run")
    count = parser.parse_args().batches
    runs.one_quiet_thread()
    train, test = reuters("r8")
    data = TextData(train, tokenizer=minilm_folder(), test=test, val_share=0.0, max_length=64, batch_size=32)
    data.setup("fit")
    rows = BoundSet(data.train_dataloader())
    every = len(rows.batches)
    chosen = [i * (every - 1) // (count - 1) for i in range(count)]
    batches = list(rows.read(chosen))
    plain, adapted = (TextClassifier(minilm_folder(), data.num_labels).eval() for _ in range(2))
    inject(adapted, partial(RLoRA, rank=32), [r"encoder\.layer\..*"], train=["classifier"])
    term = PACBayes("f_quad", examples=len(rows), unit="example", prior_sigma=0.01)
    term.attach(adapted.eval())
    assert term.posterior is not None

    def drawn(i: int, batch: Any) -> Any:
        device, size = torch.device("cpu"), len(batch["labels"])
        return term.posterior.sampled(adapted, generator(device, 0, i), unit="example", examples=size)  # type: ignore[union-attr]

    kinds: dict[str, tuple[Any, Callable[[int, Any], Any]]] = {
        "encoder alone": (plain, lambda i, batch: nullcontext()),
        "adapted, no noise": (adapted, lambda i, batch: nullcontext()),
        "certificate": (adapted, drawn),
    }
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS + 1):  # one to warm up
        for precision in ("32-true", "bf16-mixed"):
            for name, (module, around) in kinds.items():
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
                    begun = time.process_time()
                    for i, batch in enumerate(batches):
                        with around(i, batch):
                            module(batch)
                    seconds.setdefault((name, precision), []).append(time.process_time() - begun)
    for (name, precision), found in seconds.items():
        row = {
            "what": name,
            "precision": precision,
            "texts": len(rows),
            "passes": PASSES,
            "batches": count,
            "seconds": round(PASSES * every / count * median(found[1:]), 1),
            "least": round(PASSES * every / count * min(found[1:]), 1),
            "versions": runs.versions("torch", "transformers"),
        }
        print(f"{name:<20} {precision:<12} {row['seconds']:7.0f} s")
        runs.append(row, runs.RESULTS / "certificate_time.jsonl")


if __name__ == "__main__":
    main()

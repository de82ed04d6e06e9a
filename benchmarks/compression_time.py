"""How long a forward pass of each compressed model takes that `compression.py` has made, all of a ratio in one run.

    python benchmarks/compression_time.py [--rounds 9]

Models are built anew from the ranks in `results/compression.jsonl`, with random weights in the thin layers: time does
not depend on them. The dense model and all others take turns, 64 test texts of Reuters R8 at a time, one thread, CPU
time of the process; a round gives one ratio to the dense model's for each. What is kept is the median of the rounds,
a line per model in `results/compression_time.jsonl`; `python benchmarks/compression.py table` shows the last ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import compression
import runs
import torch
from inputs import minilm_folder, reuters
from torch import nn
from transformers import AutoModelForSequenceClassification

from lightning_peft.compression.task import Classification, Source
from lightning_peft.interop.plain_loader import put_in


def dense() -> Any:
    """The model that was compressed, but for its weights."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=8).eval()


def thin(ranks: Mapping[str, int]) -> nn.Module:
    """A model of these ranks: two layers where that is smaller than one."""
    model = dense()
    shapes = {name: model.get_submodule(name).weight.shape for name in ranks}
    put_in(model, {n: rank for n, rank in ranks.items() if rank * sum(shapes[n]) < shapes[n].numel()})
    return model.eval()


@torch.inference_mode()
def timed(models: list[nn.Module], batch: Mapping[str, Any], rounds: int) -> list[list[float]]:
    """CPU milliseconds of each model in each round; the first round does not count."""
    found: list[list[float]] = []
    for _ in range(rounds + 1):
        found.append([])
        for model in models:
            start = time.process_time()
            model(**batch)
            found[-1].append(1e3 * (time.process_time() - start))
    return found[1:]


def main() -> None:
    """Time the models of each ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    runs.one_quiet_thread()
    train, test = reuters("r8")
    task = Classification(minilm_folder())
    data = task.data(Source(train, test))
    data.setup("fit")
    texts: Any = data.val_dataloader().dataset
    on, batch = task.timed(texts, data)
    rows = [row for row in compression.load() if row["method"] in compression.ROWS and not row["search"]]
    for ratio in compression.RATIOS:
        found = [row for row in rows if row["ratio"] == ratio]
        shapes = {tuple(row["ranks"].items()): row["ranks"] for row in found}  # uniform ranks are those of all of them
        rounds = timed([dense(), *map(thin, shapes.values())], batch, options.rounds)
        for row in found:
            place = 1 + list(shapes).index(tuple(row["ranks"].items()))
            result = {
                **{field: row[field] for field in ("method", "ratio", "seed", "lr")},
                "ms": median(times[place] for times in rounds),
                "dense_ms": median(times[0] for times in rounds),
                "of_dense": median(times[place] / times[0] for times in rounds),
                "rounds": options.rounds,
                "timed_on": on,
                "versions": runs.versions("torch", "transformers"),
            }
            runs.append(result, compression.TIMES)
            print({key: result[key] for key in ("method", "ratio", "seed", "ms", "of_dense")}, flush=True)


if __name__ == "__main__":
    main()

"""How much faster a compressed encoder is than the dense one, and how much smaller its file.

    python benchmarks/compression_speed.py                      # MiniLM and BERT-base at ratio 0.33, one thread
    python benchmarks/compression_speed.py --models minilm --ratio 0.5 --rounds 3

Every layer keeps the same share of its weight, as `lightning-peft compress --method svd` leaves it: two thin linear
layers where there was one. Weights are random: time does not depend on them. A forward pass is timed by the CPU time of
the process. Dense and compressed take turns, and a round gives one ratio, so that what else the machine does falls on
both; the table has the median of the rounds, and the lowest and highest. `in linear layers` is the part of a pass that
is spent in the layers that are compressed: the rest (attention, norms, activations, embeddings) is what compression
leaves as it is. Files are those layers' tensors, as safetensors.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lightning_peft import Factorized, RankBudget, inject, to_plain
from lightning_peft.rank.probe import first_open
from lightning_peft.rank.weighted_svd import uniform_rank

RESULTS = Path(__file__).parent / "results" / "compression_speed.jsonl"
SHAPES: dict[str, dict[str, int]] = {
    "minilm": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12},
    "bert-base": {},
}


def encoder(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=1000, **SHAPES[name]), add_pooling_layer=False).eval()


def compressed(name: str, ratio: float) -> tuple[nn.Module, list[str]]:
    """The encoder with thin layers, and the names of the layers that were compressed."""
    model = encoder(name)
    inject(model, partial(Factorized, start="exact"), ["encoder.*"], [])
    budget = RankBudget.of(model)
    shapes = {name: (site.adapter.U.shape[0], site.adapter.Vh.shape[1]) for name, site in budget.items()}
    budget.keep({name: first_open(site, uniform_rank(*shapes[name], ratio)) for name, site in budget.items()})
    to_plain(model)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    return model.eval(), list(shapes)


@contextmanager
def clocked(model: nn.Module, layers: list[str]) -> Iterator[list[float]]:
    """CPU seconds that calls of these layers take, one number per call."""
    spent: list[float] = []
    starts: list[float] = []

    def begin(*_: Any) -> None:
        starts.append(time.process_time())

    def end(*_: Any) -> None:
        spent.append(time.process_time() - starts.pop())

    modules = [model.get_submodule(layer) for layer in layers]
    hooks = [hook for m in modules for hook in (m.register_forward_pre_hook(begin), m.register_forward_hook(end))]
    yield spent
    for hook in hooks:
        hook.remove()


def seconds(model: nn.Module, ids: Tensor) -> float:
    start = time.process_time()
    model(ids)
    return time.process_time() - start


def file_size(model: nn.Module, layers: list[str]) -> int:
    tensors = {
        f"{layer}.{name}": tensor.contiguous()
        for layer in layers
        for name, tensor in model.get_submodule(layer).state_dict().items()
    }
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "layers.safetensors")
        return (Path(folder) / "layers.safetensors").stat().st_size


@torch.inference_mode()
def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    dense = encoder(name)
    with torch.inference_mode(False):
        thin, layers = compressed(name, options.ratio)
    ids = torch.randint(0, 1000, (options.texts, options.length))
    rounds = [(seconds(dense, ids), seconds(thin, ids)) for _ in range(options.rounds + 1)][1:]
    inside = []
    for model in (dense, thin):
        with clocked(model, layers) as spent:
            model(ids)
        inside.append(sum(spent))
    speeds = [first / second for first, second in rounds]
    return {
        "model": name, "ratio": options.ratio, "texts": options.texts, "length": options.length,
        "speed": median(speeds), "lowest": min(speeds), "highest": max(speeds), "rounds": options.rounds,
        "dense": median(first for first, _ in rounds), "thin": median(second for _, second in rounds),
        "dense_linear": inside[0], "thin_linear": inside[1],
        "file": file_size(thin, layers) / file_size(dense, layers),
        "torch": torch.__version__, "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--ratio", type=float, default=0.33)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| encoder | dense ms | in linear layers | compressed ms | in linear layers | speed | file |")
    print("|---|---|---|---|---|---|---|")
    for name in options.models:
        row = measured(name, options)
        dense, inside, thin, thin_inside = (
            f"{1e3 * row[key]:.0f}" for key in ("dense", "dense_linear", "thin", "thin_linear")
        )
        speed = f"{row['speed']:.2f}× ({row['lowest']:.2f} to {row['highest']:.2f})"
        print(f"| {name} | {dense} | {inside} | {thin} | {thin_inside} | {speed} | {row['file']:.2f} |", flush=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

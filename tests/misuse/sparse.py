"""Mistakes with sparse adapters."""

from __future__ import annotations

from functools import partial

import torch
from misuse.setups import LORA, Encoder, Rows, adapted, fit
from safetensors.torch import save_file
from torch import nn

from lightning_peft import (
    AdapterFileError,
    AdapterInjection,
    Calibration,
    DropAndRegrow,
    EntrySelection,
    RankPruning,
    SparseAdapter,
    SparseBudget,
    SparseSwitch,
    SpaRTA,
    inject,
    presets,
    read_sparse,
)
from lightning_peft.functional.sparse_arithmetic import SparseDelta

TARGETS = ["query", "value"]


def trained() -> None:
    module = Encoder()
    inject(module, partial(SpaRTA, density=0.2), TARGETS)
    nn.init.ones_(module.query.delta)  # type: ignore[arg-type]
    fit(module, Calibration(EntrySelection("magnitude"), 1))


def one(head: bool = False) -> SparseAdapter:
    changed = SparseDelta(torch.tensor([1]), torch.ones(1), (2, 2))
    return SparseAdapter({"weight": changed}, {"bias": torch.ones(2)} if head else {})


def written() -> str:
    one().save("talk.safetensors")
    return "talk.safetensors"


def authors(deltas: int = 1) -> str:
    entries = {"indices.weight": torch.tensor([[0, 1]], dtype=torch.int32), "deltas.weight": torch.ones(deltas)}
    save_file(entries, "theirs.safetensors")
    return "theirs.safetensors"


def diverged() -> str:
    entries = {"indices.weight": torch.tensor([[0, 1]], dtype=torch.int32), "deltas.weight": torch.tensor([torch.nan])}
    save_file(entries, "diverged.safetensors")
    return "diverged.safetensors"


def something_else() -> str:
    save_file({"weight": torch.ones(1)}, "plain.safetensors")
    return "plain.safetensors"


ROWS: Rows = {
    "SpaRTA in a model whose attention has no known names": (
        lambda: fit(Encoder(), *presets.sparta(0.1)),
        ValueError,
    ),
    "SpaRTA by a density and by a sparsity": (lambda: presets.sparta(density=0.1, sparsity=0.9), ValueError),
    "a sparsity that the targets cannot reach": (
        lambda: fit(Encoder(), *presets.sparta(sparsity=0.1, targets=["query"])),
        ValueError,
    ),
    "fewer scalars to train than layers": (
        lambda: fit(Encoder(), *presets.sparta(parameters=1, targets=TARGETS)),
        ValueError,
    ),
    "a budget of entries around one layer": (lambda: SparseBudget(0.1)(nn.Linear(2, 2)), TypeError),
    "a start of SpaRTA that is misspelt": (lambda: presets.sparta(0.1, start="weights"), ValueError),  # type: ignore[arg-type]
    "more entries to move than there are": (lambda: presets.sparta(0.1, regrow=1.5), ValueError),
    "batches for entries that are drawn": (lambda: presets.sparta(batches=5), ValueError),
    "events for entries that stay": (lambda: presets.sparta(interval=5, tail=0.2), ValueError),
    "a sparsity above 1": (lambda: presets.sparta(sparsity=2), ValueError),
    "a density that is no number": (lambda: presets.sparta(density=float("nan")), ValueError),
    "no parameters for SpaRTA": (lambda: presets.sparta(parameters=0), ValueError),
    "a kernel of SpaRTA that is misspelt": (lambda: presets.sparta(kernel="dens"), ValueError),  # type: ignore[arg-type]
    "a number of one weight's entries in a budget": (lambda: SparseBudget(0.1, k=5), TypeError),
    "entries in blocks that are to move": (
        lambda: fit(
            Encoder(),
            AdapterInjection(partial(SpaRTA, density=0.2, block=2), TARGETS),
            RankPruning(DropAndRegrow()),
        ),
        ValueError,
    ),
    "LoRA's components dropped and regrown": (
        lambda: fit(Encoder(), AdapterInjection(LORA, TARGETS), RankPruning(DropAndRegrow())),
        TypeError,
    ),
    "entries that move, compacted on the way": (lambda: RankPruning(DropAndRegrow(), compact=2), ValueError),
    "entries chosen for LoRA": (
        lambda: fit(Encoder(), AdapterInjection(LORA, TARGETS), Calibration(EntrySelection("magnitude"), 1)),
        TypeError,
    ),
    "entries chosen after training": (trained, RuntimeError),
    "LoRA as pairs of index and delta": (lambda: SparseAdapter.of(adapted("query")), TypeError),
    "a switch of sparse adapters in a model that has adapters": (lambda: SparseSwitch(adapted("query")), ValueError),
    "heads of two tasks added": (lambda: one(head=True) + one(head=True), ValueError),
    "a sparse adapter of another model": (lambda: read_sparse(written(), nn.Linear(3, 2)), AdapterFileError),
    "a file of SpaRTA's authors without its model": (lambda: read_sparse(authors()), ValueError),
    "a file of SpaRTA's authors with a delta too many": (
        lambda: read_sparse(authors(deltas=2), nn.Linear(2, 2)),
        AdapterFileError,
    ),
    "a sparse adapter times what is no number": (lambda: one() * float("nan"), ValueError),
    "a sparse adapter of a run that diverged": (lambda: read_sparse(diverged(), nn.Linear(2, 2)), AdapterFileError),
    "another file read as a sparse adapter": (lambda: read_sparse(something_else()), AdapterFileError),
}

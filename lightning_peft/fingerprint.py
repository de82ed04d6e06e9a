"""Whether a model is the one that adapters were trained on, told by a few values of each of its parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_peft.archive import AdapterFileError
from lightning_peft.distributed import picked
from lightning_peft.rank.budget import clean_name
from lightning_peft.surgery.layers import trained
from lightning_peft.surgery.refresh import bases_restored

SAMPLES = 8
"""Values that a fingerprint has of a parameter."""


def fingerprint(module: nn.Module) -> dict[str, Tensor]:
    """A few values of every parameter of the frozen base, by name: enough to tell one base model from another."""
    changed = {id(p) for p in trained(module).values()}
    base = {clean_name(n): p for n, p in module.named_parameters() if id(p) not in changed and p.numel()}
    picks = {n: torch.linspace(0, p.numel() - 1, SAMPLES, dtype=torch.float64).long() for n, p in base.items()}
    with bases_restored(module):
        return picked(base, picks)


def check_base(here: Mapping[str, Tensor], saved: Mapping[str, Tensor], source: str) -> None:
    """Compare two fingerprints: equal, after rounding to the narrower of the two types.

    Raises:
        AdapterFileError: they are of different base models.
    """
    for name in sorted({*here, *saved}):
        if name not in here or name not in saved:
            fault = f"{name!r} is not in {'the file' if name in here else 'this model, or is trained here'}"
        elif not _same(here[name], saved[name]):
            fault = f"{name!r} differs"
        else:
            continue
        raise AdapterFileError(
            f"{source} was made for another base model: {fault}. Build the model with the weights that the adapters "
            "were trained on."
        )


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.is_complex() != b.is_complex() or a.is_floating_point() != b.is_floating_point():
        return False
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    wide = torch.promote_types(torch.float64, a.dtype)  # not every narrow type can be compared
    one, other = (side.to(narrow).to(wide).nan_to_num() for side in (a, b))
    return torch.equal(one, other)

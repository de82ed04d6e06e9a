"""Find layers, put adapters in their place, freeze the rest; and undo all of it."""

from lightning_peft.surgery.injection import Injection, inject
from lightning_peft.surgery.layers import adaptable, adapters, small_parameters, trained
from lightning_peft.surgery.refresh import follow, refresh
from lightning_peft.surgery.removal import eject

__all__ = [
    "Injection",
    "adaptable",
    "adapters",
    "eject",
    "follow",
    "inject",
    "refresh",
    "small_parameters",
    "trained",
]

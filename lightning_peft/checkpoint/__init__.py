"""What an adapter-only checkpoint holds beside Lightning's own entries, how it is checked, and how it is loaded."""

from lightning_peft.archive import AdapterFileError, unreadable
from lightning_peft.checkpoint.checks import check, check_entry
from lightning_peft.checkpoint.entry import (
    ENTRY,
    TERMS,
    VERSION,
    Described,
    adapter_state_dict,
    dense,
    describe,
    digest,
    digests,
    recipe,
)
from lightning_peft.checkpoint.loading import load, read
from lightning_peft.validation import CUT

__all__ = [
    "CUT",
    "ENTRY",
    "TERMS",
    "VERSION",
    "AdapterFileError",
    "Described",
    "adapter_state_dict",
    "check",
    "check_entry",
    "dense",
    "describe",
    "digest",
    "digests",
    "load",
    "read",
    "recipe",
    "unreadable",
]

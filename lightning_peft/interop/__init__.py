"""Adapters in other tools' formats."""

from lightning_peft.interop.folder import Export
from lightning_peft.interop.from_peft import from_hf_peft
from lightning_peft.interop.hf_peft import to_hf_peft
from lightning_peft.interop.merged import save_merged

__all__ = ["Export", "from_hf_peft", "save_merged", "to_hf_peft"]

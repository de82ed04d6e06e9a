"""Adapters in other tools' formats."""

from lightning_peft.interop.adoption import adopt, release
from lightning_peft.interop.folder import Export
from lightning_peft.interop.from_peft import from_hf_peft
from lightning_peft.interop.hf_peft import to_hf_peft
from lightning_peft.interop.merged import save_merged

__all__ = ["Export", "adopt", "from_hf_peft", "release", "save_merged", "to_hf_peft"]

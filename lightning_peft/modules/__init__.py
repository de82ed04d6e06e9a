"""Ready LightningModules and data modules for the main jobs. None of them knows about adapters."""

from __future__ import annotations

from lightning_peft.modules.language_data import LanguageData
from lightning_peft.modules.language_model import LanguageModel
from lightning_peft.modules.text_classifier import TextClassifier
from lightning_peft.modules.text_data import TextData

__all__ = ["LanguageData", "LanguageModel", "TextClassifier", "TextData"]

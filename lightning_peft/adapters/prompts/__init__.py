"""Prompts: trained vectors in front of the text that a frozen transformers model reads."""

from lightning_peft.adapters.prompts.base import Prompt
from lightning_peft.adapters.prompts.soft_prompt import SoftPrompt

__all__ = ["Prompt", "SoftPrompt"]

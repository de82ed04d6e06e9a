"""What a fine-tuning job will take, before it runs."""

from lightning_peft.planning.estimate import plan
from lightning_peft.planning.figures import Load, Plan

__all__ = ["Load", "Plan", "plan"]

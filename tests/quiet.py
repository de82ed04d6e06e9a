"""Trainer options of tests: one processor, and nothing written or printed that no test reads."""

from __future__ import annotations

from typing import Any

SAVING: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
"""With Lightning's own checkpoints."""
QUIET = {**SAVING, "enable_checkpointing": False}

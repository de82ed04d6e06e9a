"""InitialPrompt: a prompt starts from another task's."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_peft.interop.prompt_files import init_prompt_from, only_prompt


class InitialPrompt(Callback):
    """Have the module's prompt start from one that was trained on another task; once, and not where a run is resumed.

    Put it behind AdapterInjection. Every process reads the file.

    Args:
        path: a file of :func:`lightning_peft.save_prompt`, or a checkpoint that AdapterCheckpoint has filtered.

    Raises:
        FileNotFoundError: when a fit starts: there is no such file.
        AdapterFileError: then: its prompt is of another class, size or place.
        ValueError: then: the module has not one prompt.

    Reference:
        Shi and Lipani 2024 and earlier work on transfer of prompts (remembered): a second task starts from the first's.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _, prompt = only_prompt(pl_module, "InitialPrompt")
        # A second fit goes on with what the first has trained.
        if trainer.ckpt_path is None and prompt.__dict__.setdefault("_started_from", None) != self.path:
            init_prompt_from(pl_module, self.path)
            prompt.__dict__["_started_from"] = self.path

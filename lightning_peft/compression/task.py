"""What a model is for: which module and data run it, and what its quality is."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft.arguments import require_integer
from lightning_peft.interop.plain import LOADER, is_compressed
from lightning_peft.modules import CausalLM, LanguageData, TextClassifier, TextData
from lightning_peft.modules.planned_data import PlannedData


@dataclass(frozen=True)
class Source:
    """Texts, and how they are cut into batches.

    Attributes:
        train: file for calibration and training.
        test: file on which quality is measured; ``None`` for a tenth of `train`, which is held out.
        text: column of the text.
        label: column of the label.
        length: tokens per text at most, or per block; ``None`` for the task's own.
        batch_size: texts or blocks per batch; ``None`` for the task's own.
        seed: decides the order of batches, and what is held out.

    Raises:
        TypeError, ValueError: a number is none, or below 1.
    """

    train: str
    test: str | None = None
    text: str | None = None
    label: str | None = None
    length: int | None = None
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train", "test"):
            if isinstance(path := getattr(self, name), PathLike):
                object.__setattr__(self, name, fspath(path))
        for name in ("length", "batch_size"):
            if (number := getattr(self, name)) is not None:
                require_integer(name, number)
                if number < 1:
                    raise ValueError(f"{name}={number}: it is at least 1. Leave it out for the task's own.")


class Task(ABC):
    """One use of a model in a folder."""

    name: ClassVar[str]
    auto_class: ClassVar[str]

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @abstractmethod
    def data(self, source: Source) -> PlannedData:
        """The data module, which knows the model's tokenizer."""

    @abstractmethod
    def module(self, data: PlannedData) -> LightningModule:
        """The model in a LightningModule whose learning rates are set before it is trained."""

    @abstractmethod
    def timed(self, rows: Any, data: PlannedData) -> tuple[str, dict[str, Tensor]]:
        """What a forward pass is timed on: in words, and as a batch."""

    def architecture(self) -> str | None:
        """transformers' class for this task and this kind of model; ``None`` if there is none."""
        import transformers

        kind = str(read_config(self.folder).get("model_type"))
        mapping: Any = getattr(transformers, self.auto_class)._model_mapping
        if kind not in transformers.CONFIG_MAPPING:
            return None
        config = transformers.CONFIG_MAPPING[kind]
        return str(mapping[config].__name__) if config in mapping else None

    @staticmethod
    @abstractmethod
    def set_rates(module: Any, lr: float, head_lr: float) -> None:
        """Set the peak learning rates."""

    def wanted(self, data: PlannedData) -> str:
        """What the texts ask of a head, as a part of a sentence."""
        return ""

    @staticmethod
    def missing(module: Any) -> tuple[str, ...]:
        """Parameters that the folder did not have."""
        found: tuple[str, ...] = module.newly_initialized
        return found


class Classification(Task):
    """Texts have one label each; quality is accuracy and macro-F1."""

    name = "classification"
    auto_class = "AutoModelForSequenceClassification"

    def data(self, source: Source) -> TextData:
        return TextData(
            source.train,
            tokenizer=self.folder,
            val=source.test,
            text=source.text,
            label=source.label,
            max_length=64 if source.length is None else source.length,
            batch_size=32 if source.batch_size is None else source.batch_size,
            val_share=0.0 if source.test else 0.1,
            seed=source.seed,
            label_names=self._label_names(),
        )

    def _label_names(self) -> list[str] | None:
        """The labels in the order of the model's outputs, where it names them."""
        names = read_config(self.folder).get("id2label") or {}
        ordered = [str(names[key]) for key in sorted(names, key=int)]
        # What transformers itself calls labels that nobody has named.
        return None if all(name == f"LABEL_{i}" for i, name in enumerate(ordered)) else ordered

    def module(self, data: PlannedData) -> TextClassifier:
        assert isinstance(data, TextData)
        return TextClassifier(self.folder, data.num_labels)

    def wanted(self, data: PlannedData) -> str:
        assert isinstance(data, TextData)
        return f" for the {data.num_labels} labels of the texts"

    def timed(self, rows: Any, data: PlannedData) -> tuple[str, dict[str, Tensor]]:
        count = min(64, len(rows))
        chosen = torch.linspace(0, len(rows) - 1, count).round().long().tolist()
        batch: Any = data.collate()([rows[index] for index in chosen])
        batch.pop("labels", None)
        return f"{count} texts of up to {batch['input_ids'].shape[1]} tokens", dict(batch)

    @staticmethod
    def set_rates(module: Any, lr: float, head_lr: float) -> None:
        module.lr, module.head_lr = lr, head_lr


class Language(Task):
    """The next token is predicted; quality is perplexity."""

    name = "lm"
    auto_class = "AutoModelForCausalLM"

    def data(self, source: Source) -> LanguageData:
        if source.label is not None:
            raise ValueError(f"label={source.label!r}: a language model's texts have none. Leave it out.")
        return LanguageData(
            source.train,
            tokenizer=self.folder,
            val=source.test,
            text=source.text,
            block_size=256 if source.length is None else source.length,
            batch_size=4 if source.batch_size is None else source.batch_size,
            val_share=0.0 if source.test else 0.1,
            seed=source.seed,
        )

    def module(self, data: PlannedData) -> CausalLM:
        return CausalLM(self.folder)

    def timed(self, rows: Any, data: PlannedData) -> tuple[str, dict[str, Tensor]]:
        ids = data.collate()([rows[0]])["input_ids"]
        return f"block of {ids.shape[1]} tokens", {"input_ids": ids}

    @staticmethod
    def set_rates(module: Any, lr: float, head_lr: float) -> None:
        module.lr = lr


TASKS: Mapping[str, Callable[[str], Task]] = {task.name: task for task in (Classification, Language)}
_ENDINGS: Mapping[str, Callable[[str], Task]] = {
    "ForSequenceClassification": Classification,
    "ForCausalLM": Language,
    "LMHeadModel": Language,
}


def task_of(folder: str, name: str | None) -> Task:
    """The task of a model in a folder: the one that is named, or the one that its config says it was trained for.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: the model is compressed already; or there is no task of this name, or none is named and the config
            does not tell.
    """
    if (Path(folder) / LOADER).is_file():
        raise ValueError(
            f"{folder!r} holds a compressed module already, and {LOADER} to load it. Compress the dense module that it "
            "was made of."
        )
    config = read_config(folder)
    if is_compressed(config):
        raise ValueError(
            f"{folder!r} is a compressed model already. Compress the dense model that it was made of, with the smaller "
            "ratio."
        )
    if name is not None:
        if name not in TASKS:
            raise ValueError(f"task={name!r}: choose {' or '.join(TASKS)}.")
        return TASKS[name](folder)
    architecture = str((config.get("architectures") or ["none"])[0])
    for ending, task in _ENDINGS.items():
        if architecture.endswith(ending):
            return task(folder)
    raise ValueError(
        f"{folder!r} names the architecture {architecture!r}, which has no loss that a compression could go by. Say "
        f"what it is for: task={' or task='.join(map(repr, TASKS))}."
    )


def read_config(folder: str) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no config.json at {folder!r}; give the folder of a transformers model, as save_pretrained "
            "writes it."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON file: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no JSON object.")
    return config


def hub_model(module: Any) -> nn.Module:
    """The transformers model in a task's module."""
    model: nn.Module = module.model
    return model

"""InformationMonitor: how much of the base's features the adapted layers still tell, over training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import log
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.arguments import require_integer, require_number
from lightning_peft.callbacks.board import boards, draw_information
from lightning_peft.callbacks.preflight import Preflight
from lightning_peft.functional.kept_information import kept_information
from lightning_peft.patterns import matches, require_patterns
from lightning_peft.regularizers.probes import Pool, longer, masks_of, pooled, require_pool
from lightning_peft.surgery.layers import adapters

_PICTURES = 100


class InformationMonitor(Preflight):
    """Show what each adapted layer still tells of what its base would have given, over training.

        mi/kept/<layer> = I_hat( base(x); adapted(x) ),    InfoNCE with cosine / temperature, x the layer's input

    In nats, a lower bound, with the ceiling ln n: `mi/kept/ceiling` is logged beside it, and `mi/kept/examples`, which
    is n. An adapter that does nothing leaves a layer at the value that its base's features have with themselves; what
    falls below has been overwritten. In TensorBoard `mi/heatmap` has a row per layer and a column per measurement.

    At every validation, of its first examples, or every so many steps, of the step's own. Each process looks at its own
    examples, and process 0 writes. Nothing is trained and no random number is drawn: the run is the same without it.
    What it costs is one more call of each layer's base for these batches, and two features per example and layer.

    Layers whose base's weight is gone, and those whose weight is read and which are never called, are left out.

    Args:
        layers: patterns of the adapted layers to watch; ``None`` for all.
        every: steps between two measurements; ``None`` for every validation, the one before training included.
        examples: how many examples at most.
        temperature: of cosines.
        pool: how positions become one row: "mean", "first" or "last", of those that `attention_mask` shows.

    Raises:
        TypeError: an argument is of another type.
        ValueError: one is out of range.
        MisconfigurationException: when training starts: there is no layer to watch, or no validation.

    Example:
        >>> InformationMonitor(layers=["query"], every=100).examples
        256
    """

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        every: int | None = None,
        examples: int = 256,
        temperature: float = 0.1,
        pool: Pool = "mean",
    ) -> None:
        if layers is not None:
            require_patterns("layers", layers)
        for name, value, least in (("every", every, 1), ("examples", examples, 2)):
            if value is not None:
                require_integer(name, value)
                if value < least:
                    raise ValueError(f"{name} must be at least {least}. Got {value}.")
        require_number("temperature", temperature)
        if not temperature > 0:
            raise ValueError(f"temperature divides cosines and must be positive. Got {temperature}.")
        require_pool(pool)
        self.layers, self.every, self.examples = None if layers is None else tuple(layers), every, examples
        self.temperature, self.pool = float(temperature), pool
        self.history: dict[int, dict[str, float]] = {}
        """Nats by step and layer."""
        self._restored: dict[int, dict[str, float]] = {}
        self._masks: list[Tensor] = []
        self._rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._hooks: list[Any] = []
        self._due = 0  # the step that is listened to
        self._drawn = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if not self._watched(pl_module):
            there = list(adapters(pl_module))
            raise MisconfigurationException(
                f"InformationMonitor(layers={self.layers!r}) has no adapted layer to watch that keeps its base's weight"
                f"; there are {', '.join(map(repr, there[:5])) or 'no adapters'}{', ...' if len(there) > 5 else ''}."
            )
        if self.every is None and not trainer.enable_validation:
            raise MisconfigurationException(
                "InformationMonitor measures at validation, and this fit has none. Give the Trainer validation data, "
                "or say how often to measure in training: InformationMonitor(every=100)."
            )
        self.history, self._restored, self._drawn = dict(self._restored), {}, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._restored:  # strategies that shard restore after on_fit_start
            self.history, self._restored = self._restored, {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.every is not None and (trainer.global_step + 1) % self.every == 0:
            self._due = trainer.global_step + 1
            self._listen(pl_module)
            self._see(pl_module, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._hooks and self.every is not None and trainer.global_step >= self._due:  # after its last micro-batch
            self._measure(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if self.every is None and trainer.state.fn == "fit":
            self._listen(pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._see(pl_module, batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._hooks and self.every is None:
            self._measure(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._forget()

    def _watched(self, module: nn.Module) -> dict[str, Adapter]:
        return {
            name: adapter
            for name, adapter in adapters(module).items()
            if not (adapter.releases_base or adapter.hosted) and (self.layers is None or matches(self.layers, name))
        }

    def _see(self, module: nn.Module, batch: Any) -> None:
        self._masks = masks_of(batch, longer(module))

    def _listen(self, module: nn.Module) -> None:
        if self._hooks:
            return  # the micro-batches of one step
        self._rows = {}
        for name, adapter in self._watched(module).items():
            hear: Callable[..., None] = torch.compiler.disable(partial(self._hear, name))
            self._hooks.append(adapter.register_forward_hook(hear, with_kwargs=True))

    @torch.no_grad()
    def _hear(self, name: str, adapter: Adapter, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        rows = self._rows.setdefault(name, [])
        left = self.examples - sum(len(one) for one, _ in rows)
        if left <= 0 or not isinstance(output, Tensor):
            return
        if torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing computes again what was heard
        before = pooled(adapter.base(*args, **kwargs), adapter, name, self._masks, self.pool)
        after = pooled(output, adapter, name, self._masks, self.pool)
        rows.append((before[:left].detach().clone(), after[:left].detach().clone()))

    def _measure(self, trainer: Trainer) -> None:
        rows = {
            name: [torch.cat(part) for part in zip(*each, strict=True)] for name, each in self._rows.items() if each
        }
        self._quiet()
        groups: dict[torch.Size, list[str]] = {}
        for name, (before, _) in rows.items():
            if len(before) > 1:
                groups.setdefault(before.shape, []).append(name)
        if not groups:
            return
        values: dict[str, float] = {}
        for names in groups.values():
            before, after = (torch.stack([rows[name][side] for name in names]) for side in (0, 1))
            values |= dict(zip(names, kept_information(before, after, self.temperature).tolist(), strict=True))
        n = max(shape[0] for shape in groups)
        step = trainer.global_step
        self.history[step] = {name: values[name] for name in rows if name in values}
        if not trainer.is_global_zero:
            return
        metrics = {f"mi/kept/{name}": value for name, value in self.history[step].items()}
        metrics |= {"mi/kept/ceiling": log(n), "mi/kept/examples": float(n)}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)
        # Often enough to be seen grow, and no picture of every step.
        due = len(self.history) <= _PICTURES or len(self.history) >= 1.05 * self._drawn
        if due and (loggers := boards(trainer)):
            self._drawn = len(self.history)
            draw_information(loggers, self.history, log(n), step)

    def _quiet(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._rows, self._masks = {}, []

    def _forget(self) -> None:
        self._quiet()
        self._restored = {}  # validation of a checkpoint loads it as well; a later fit is not its continuation

    def state_dict(self) -> dict[str, Any]:
        history = self.history or self._restored
        return {"history": {str(step): dict(values) for step, values in history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = {int(step): dict(values) for step, values in state_dict.get("history", {}).items()}

"""RankMonitor: where the rank goes, in every logger, the progress bar and a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.callbacks.board import Hyperparameters, Pictures, boards, lay_out
from lightning_peft.callbacks.order import callbacks_of, require_before
from lightning_peft.callbacks.placement import AdapterPlacement
from lightning_peft.callbacks.preflight import Preflight
from lightning_peft.callbacks.pruning import RankPruning
from lightning_peft.rank.budget import RankBudget, whole
from lightning_peft.surgery.layers import adapters

_PICTURES = 500  # at most about so many per fit: as many histograms as TensorBoard keeps


class RankMonitor(Preflight):
    """Show the ranks before the first batch, at every pruning event, and at the end.

    Every logger gets the scalars, at the number of optimizer steps taken: `rank/<layer>`, `rank/open` (components), and
    `rank/spent` beside `rank/budget`, both in the unit of the final budget. TensorBoard also gets `rank/heatmap`,
    histograms `importance/<kind of layer>`, CUSTOM SCALARS charts (budget and spent; rank per layer; losses), and a
    row in HPARAMS with the adapter, its arguments, the budget, and the latest metrics. The progress bar shows what is
    spent now over the final budget. When fit ends, a table of ranks is printed.

    Between events it reads nothing: every `log_every_n_steps` the scalars of the last event are written again, so that
    a smoothed curve arrives at its value. Where gates close components by themselves (`DPT(form="relu")`) it is the
    ranks of now. An event costs one transfer from the device, and one more for
    histograms. Before the first event a component counts as open unless its mask is closed, even if its gain has not
    left zero yet.

    Where components are cut out as training goes on (`RankPruning(..., compact="final")`), all of this goes on as if
    they were closed: a layer keeps its name, its cell and its capacity, also when its adapter has gone.

    Raises:
        MisconfigurationException: no adapter is there, or the callbacks are in the wrong order.
    """

    def __init__(self) -> None:
        self._found = RankBudget({})
        self._settings: dict[str, Any] = {}  # of the adapters at the start, for HPARAMS
        self._pruning: RankPruning | None = None
        self._pictures: Pictures | None = None
        self._hyperparameters: Hyperparameters | None = None
        self._event = 0  # the last event that was shown
        self._metrics: dict[str, float] = {}  # as of the last event
        self._closing = False  # whether gates close components by themselves
        self._written = -1  # step of the last scalars
        self._drawn: tuple[int, dict[str, int]] = (0, {})  # step and ranks of the last heat map
        self._ranks: dict[str, int] = {}  # as of the last event: saved, so that a resumed run goes on from there
        self._restored: dict[str, int] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        require_before(trainer, self, AdapterPlacement, RankPruning)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._found = RankBudget.of(pl_module)
        if not self._found:
            raise MisconfigurationException(
                "RankMonitor found no adapter to watch. Put AdapterInjection before it in the Trainer's callbacks, or "
                "call inject() on the module first."
            )
        self._written = -1
        self._pruning = next((c for c in callbacks_of(trainer) if isinstance(c, RankPruning)), None)
        self._settings = _settings(pl_module)
        if self._pruning is not None:
            self._found = RankBudget({})  # the policy has them, also when they were cut; nothing else keeps old ones
        if trainer.is_global_zero:
            self._hyperparameters = Hyperparameters(boards(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Weights and loops are restored by now, under every strategy.
        self._closing = False
        if not trainer.is_global_zero:
            self._pruning = None  # no event for this rank
            return
        if self._pruning is None:
            self._found = RankBudget.of(pl_module)  # what calibration has cut since on_fit_start
        self._event = 0 if self._pruning is None else self._pruning.event_step
        self._closing = any(adapter.gate.closes_itself for adapter in adapters(pl_module).values() if adapter.gate)
        self._drawn = (0, {})
        loggers = boards(trainer)
        if loggers:
            self._pictures = Pictures(self._budget)
            lay_out(loggers)
        ranks, self._restored = self._restored, {}
        if set(ranks) != set(self._budget.extents):
            ranks = self._unmasked()
        self._show(trainer, ranks)
        self._draw(trainer, ranks)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        pruning = self._pruning
        if pruning is None or pruning.event_step == self._event:
            every, step = trainer.log_every_n_steps, trainer.global_step  # type: ignore[attr-defined]  # set by a connector
            if every and step % every == 0 and step != self._written:
                self._between(trainer)
            return
        step = self._event = pruning.event_step
        ranks = self._budget.ranks()
        self._show(trainer, ranks)
        if self._pictures and (pruning.settled or step - self._drawn[0] >= pruning.total_steps / _PICTURES):
            self._draw(trainer, ranks)
            self._pictures.weigh(boards(trainer), pruning.event_scores, step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        # The names of the metrics are known now. Not later: whoever watches a run, or kills it, sees the row as well.
        if self._hyperparameters and not trainer.sanity_checking:
            self._write_hyperparameters(trainer.logged_metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            ranks = self._budget.ranks()  # softly closed components may have returned since the last event
            if ranks != self._ranks or trainer.global_step != self._written:
                self._show(trainer, ranks)
            if ranks != self._drawn[1]:
                self._draw(trainer, ranks)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._write_hyperparameters(trainer.logged_metrics)
            rank_zero_info(f"Ranks after {trainer.global_step} steps\n{self._budget.table()}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._written >= 0:
            self._write_hyperparameters({})  # to ask for metrics may wait for other ranks, which may be gone
        self._forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored = {}  # validation of a checkpoint loads it as well; a later fit is not its continuation
        self._forget()

    @property
    def _budget(self) -> RankBudget:
        """The adapters as they are now."""
        return self._found if self._pruning is None else self._pruning.policy.budget

    def _unmasked(self) -> dict[str, int]:
        """Components per layer whose mask is open, in one transfer."""
        counts = torch.stack([site.gate.mask.detach().sum() for site in self._budget.values()]).tolist()
        return dict.fromkeys(self._budget.extents, 0) | dict(zip(self._budget, map(int, counts), strict=True))

    def _amounts(self, ranks: dict[str, int]) -> tuple[int, int, int]:
        """Spent, the budget of the last event, and the final budget; in the final budget's unit."""
        if self._pruning is None:
            spent, capacity = sum(ranks.values()), self._budget.capacity
            return spent, capacity, capacity
        policy, total = self._pruning.policy, self._pruning.total_steps
        return int(policy.spent(ranks)), self._pruning.budget_at_event(), policy.budget_at(total, total)

    def _show(self, trainer: Trainer, ranks: dict[str, int]) -> None:
        """Take on new ranks: scalars for every logger, and the progress bar."""
        spent, budget, final = self._amounts(ranks)
        self._ranks, self._written = dict(ranks), -1
        self._metrics = {f"rank/{name}": rank for name, rank in ranks.items()}
        self._metrics |= {"rank/open": sum(ranks.values()), "rank/spent": spent, "rank/budget": budget}
        self._write(trainer)
        # Put once per event into what the bars read, and both show a string as it is: `log(..., prog_bar=True)` would
        # take a number and cost every step.
        trainer.progress_bar_metrics["rank"] = f"{_short(spent)}/{_short(final)}"  # type: ignore[assignment]

    def _between(self, trainer: Trainer) -> None:
        """Write the scalars of the last event again; of gates that close themselves, those of now."""
        if self._closing and (ranks := self._budget.ranks()) != self._ranks:
            self._show(trainer, ranks)
            self._draw(trainer, ranks)
        elif self._pruning is not None or self._closing:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        """Write the scalars at this step, if they are not there yet."""
        if self._written != trainer.global_step:
            self._written = trainer.global_step
            for logger in trainer.loggers:
                logger.log_metrics(self._metrics, self._written)

    def _draw(self, trainer: Trainer, ranks: dict[str, int]) -> None:
        if self._pictures:
            self._pictures.draw(boards(trainer), ranks, trainer.global_step)
            self._drawn = (trainer.global_step, dict(ranks))

    def _write_hyperparameters(self, logged: Mapping[str, Any]) -> None:
        """Write the row of HPARAMS, once per fit."""
        if self._hyperparameters is None:
            return
        params = dict(self._settings)
        if self._pruning is not None:
            params |= self._pruning.policy.settings()
        else:
            params |= {"budget": "all", "schedule": "none"}
        # Only what the loggers have: TensorBoard reads the values there. It shows the first five: scores before losses,
        # and validation, which is logged last, before training.
        names = [name for name in reversed(list(logged)) if not name.endswith("_step")]
        scores = [name for name in names if "loss" not in name]
        losses = [name for name in names if "loss" in name]
        metrics = [*scores, "rank/spent", "rank/budget", "rank/open", *losses]
        self._hyperparameters.write(params, metrics)
        self._hyperparameters = None

    def _forget(self) -> None:
        if self._hyperparameters is not None:
            self._hyperparameters.release()
        self._found, self._pruning, self._pictures, self._hyperparameters = RankBudget({}), None, None, None

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": dict(self._ranks)} if self._ranks else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict.get("ranks", {}))


def _settings(module: LightningModule) -> dict[str, Any]:
    """The adapters' classes and arguments as they were before anything was cut out of them."""
    budget, before = RankBudget.of(module), whole(module)
    cut = [before[name]["arguments"] if name in before else budget[name].adapter.arguments() for name in budget.extents]
    found: dict[str, Any] = {"adapter": _all_of([extent.adapter for extent in budget.extents.values()])}
    for argument in dict.fromkeys(name for arguments in cut for name in arguments):
        found[f"adapter/{argument}"] = _all_of([arguments[argument] for arguments in cut if argument in arguments])
    return found


def _all_of(values: list[Any]) -> Any:
    """The value if it is one for all, else all of them as text."""
    unique = {str(value): value for value in values}
    return values[0] if len(unique) == 1 else ", ".join(unique)


def _short(amount: int) -> str:
    """412, 98304 -> 98.3k, 1327104 -> 1.33M."""
    for size, unit in ((1e6, "M"), (1e4, "k")):
        if amount >= size:
            return f"{amount / (1e6 if unit == 'M' else 1e3):.3g}{unit}"
    return str(amount)

"""What TensorBoard shows beyond scalars: charts, histograms, a picture of the ranks, and a row in its HPARAMS tab."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_peft.heat_map import Grid, HeatMap, information_heat_map, kl_heat_map, pixels
from lightning_peft.rank.budget import RankBudget

# Tags in a layout are patterns that match from the start; a logger's own prefix may come before ours.
_LAYOUT = {
    "rank": {
        "budget and spent": ["Multiline", [".*rank/budget$", ".*rank/spent$"]],
        "rank per layer": ["Multiline", [".*rank/(?!(?:open|spent|budget)$)"]],
    },
    "loss": {"losses": ["Multiline", [".*loss"]]},
}
_KINDS = 16  # more kinds of layer than that are not kinds: one histogram for all of them


def boards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The Trainer's TensorBoard loggers."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


class Pictures:
    """Heat maps of ranks and histograms of importance, for one fit.

    Args:
        budget: the adapters.
    """

    def __init__(self, budget: RankBudget) -> None:
        self._heat_map = HeatMap(budget.extents, max(extent.components for extent in budget.extents.values()))
        grid = Grid.of(budget.extents)
        self._kinds: dict[str, list[str]] = {"all": list(budget.extents)}
        if 1 < len(grid.columns) <= _KINDS:
            for name, (_, column) in grid.cells.items():
                self._kinds.setdefault(grid.columns[column], []).append(name)

    def draw(self, loggers: Iterable[TensorBoardLogger], ranks: Mapping[str, int], step: int) -> None:
        """Write the heat map as `rank/heatmap`."""
        picture = self._heat_map.draw(ranks)
        for logger in loggers:
            logger.experiment.add_image("rank/heatmap", picture, step, dataformats="HWC")

    def weigh(self, loggers: Iterable[TensorBoardLogger], scores: Mapping[str, Tensor], step: int) -> None:
        """Write the importance of components as `importance/<kind of layer>` and `importance/all`; one transfer."""
        names = list(scores)
        rows = torch.cat([scores[name] for name in names]).cpu().split([len(scores[name]) for name in names])
        by_layer = dict(zip(names, rows, strict=True))
        for kind, layers in self._kinds.items():
            here = [by_layer[name] for name in layers if name in by_layer]  # the others' adapters were cut away
            if not here:
                continue
            values = torch.cat(here)
            for logger in loggers:
                logger.experiment.add_histogram(f"importance/{kind}", values, step)


class KLPictures:
    """Heat maps of what each layer adds to a divergence.

    Args:
        names: the parameters that it is over.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._layers = {name: name.rpartition(".")[0] or name for name in names}

    def draw(self, loggers: Iterable[TensorBoardLogger], kl: Mapping[str, float], step: int) -> None:
        """Write the heat map as `kl/heatmap`."""
        by_layer: dict[str, float] = {}
        for name, value in kl.items():
            by_layer[self._layers[name]] = by_layer.get(self._layers[name], 0.0) + value
        picture = pixels(kl_heat_map(by_layer))
        for logger in loggers:
            logger.experiment.add_image("kl/heatmap", picture, step, dataformats="HWC")


def draw_information(
    loggers: Iterable[TensorBoardLogger], history: Mapping[int, Mapping[str, float]], top: float, step: int
) -> None:
    """Write information per layer over training as `mi/heatmap`."""
    picture = pixels(information_heat_map(history, top))
    for logger in loggers:
        logger.experiment.add_image("mi/heatmap", picture, step, dataformats="HWC")


def lay_out(loggers: Iterable[TensorBoardLogger]) -> None:
    """Write the layout of the CUSTOM SCALARS tab."""
    for logger in loggers:
        logger.experiment.add_custom_scalars(_LAYOUT)


class Hyperparameters:
    """The run's row in TensorBoard's HPARAMS tab: what the module and we were set to, and where the metrics ended.

    TensorBoard reads the first such record of a run and no later one. Lightning writes one before training starts: the
    module's hyper-parameters and a placeholder metric of -1, with which no other metric would ever be shown. So that
    record is held back until the metrics' names are known; their values are the scalars' latest, also in a running fit.

    Args:
        loggers: the loggers to hold back.
    """

    def __init__(self, loggers: Iterable[TensorBoardLogger]) -> None:
        # Whether a logger writes the placeholder can only be said to its constructor.
        self._held = [(logger, logger._default_hp_metric) for logger in loggers]
        for logger, _ in self._held:
            logger._default_hp_metric = False

    def write(self, params: Mapping[str, Any], metrics: Iterable[str]) -> None:
        """Write the row, once: the hyper-parameters that the logger was given meanwhile, then `params`."""
        from torch.utils.tensorboard.summary import hparams

        names = dict.fromkeys(metrics, 0.0)
        for logger, _ in self._held:
            given = vars(logger.hparams) if isinstance(logger.hparams, Namespace) else logger.hparams
            writer = logger.experiment._get_file_writer()
            for summary in hparams(_flat({**given, **params}), names):
                writer.add_summary(summary)
        self.release()

    def release(self) -> None:
        """Leave the loggers as they were; nothing is written after that."""
        for logger, default in self._held:
            logger._default_hp_metric = default
        self._held = []


def _flat(params: Mapping[Any, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """What the HPARAMS tab can hold: numbers and strings, nested mappings as `outer/inner`."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat

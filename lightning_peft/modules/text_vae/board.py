"""What TensorBoard shows of a variational autoencoder of sentences: texts, and a picture of the latent space."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_peft.heat_map import pixels
from lightning_peft.modules.sentence_data import SentenceBatch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_peft.modules.text_vae.metrics import LatentLanguageMetrics
    from lightning_peft.modules.text_vae.model import SentenceVAE

_SHOWN = 8  # sentences of each kind
_POINTS = 2000  # of the picture


class LatentBoard:
    """Samples, reconstructions and an interpolation as texts, and the validation set's posterior means as points."""

    def __init__(self) -> None:
        self._batch: SentenceBatch | None = None
        self._means: Tensor | None = None

    def show(self, batch: SentenceBatch) -> None:
        """Note sentences that are reconstructed."""
        self._batch = {name: value[:_SHOWN] for name, value in batch.items()}  # type: ignore[assignment,index]

    def place(self, metrics: LatentLanguageMetrics) -> None:
        """Note this process's posterior means."""
        means = metrics.means
        self._means = torch.cat(list(means))[:_POINTS].cpu() if len(means) else None

    def write(self, loggers: Iterable[TensorBoardLogger], vae: SentenceVAE, step: int, seed: int) -> None:
        """Write ``text/samples``, ``text/reconstructions``, ``text/interpolation`` and ``latent/means``."""
        texts = {"samples": "\n".join(f"- {_plain(text)}" for text in vae.texts(vae.sample(_SHOWN, seed=seed)))}
        batch = self._batch
        if batch is not None:
            means = vae.means(batch)
            pairs = zip(vae.texts(batch["tokens"]), vae.texts(vae.decode(means)), strict=True)
            texts["reconstructions"] = _table(("sentence", "from its posterior mean"), pairs)
            if len(means) > 1:
                line = vae.texts(vae.interpolate(means[0], means[-1]))
                texts["interpolation"] = "\n".join(f"{i}. {_plain(text)}" for i, text in enumerate(line, 1))
        picture = None if self._means is None or len(self._means) < 2 else pixels(latent_picture(self._means))
        for logger in loggers:
            for name, text in texts.items():
                logger.experiment.add_text(f"text/{name}", text, step)
            if picture is not None:
                logger.experiment.add_image("latent/means", picture, step, dataformats="HWC")
        self._batch = self._means = None


def latent_picture(means: Tensor, labels: Sequence[str] | None = None, title: str | None = None) -> Figure:
    """Posterior means along their two directions of largest variance; `figure.savefig("latent.png")` saves it.

    Both axes have one scale, which is drawn: a collapsed posterior is a point, of whatever shape it is under a lens.

    Args:
        means: (n, latent).
        labels: of each, for colours; ``None`` for one colour.
        title: what stands above the picture.

    Raises:
        ValueError: there are fewer than two, or labels are not as many.
    """
    if means.ndim != 2 or len(means) < 2:
        raise ValueError(f"a picture needs the means of at least 2 sentences, (n, latent). Got {tuple(means.shape)}.")
    if labels is not None and len(labels) != len(means):
        raise ValueError(f"there are {len(labels)} labels for {len(means)} means; give one for each.")
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    centred = (means - means.mean(0)).double()
    # Not pca_lowrank, which draws from the global generator.
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    points = (centred @ directions[:2].T).float()
    if points.shape[1] == 1:
        points = torch.cat([points, torch.zeros_like(points)], 1)
    shares = (values.square() / values.square().sum().clamp(min=1e-30))[:2].tolist()
    figure = Figure(figsize=(5, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    names = sorted(set(labels)) if labels is not None else [""]
    colours = colormaps["tab10"]
    for number, name in enumerate(names):
        chosen = points if labels is None else points[torch.tensor([label == name for label in labels])]
        axes.scatter(chosen[:, 0], chosen[:, 1], s=6, alpha=0.5, linewidths=0, color=colours(number % 10), label=name)
    reach = max(3.0, float(points.abs().max()))  # the prior's own three standard deviations, or more
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.set_xlabel(f"{shares[0]:.0%} of the variance")
    axes.set_ylabel(f"{[*shares, 0.0][1]:.0%}")
    if labels is not None:
        axes.legend(fontsize=7, markerscale=2, loc="upper right")
    axes.set_title(title or f"{len(means):,} posterior means", fontsize=9)
    return figure


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Without what Markdown would take for its own."""
    for mark in ("\\", "|", "<", "*", "_", "`", "#"):
        text = text.replace(mark, f"\\{mark}" if mark != "<" else "&lt;")
    return text

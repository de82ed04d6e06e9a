"""Ranks as a picture: a row per layer index, a column per kind of layer, coloured by rank, the number in the cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.figure import Figure

# In pixels. TensorBoard scales pictures to 350 without smoothing: narrower ones are padded, and a transformer's six or
# seven kinds of layer just fit, so that their letters stay whole.
_WIDTH = 350
_CELL = (36, 24)  # width and height; whole numbers, so that a cell can be pasted exactly
_LETTER = 6.6  # of a label
_BAR = 48  # the colour scale
_DPI = 100
_SIDE = 32  # cells per row when one is drawn of every rank


@dataclass(frozen=True)
class Grid:
    """Where each layer's cell stands.

    Attributes:
        rows: labels, top to bottom.
        columns: labels, left to right.
        cells: layer -> (row, column).
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, names: Iterable[str]) -> Grid:
        """Read rows and columns off the layers' names.

        A name is cut after a number: what comes before is the row, what comes after is the column. Where names hold
        several numbers the same one of all, the first or a later, is taken: the one that gives the smallest grid.
        Names without a number share the last row. What all rows begin with is left out of their labels.

        Example:
            >>> Grid.of(["net.layer.0.query", "net.layer.0.key", "net.layer.1.query", "net.pooler"]).rows
            ('0', '1', 'other')
        """
        names = list(names)
        paths = _stripped([name.split(".") for name in names])
        depths = max((sum(part.isdigit() for part in path) for path in paths), default=0)
        choices = [[_cut(path, depth) for path in paths] for depth in range(1, max(depths, 1) + 1)]
        cuts = min(choices, key=lambda cuts: len({row for row, _ in cuts}) * len({column for _, column in cuts}))
        rows = sorted(dict.fromkeys(row for row, _ in cuts), key=lambda row: not row)
        columns = list(dict.fromkeys(column for _, column in cuts))
        labels = [".".join(row) for row in _stripped([list(row) for row in rows if row])]
        if len(labels) < len(rows):
            labels.append("other" if labels else "")
        cells = {
            name: (rows.index(row), columns.index(column)) for name, (row, column) in zip(names, cuts, strict=True)
        }
        return cls(tuple(labels), tuple(".".join(column) or "layer" for column in columns), cells)


def _stripped(paths: list[list[str]]) -> list[list[str]]:
    """The paths without what all of them begin with; numbers and last parts stay."""
    shared = 0
    while len({tuple(path[: shared + 1]) for path in paths}) == 1 and all(
        len(path) > shared + 1 and not path[shared].isdigit() for path in paths
    ):
        shared += 1
    return [path[shared:] for path in paths]


def _cut(path: list[str], depth: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Row and column: what comes up to the number of that depth, and what comes after it."""
    numbers = [i + 1 for i, part in enumerate(path) if part.isdigit()]
    at = numbers[min(depth, len(numbers)) - 1] if numbers else 0
    return tuple(path[:at]), tuple(path[at:])


def rank_heat_map(ranks: Mapping[str, int], top: int, title: str | None = None) -> Figure:
    """Draw ranks as a heat map; `figure.savefig("ranks.png", dpi=200)` saves it.

    A row per layer index, a column per kind of layer; layers of any name and nets of any shape find a place, see
    :meth:`Grid.of`. The colour scale is fixed, so that pictures of one run can be compared. Needs matplotlib, which is
    imported here; pyplot's state is left alone.

    Args:
        ranks: layer -> open components.
        top: the rank of the darkest colour: the largest rank that a layer can have.
        title: what stands above the picture.

    Raises:
        ValueError: there is no layer, or top is below 1.

    Example:
        >>> from lightning_peft.heat_map import rank_heat_map
        >>> figure = rank_heat_map({"layer.0.query": 3, "layer.0.key": 8, "layer.1.query": 0}, top=8)
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['3', '8', '0']
    """
    if not ranks or top < 1:
        raise ValueError(
            f"a heat map needs at least one layer and a top rank of 1 or more. Got {len(ranks)}, top={top}."
        )
    return _draw(ranks, Grid.of(ranks), top, title)[0]


def kl_heat_map(kl: Mapping[str, float], title: str | None = None) -> Figure:
    """Draw a divergence per layer, in nats, as :func:`rank_heat_map` draws ranks; the darkest is the largest.

    Args:
        kl: layer -> nats.
        title: what stands above the picture.

    Raises:
        ValueError: there is no layer.

    Example:
        >>> from lightning_peft.heat_map import kl_heat_map
        >>> figure = kl_heat_map({"layer.0.query": 0.25, "layer.1.query": 14000.0})
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['0.25', '14k']
    """
    if not kl:
        raise ValueError("a heat map needs at least one layer. Got none.")
    return _draw(kl, Grid.of(kl), max(*kl.values(), 1e-9), title, _short)[0]


_COLUMNS = 16  # moments in one picture; of more, these many are shown


def information_heat_map(history: Mapping[int, Mapping[str, float]], top: float, title: str | None = None) -> Figure:
    """Draw information per layer over training, in nats: a row per layer, a column per step.

    Of more than 16 steps as many are shown, the first and the last among them.

    Args:
        history: step -> layer -> nats.
        top: nats of the darkest colour: the ceiling of the estimate.
        title: what stands above the picture.

    Raises:
        ValueError: there is nothing to draw, or top is not positive.

    Example:
        >>> from lightning_peft.heat_map import information_heat_map
        >>> figure = information_heat_map({0: {"query": 3.2}, 100: {"query": 2.84}}, top=3.5)
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['3.2', '2.8']
    """
    steps = sorted(history)
    names = list(dict.fromkeys(name for step in steps for name in history[step]))
    if not names or not top > 0:
        raise ValueError(f"a heat map needs values at one step or more, and a positive top. Got {len(steps)}, {top}.")
    if len(steps) > _COLUMNS:
        steps = [steps[round(i * (len(steps) - 1) / (_COLUMNS - 1))] for i in range(_COLUMNS)]
    cells, values = {}, {}
    for column, step in enumerate(steps):
        for name, value in history[step].items():
            cells[f"{column} {name}"] = names.index(name), column
            values[f"{column} {name}"] = value
    rows = tuple(".".join(path) for path in _stripped([name.split(".") for name in names]))
    return _draw(values, Grid(rows, tuple(map(str, steps)), cells), top, title, _short)[0]


def _short(value: float) -> str:
    """At most four letters: 0.25, 3.1, 412, 14k, 1.2M."""
    if value < 10:
        return f"{value:.2f}" if value < 1 else f"{value:.1f}"
    for unit in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.1f}{unit}" if unit and value < 9.95 else f"{value:.0f}{unit}"
        value /= 1000
    return f"{value:.0f}G"


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _draw(
    ranks: Mapping[str, float], grid: Grid, top: float, title: str | None, written: Callable[[float], str] = _whole
) -> tuple[Figure, tuple[int, int]]:
    """The figure, with an Agg canvas, and the pixel (y, x) where the first cell begins."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    values = np.full((len(grid.rows), len(grid.columns)), np.nan)
    for name, cell in grid.cells.items():
        values[cell] = ranks[name]
    width, height = values.shape[1] * _CELL[0], values.shape[0] * _CELL[1]
    left = 10 + int(max(map(len, grid.rows)) * _LETTER)
    columns = [_two_lines(column) for column in grid.columns]
    below = 14 + int(max(len(line) for column in columns for line in column.split("\n")) * _LETTER)
    above = 28 if title else 8
    size = (max(left + width + _BAR, _WIDTH, int(len(title or "") * 7.5)), above + height + below)

    def box(x: float, w: float) -> tuple[float, float, float, float]:
        return x / size[0], below / size[1], w / size[0], height / size[1]

    figure = Figure(figsize=(size[0] / _DPI, size[1] / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes(box(left, width))
    axes.set_facecolor("0.88")  # where there is no layer
    colours = colormaps["YlGnBu"]
    image = axes.imshow(values, cmap=colours, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = "white" if value > 0.5 * top else "black"
            # Strokes of two pixels: TensorBoard shrinks a tall picture by leaving out rows, and a thin 8 becomes a 0.
            axes.text(column, row, written(value), ha="center", va="center", fontsize=10, weight="bold", color=ink)
    axes.set_xticks(range(len(columns)), columns, rotation=90, linespacing=1.0)
    axes.set_yticks(range(len(grid.rows)), grid.rows)
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, cax=figure.add_axes(box(left + width + 10, 10)))
    bar.locator = MaxNLocator(nbins=max(1, height // 30), integer=written is _whole)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    if title:
        figure.text(0.5, 1 - 7 / size[1], title, ha="center", va="top", fontsize=9)
    return figure, (above, left)


def _two_lines(label: str) -> str:
    """A long label broken before a dot, where the longer line is shortest; two lines fit under a cell."""
    dots = [i for i, letter in enumerate(label) if letter == "." and i]
    if len(label) <= 10 or not dots:
        return label
    at = min(dots, key=lambda i: max(i, len(label) - i))
    return f"{label[:at]}\n{label[at:]}"


def pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    """The figure as (H, W, 3), of its own."""
    import numpy as np

    canvas: Any = figure.canvas  # an Agg canvas, and not annotated
    canvas.draw()
    return np.array(np.asarray(canvas.buffer_rgba())[..., :3])


class HeatMap:
    """The picture of :func:`rank_heat_map` many times over, for the same layers: to the pixel the same, and cheap.

    Everything that matplotlib has to say is drawn once, one cell of every rank included; a new picture is these cells
    pasted into their places.

    Args:
        names: the layers.
        top: the largest rank that a layer can have.
    """

    def __init__(self, names: Iterable[str], top: int) -> None:
        blank = dict.fromkeys(names, 0)
        self._grid = Grid.of(blank)
        figure, self._corner = _draw(blank, self._grid, top, None)
        self._canvas = pixels(figure)
        every = {str(rank): rank for rank in range(top + 1)}
        places = {name: divmod(rank, _SIDE) for name, rank in every.items()}
        wall = Grid(("",) * (top // _SIDE + 1), ("",) * min(top + 1, _SIDE), places)
        figure, corner = _draw(every, wall, top, None)
        drawn = pixels(figure)
        self._cells = [drawn[_place(corner, places[str(rank)])].copy() for rank in range(top + 1)]

    def draw(self, ranks: Mapping[str, int]) -> npt.NDArray[np.uint8]:
        """The picture of these ranks: (H, W, 3), red, green, blue."""
        picture = self._canvas.copy()
        for name, cell in self._grid.cells.items():
            picture[_place(self._corner, cell)] = self._cells[ranks[name]]
        return picture


def _place(corner: tuple[int, int], cell: tuple[int, int]) -> tuple[slice, slice]:
    """The pixels of a cell."""
    y, x = corner[0] + cell[0] * _CELL[1], corner[1] + cell[1] * _CELL[0]
    return slice(y, y + _CELL[1]), slice(x, x + _CELL[0])

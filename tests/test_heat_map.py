from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from lightning_peft.heat_map import Grid, HeatMap, kl_heat_map, rank_heat_map

KINDS = ("attention.self.query", "attention.self.key", "output.dense")
BERT = [f"model.bert.encoder.layer.{i}.{kind}" for i in range(3) for kind in KINDS]


def pixels(figure: Figure) -> np.ndarray:
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def written(figure: Figure) -> dict[tuple[int, int], str]:
    """The numbers in the cells: (row, column) -> text."""
    return {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in figure.axes[0].texts}


def test_rows_are_layer_indices_and_columns_are_kinds() -> None:
    grid = Grid.of(BERT)
    assert grid.rows == ("0", "1", "2")
    assert grid.columns == KINDS
    assert grid.cells["model.bert.encoder.layer.2.attention.self.key"] == (2, 1)


@pytest.mark.parametrize(
    ("names", "rows", "columns"),
    [
        pytest.param(
            [f"net.{stack}.layers.{i}.linear{j}" for stack in ("encoder", "decoder") for i in (0, 1) for j in (1, 2)],
            ("encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"),
            ("linear1", "linear2"),
            id="two stacks",
        ),
        pytest.param(
            [*BERT, "model.bert.pooler.dense"], ("0", "1", "2", "other"), (*KINDS, "pooler.dense"), id="pooler"
        ),
        pytest.param(["net.l1", "net.l2"], ("",), ("l1", "l2"), id="no number"),
        pytest.param(["head"], ("",), ("head",), id="one layer"),
        pytest.param(["net.0", "net.2"], ("0", "2"), ("layer",), id="sequential"),
        pytest.param(["net.layer.0.query", "net.layer.0.key"], ("0",), ("query", "key"), id="one block"),
        pytest.param(
            ["conv1", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0", "fc"],
            ("layer1.0", "layer1.1", "layer2.0", "other"),
            ("conv1", "downsample.0", "fc"),
            id="conv net",
        ),
        pytest.param(
            [f"block.{i}.layer.{k}" for i in range(4) for k in ("0.attention.q", "0.attention.k", "1.dense.wi")],
            ("0", "1", "2", "3"),
            ("layer.0.attention.q", "layer.0.attention.k", "layer.1.dense.wi"),
            id="a number within the kind",
        ),
        pytest.param(
            [
                f"stages.{s}.blocks.{b}.{k}"
                for s, n in ((0, 1), (1, 3))
                for b in range(n)
                for k in ("qkv", "fc1", "fc2")
            ],
            ("0.blocks.0", "1.blocks.0", "1.blocks.1", "1.blocks.2"),
            ("qkv", "fc1", "fc2"),
            id="blocks within stages",
        ),
    ],
)
def test_names_of_any_shape_find_a_place(names: list[str], rows: tuple[str, ...], columns: tuple[str, ...]) -> None:
    grid = Grid.of(names)
    assert (grid.rows, grid.columns) == (rows, columns)
    assert set(grid.cells) == set(names)
    assert len(set(grid.cells.values())) == len(names), "two layers share a cell"


def test_every_layer_has_its_number_and_the_scale_is_fixed() -> None:
    ranks = {name: i for i, name in enumerate(BERT)}
    figure = rank_heat_map(ranks, top=12)
    cells = Grid.of(BERT).cells
    assert written(figure) == {cells[name]: str(rank) for name, rank in ranks.items()}
    assert figure.axes[0].images[0].get_clim() == (0, 12)
    # The same rank has the same colour whatever the other ranks are.
    corner = pixels(rank_heat_map({**ranks, BERT[-1]: 12}, top=12))
    changed = np.argwhere((corner != pixels(figure)).any(-1))
    assert 0 < len(changed) <= 36 * 24, "only one cell may change"


def test_a_place_without_a_layer_is_left_empty() -> None:
    figure = rank_heat_map({"layer.0.query": 3, "layer.1.key": 4}, top=4)
    assert written(figure) == {(0, 0): "3", (1, 1): "4"}


def test_a_saved_picture_has_its_title_and_a_sane_size(tmp_path: Path) -> None:
    rank_heat_map(dict.fromkeys(BERT, 3), top=4, title="after 100 steps").savefig(tmp_path / "ranks.png", dpi=200)
    height, width, _ = imread(tmp_path / "ranks.png").shape
    assert width == 700
    assert 200 < height < 700


def test_pyplot_is_left_alone() -> None:
    before = sys.modules.get("matplotlib.pyplot")
    rank_heat_map({"layer.0.query": 1}, top=1)
    HeatMap(["layer.0.query"], 1).draw({"layer.0.query": 1})
    if before is None:
        assert "matplotlib.pyplot" not in sys.modules
    else:
        assert before.get_fignums() == []


@pytest.mark.parametrize("top", [1, 12, 70])
@pytest.mark.parametrize("names", [BERT, ["l1", "net.0.l2", "other.3.l2"]], ids=["bert", "odd"])
def test_the_fast_picture_is_the_figure_to_the_pixel(names: list[str], top: int) -> None:
    picture = HeatMap(names, top)
    for shift in (0, 1):
        ranks = {name: (7 * i + shift) % (top + 1) for i, name in enumerate(names)}
        assert np.array_equal(picture.draw(ranks), pixels(rank_heat_map(ranks, top)))


@pytest.mark.parametrize(("ranks", "top"), [({}, 4), ({"l": 0}, 0)])
def test_nothing_to_draw_is_an_error(ranks: dict[str, int], top: int) -> None:
    with pytest.raises(
        ValueError, match=f"at least one layer and a top rank of 1 or more. Got {len(ranks)}, top={top}"
    ):
        rank_heat_map(ranks, top)


def test_a_divergence_is_drawn_in_few_letters() -> None:
    kl = {"layer.0.query": 0.25, "layer.0.key": 9.96, "layer.1.query": 412.4, "layer.1.key": 1.26e6}
    figure = kl_heat_map(kl, title="KL")
    assert written(figure) == {(0, 0): "0.25", (0, 1): "10.0", (1, 0): "412", (1, 1): "1.3M"}
    assert figure.axes[0].images[0].get_clim() == (0, 1.26e6)
    assert pixels(kl_heat_map({"head": 0.0})).shape[2] == 3  # no divergence yet
    assert written(kl_heat_map({"a": 14_000.0})) == {(0, 0): "14k"}
    with pytest.raises(ValueError, match="needs at least one layer"):
        kl_heat_map({})

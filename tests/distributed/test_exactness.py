"""The table of docs/exactness.md: every strategy against one process on the same global batches, setting by setting.

The table of the page is written by

    python -m pytest tests/distributed/test_exactness.py --write-exactness

and an ordinary run checks that every cell is within its bound and that the page says the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
from hosts import GLOBAL_BATCH, Job, change, train_all
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_peft import presets
from lightning_peft.testing.nodes import NodesUnavailable, two_nodes
from lightning_peft.testing.processes import run_processes

PAGE = Path(__file__).parents[2] / "docs" / "exactness.md"
BEGIN, END = "<!-- written by tests/distributed/test_exactness.py -->", "<!-- end -->"

pytestmark = [
    pytest.mark.dist,
    # torch: its compiler looks at the gradient of whatever goes into a graph
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

# Half the distance between 1 and the next number: what one rounding may change, relatively.
UNIT = {"32-true": 2.0**-24, "bf16-mixed": 2.0**-8, "16-mixed": 2.0**-11}


def callbacks() -> list[L.Callback]:
    return presets.dynamic_dora(final_rank=4, interval=3, dropout=0.0)


COLUMNS: dict[str, Job] = {
    "fp32": Job(callbacks),
    "bf16-mixed": Job(callbacks, precision="bf16-mixed"),
    "16-mixed": Job(callbacks, precision="16-mixed"),
    "accumulation 4": Job(callbacks, trainer={"accumulate_grad_batches": 4, "max_epochs": 4}),
    "clipping": Job(callbacks, trainer={"gradient_clip_val": 0.05}),
    "activation checkpointing": Job(callbacks, host={"checkpointing": True}),
    # Graphs and their gradients without generated code, which needs a C++ compiler: tests/distributed/test_settings.py
    "torch.compile": Job(callbacks, host={"backend": "aot_eager"}),
}


@dataclass(frozen=True)
class Row:
    kind: str
    world: int
    nodes: int = 1


ROWS: dict[str, Row] = {
    "one process, once more": Row("single again", 1),
    "DDP × 2": Row("ddp", 2),
    "DDP × 4": Row("ddp", 4),
    "FSDP1 × 2": Row("fsdp1", 2),
    "FSDP2 × 2, everything sharded by the module": Row("fsdp2", 2),
    "FSDP2 × 2, `small_parameters` left whole": Row("fsdp2 around", 2),
    "DDP, 2 nodes × 2": Row("ddp", 4, 2),
    "FSDP2, 2 nodes × 2": Row("fsdp2 around", 4, 2),
}
CONTROL = "for scale: one process, half of every batch lost"

# Forwards of a layer, beside the fp32 column's: 48 batches for 24, and each computed twice.
FORWARDS = {"accumulation 4": 2, "activation checkpointing": 2}
REFUSED = {
    ("FSDP2 × 2, everything sharded by the module", "16-mixed"): (
        "refused: torch cannot unscale whole and sharded gradients together",
        "MisconfigurationException: 16-mixed scales gradients, and torch cannot unscale whole ones",
    )
}


def bound(column: str) -> float:
    """1e-6 in float32, some 16 roundings; else 4 roundings of the dtype that layers compute in."""
    precision = COLUMNS[column].precision
    return 1e-6 if precision == "32-true" else 4 * UNIT[precision]


@cache
def results(world: int, nodes: int) -> list[dict[Any, Any]]:
    """What every process of one group has trained; processes are started once for all cells that they can do."""
    kinds = {row.kind: None for row in ROWS.values() if (row.world, row.nodes) == (world, nodes)}
    if world == 1:
        kinds |= {"single": None, "half": None}
    runs = [(kind, column) for kind in kinds for column in COLUMNS]
    if nodes == 1:
        return run_processes(world, train_all, runs, COLUMNS, world, timeout=900)
    with two_nodes() as pair:
        return run_processes(world, train_all, runs, COLUMNS, world, nodes, timeout=900, nodes=pair)


def reference(column: str) -> dict[str, Any]:
    alone: dict[str, Any] = results(1, 1)[0]["single", column]
    assert isinstance(alone, dict), alone
    return alone


def outcome(name: str, column: str) -> list[Any]:
    """The cell's result on every process; skips the test where there can be no two nodes."""
    row = ROWS[name]
    try:
        return [result[row.kind, column] for result in results(row.world, row.nodes)]
    except NodesUnavailable as error:
        pytest.skip(str(error))


def cell(name: str, column: str) -> str:
    """What the page says."""
    first = outcome(name, column)[0]
    if (name, column) in REFUSED:
        return REFUSED[name, column][0]
    assert isinstance(first, dict), first
    return figures(first, reference(column))


def figures(result: dict[str, Any], alone: dict[str, Any]) -> str:
    masks = "equal" if result["events"] == alone["events"] else "differ"
    return f"{change(result, alone):.1e}, {masks}"


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", ROWS)
def test_result_is_that_of_one_process(name: str, column: str) -> None:
    every = outcome(name, column)
    if (name, column) in REFUSED:
        assert all(REFUSED[name, column][1] in result for result in every), every[0]
        return
    alone = reference(column)
    for result in every:
        assert isinstance(result, dict), result
        assert result["steps"] == alone["steps"]
        assert result["mask dtypes"] == {"torch.float32"}
        # Every layer twice where activations are computed again; graphs only where something is compiled.
        assert result["computed"] == reference("fp32")["computed"] * FORWARDS.get(column, 1)
        assert (result["graphs"] > 0) == (column == "torch.compile")
        assert result["events"] == alone["events"]  # after every event, not only at the end
        assert change(result, every[0]) == 0.0  # among themselves not one bit
    assert change(every[0], alone) <= (0.0 if ROWS[name].world == 1 else bound(column))


@pytest.mark.parametrize("column", COLUMNS)
def test_cells_could_fail(column: str) -> None:
    """The settings do something, components are closed in several events, and a lost half of the data is seen."""
    alone = reference(column)
    assert len(alone["events"]) >= 3
    assert sum(map(sum, alone["masks"].values())) == 8
    assert change(results(1, 1)[0]["half", column], alone) > 10 * bound(column)
    if column in ("bf16-mixed", "16-mixed", "accumulation 4", "clipping"):
        assert change(alone, reference("fp32")) > 0


def test_page_shows_this_table(request: pytest.FixtureRequest) -> None:
    page = PAGE.read_text(encoding="utf-8")
    head, body, foot = re.split(f"{re.escape(BEGIN)}\n|{re.escape(END)}\n", page)
    if request.config.getoption("--write-exactness"):
        cells = {name: [cell(name, column) for column in COLUMNS] for name in ROWS}
        cells[CONTROL] = [figures(results(1, 1)[0]["half", column], reference(column)) for column in COLUMNS]
        bounds = {"largest Δ allowed": [f"{bound(column):.1e}" for column in COLUMNS]}
        lines = [["Δ, masks", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
        lines += [[name, *row] for name, row in (cells | bounds).items()]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
        PAGE.write_text(f"{head}{BEGIN}\n{body}{END}\n{foot}", encoding="utf-8")
    table = [[part.strip() for part in line.strip("|").split("|")] for line in body.splitlines()]
    assert table[0] == ["Δ, masks", *COLUMNS]
    rows = {line[0]: dict(zip(COLUMNS, line[1:], strict=True)) for line in table[2:]}
    assert list(rows) == [*ROWS, CONTROL, "largest Δ allowed"]
    for column in COLUMNS:
        assert float(rows["largest Δ allowed"][column]) == pytest.approx(bound(column), rel=0.05)
        assert float(rows[CONTROL][column].split(",")[0]) > 10 * bound(column)
        for name in ROWS:
            said = rows[name][column]
            if (name, column) in REFUSED:
                assert said == REFUSED[name, column][0]
                continue
            difference, masks = said.split(", ")
            assert float(difference) <= bound(column), (name, column)
            assert masks == "equal", (name, column)


def test_lightning_says_of_16_mixed_what_the_page_says() -> None:
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU. Using `precision='bf16-mixed'`"):
        L.Trainer(accelerator="cpu", devices=1, precision="16-mixed", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="`ModelParallelStrategy` does not support"):
        L.Trainer(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(), precision="16-mixed", logger=False)


def test_batches_are_shared_evenly() -> None:
    assert all(GLOBAL_BATCH % row.world == 0 for row in ROWS.values())

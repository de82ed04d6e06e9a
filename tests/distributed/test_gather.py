"""What a term gathers from all processes: rows in order, exact gradients, and a refusal where sizes differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_peft import Everyone
from lightning_peft.distributed import Processes
from lightning_peft.testing.processes import run_processes

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")]


def loss(rows: Tensor) -> Tensor:
    """One that no sum over rows gives: every row meets every other one."""
    return (rows @ rows.T).logsumexp(1).square().sum()


def everything() -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def look(world: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    everyone = Processes()
    mine = everyone.mine(everything()).clone().requires_grad_()
    rows = everyone.gather(mine)
    (gradient,) = torch.autograd.grad(loss(rows), mine)
    found: dict[str, Any] = {"rows": rows.tolist(), "gradient": gradient.tolist(), "rank": everyone.rank}
    for name, tensor in (("labels", torch.tensor([everyone.rank])), ("bools", torch.tensor([everyone.rank == 1]))):
        found[name] = everyone.gather(tensor).tolist()
    found["transposed"] = everyone.gather(torch.arange(4).view(2, 2).T + everyone.rank).tolist()
    for name, tensor in (
        ("unequal rows", torch.zeros(2 + everyone.rank, 3)),
        ("unequal widths", torch.zeros(2, 3 + everyone.rank)),
        ("unequal dimensions", torch.zeros(2, *[3] * everyone.rank)),
    ):
        try:
            everyone.gather(tensor)
        except RuntimeError as error:
            found[name] = str(error)
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.full((2,), float(everyone.rank))
    everyone.average_gradients([parameter])
    found["average"] = parameter.grad.tolist()
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_processes(2, look, 2, timeout=60)


def test_every_process_has_all_rows_in_order(results: list[dict[str, Any]]) -> None:
    for each in results:
        assert each["rows"] == everything().tolist()
        assert each["labels"] == [0, 1]
        assert each["bools"] == [False, True]
        assert each["transposed"] == [[0, 2], [1, 3], [1, 3], [2, 4]]
        assert each["average"] == [0.5, 0.5]


def test_the_gradient_is_summed_over_processes(results: list[dict[str, Any]]) -> None:
    """So that the mean over processes, as DDP takes it, is that of one process."""
    whole = everything().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(whole), whole)
    found = torch.tensor([row for each in results for row in each["gradient"]], dtype=torch.float64)
    torch.testing.assert_close(found, 2 * wanted, rtol=1e-12, atol=1e-12)


def test_unequal_sizes_are_told_on_all_processes(results: list[dict[str, Any]]) -> None:
    for each in results:
        assert (
            "unequal sizes: (2, 3) on process 0, (3, 3) on process 1. Give every process as many"
            in each["unequal rows"]
        )
        assert "(2, 3) on process 0, (2, 4) on process 1" in each["unequal widths"]
        assert "(2,) on process 0, (2, 3) on process 1" in each["unequal dimensions"]


def test_alone_everyone_is_this_process() -> None:
    rows, everyone = everything(), Everyone()
    assert everyone.gather(rows) is rows
    assert torch.equal(everyone.mine(rows), rows)
    assert (everyone.rank, everyone.world) == (0, 1)

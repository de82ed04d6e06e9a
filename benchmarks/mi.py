"""Estimators of mutual information where the information is known: correlated Gaussians, and a known posterior.

    python benchmarks/mi.py plan [--parts analytic,learnt,club,aggregate] [--quick] [--results FILE]
    python benchmarks/mi.py table [--out docs/mutual-information-estimators.md] [--quick] [--results FILE]

x and y have d entries that are correlated in pairs by rho: I = -(d/2) ln(1 - rho^2), and CLUB with the exact q is
d rho^2 / (1 - rho^2). "analytic" is the best critic, the log ratio itself; "learnt" a `ConcatCritic` trained on fresh
batches, "club" a linear-Gaussian q. "aggregate" is the information of a posterior N(mu, I) with mu ~ N(0, s^2 I), which
is (k/2) ln(1 + s^2), by the mixture of the batch's posteriors.

Every run is one line of `results/mi.jsonl`; runs that are there are skipped. One thread, 10 minutes of it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # this checkout is what is measured

import runs  # noqa: E402
import torch  # noqa: E402
from mi_table import table  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from lightning_peft.functional.club import club  # noqa: E402
from lightning_peft.functional.gaussian import gaussian_log_densities, gaussian_log_density  # noqa: E402
from lightning_peft.functional.latent import aggregate_mutual_information  # noqa: E402
from lightning_peft.functional.mutual_information import (  # noqa: E402
    dv,
    dv_surrogate,
    estimate,
    info_nce,
    jsd,
    next_log_moving,
    nwj,
    smile,
)
from lightning_peft.regularizers.critics import ConcatCritic  # noqa: E402

RESULTS = runs.RESULTS / "mi.jsonl"
PARTS = ("analytic", "learnt", "club", "aggregate")
ANALYTIC = ((1, 0.5, 128), (4, 0.5, 128), (4, 0.8, 128), (10, 0.7, 128), (20, 0.8, 128), (20, 0.8, 512))
LEARNT = (
    *((1, 0.8, estimator, 300) for estimator in ("dv", "info_nce", "smile")),
    *((1, 0.8, estimator, 1500) for estimator in ("dv", "nwj", "info_nce", "smile")),
    *((4, 0.8, estimator, 1500) for estimator in ("dv", "nwj")),
    *((4, 0.8, estimator, 700) for estimator in ("info_nce", "smile")),
    *((10, 0.7, estimator, 1500) for estimator in ("dv", "dv_own", "nwj", "info_nce", "smile")),
    *((20, 0.8, estimator, 1500) for estimator in ("dv", "dv_own", "nwj", "info_nce", "smile")),
)
CLUB = ((1, 0.8), (4, 0.5), (4, 0.8))
AGGREGATE = ((1, 3.0), (2, 3.0), (8, 1.0), (32, 1.0))
FULL: dict[str, dict[str, Any]] = {
    "analytic": {"batches": 200},
    "learnt": {"hidden": 128, "batch_size": 64, "lr": 1e-3, "clip": 1.0, "tau": 5.0, "batches": 20, "n": 512},
    "club": {"batch_size": 64, "lr": 1e-2, "steps": 2000, "batches": 200},
    "aggregate": {"batches": 60},
}
QUICK: dict[str, dict[str, Any]] = {
    "analytic": {"batches": 4},
    "learnt": {**FULL["learnt"], "hidden": 16, "lr": 3e-3, "batches": 2, "n": 128},
    "club": {**FULL["club"], "steps": 50, "batches": 4},
    "aggregate": {"batches": 3},
}


@dataclass(frozen=True)
class Run:
    """What is run; two runs with equal fields are the same run."""

    part: str
    d: int
    strength: float
    """rho, or s^2 of "aggregate"."""
    n: int
    estimator: str = "all"
    steps: int = 0


def planned(part: str, quick: bool = False) -> list[Run]:
    """The runs of a part."""
    if part == "analytic":
        return [Run(part, *case) for case in (ANALYTIC[:3] if quick else ANALYTIC)]
    if part == "learnt":
        n = (QUICK if quick else FULL)[part]["n"]
        cases = [(1, 0.8, estimator, 60) for estimator in ("dv", "nwj", "info_nce", "smile")] if quick else LEARNT
        return [Run(part, d, rho, n, estimator, steps) for d, rho, estimator, steps in cases]
    if part == "club":
        return [Run(part, *case, FULL[part]["batch_size"]) for case in (CLUB[:1] if quick else CLUB)]
    return [Run(part, *case, n) for case in AGGREGATE for n in ((32,) if quick else (32, 256, 1024))]


def settings(run: Run, quick: bool = False) -> dict[str, Any]:
    """All that a run depends on beside its own fields."""
    return {"seed": 0, **(QUICK if quick else FULL)[run.part]}


def pairs(n: int, d: int, rho: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x and y, both (n, d)."""
    x, noise = torch.randn(2, n, d, generator=generator)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def analytic(run: Run, of: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Values of batches, by estimator, with the best critic; CLUB with the exact q."""
    values: dict[str, list[Tensor]] = {}
    log_variance = torch.full((run.n, run.d), math.log(1 - run.strength**2))
    for _ in range(of["batches"]):
        x, y = pairs(run.n, run.d, run.strength, generator)
        densities = gaussian_log_densities(run.strength * x, log_variance, y)
        scores = densities - gaussian_log_density(0.0, 0.0, y)
        found = {"dv": dv(scores), "nwj": nwj(scores), "info_nce": info_nce(scores), "club": club(densities)}
        found |= {f"smile_{tau}": smile(scores, tau) for tau in (1, 5)}
        for name, value in found.items():
            values.setdefault(name, []).append(value)
    return {name: torch.stack(of_batches) for name, of_batches in values.items()}


def learnt(run: Run, of: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Values of fresh batches with a critic that was trained on others, each with what its estimator trains it with.

    "dv_own" is DV on its own gradient, the biased one.
    """
    torch.manual_seed(of["seed"])
    critic = ConcatCritic(run.d, run.d, hidden=of["hidden"])
    optimizer = torch.optim.Adam(critic.parameters(), of["lr"])
    log_moving = torch.tensor(-math.inf)
    for _ in range(run.steps):
        scores = critic(*pairs(of["batch_size"], run.d, run.strength, generator))
        if run.estimator == "dv":
            log_moving = next_log_moving(log_moving, scores)
            objective = dv_surrogate(scores, log_moving)
        else:
            objective = {"dv_own": dv, "nwj": nwj, "info_nce": info_nce, "smile": jsd}[run.estimator](scores)
        optimizer.zero_grad()
        (-objective).backward()
        nn.utils.clip_grad_norm_(critic.parameters(), of["clip"])
        optimizer.step()
    with torch.no_grad():
        batches = [critic(*pairs(of["n"], run.d, run.strength, generator)) for _ in range(of["batches"])]
        name = run.estimator.removesuffix("_own")
        return {run.estimator: torch.stack([estimate(name, scores, of["tau"]) for scores in batches])}


def learnt_club(run: Run, of: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """CLUB of fresh batches with q(y | x) = N(A x + b, diag exp(v)), fitted by its likelihood on others."""
    torch.manual_seed(of["seed"])
    mean, log_variance = nn.Linear(run.d, run.d), nn.Parameter(torch.zeros(run.d))
    optimizer = torch.optim.Adam([*mean.parameters(), log_variance], of["lr"])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=of["steps"])
    for _ in range(of["steps"]):
        x, y = pairs(of["batch_size"], run.d, run.strength, generator)
        optimizer.zero_grad()
        (-gaussian_log_density(mean(x), log_variance, y).mean()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        batches = [pairs(run.n, run.d, run.strength, generator) for _ in range(of["batches"])]
        spread = log_variance.expand(run.n, -1)
        return {"club": torch.stack([club(gaussian_log_densities(mean(x), spread, y)) for x, y in batches])}


def aggregate(run: Run, of: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Values of batches, with ln q(z | x) of the draw and with its expectation."""
    values: dict[str, list[Tensor]] = {"drawn": [], "closed": []}
    for _ in range(of["batches"]):
        mean = math.sqrt(run.strength) * torch.randn(run.n, run.d, generator=generator)
        z = mean + torch.randn(run.n, run.d, generator=generator)
        for name, of_batches in values.items():
            closed = name == "closed"
            of_batches.append(aggregate_mutual_information(mean, torch.zeros_like(mean), z, closed_entropy=closed))
    return {name: torch.stack(of_batches) for name, of_batches in values.items()}


MEASURED: dict[str, Callable[[Run, dict[str, Any], torch.Generator], dict[str, Tensor]]] = {
    "analytic": analytic,
    "learnt": learnt,
    "club": learnt_club,
    "aggregate": aggregate,
}


def execute(run: Run, quick: bool = False) -> dict[str, Any]:
    """Measure: mean and standard deviation of the values of batches, by estimator."""
    used, of = time.process_time(), settings(run, quick)
    values = MEASURED[run.part](run, of, torch.Generator().manual_seed(of["seed"]))
    return {
        **asdict(run),
        "settings": of,
        "versions": runs.versions("torch"),
        "values": {
            name: {"mean": round(float(batch.mean()), 5), "std": round(float(batch.std()), 5)}
            for name, batch in values.items()
        },
        "cpu_seconds": round(time.process_time() - used, 1),
    }


def load(path: Path = RESULTS, quick: bool = False) -> list[dict[str, Any]]:
    """Finished runs whose settings are today's."""
    return [row for row in runs.read(path) if row["settings"] == settings(_run_of(row), quick)]


def _run_of(row: dict[str, Any]) -> Run:
    return Run(**{field: row[field] for field in Run.__dataclass_fields__})


def run_all(parts: list[str], path: Path = RESULTS, quick: bool = False) -> None:
    """Run and keep what is not there yet."""
    for run in [run for part in parts for run in planned(part, quick)]:
        if any(runs.same(run, row) for row in load(path, quick)):
            print(f"there already: {run}", flush=True)
            continue
        result = runs.announced(run, lambda run=run: execute(run, quick), path)
        print(f"  {result['values']} {result['cpu_seconds']} s", flush=True)


def page(path: Path = RESULTS, quick: bool = False) -> str:
    """The Markdown page of the finished runs."""
    return table(load(path, quick), {part: [asdict(run) for run in planned(part, quick)] for part in PARTS})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    missing = commands.add_parser("plan", help="all runs that are missing")
    missing.add_argument("--parts", default=",".join(PARTS), help="comma-separated; default: all")
    show = commands.add_parser("table", help="Markdown page of the finished runs")
    show.add_argument("--out", type=Path, help="file to write; default: standard output")
    for command in (missing, show):
        command.add_argument("--quick", action="store_true", help="few steps and batches: seconds, to see that it runs")
        command.add_argument("--results", type=Path, help="file of results; needed with --quick")
    args = parser.parse_args()
    if args.quick and args.results is None:
        parser.error("--quick needs --results FILE: what it measures does not belong in the file of the full runs.")
    path = args.results or RESULTS
    if args.command == "plan":
        runs.one_quiet_thread()
        run_all(args.parts.split(","), path, args.quick)
    elif args.out:
        args.out.write_text(page(path, args.quick), encoding="utf-8")
    else:
        print(page(path, args.quick))


if __name__ == "__main__":
    main()

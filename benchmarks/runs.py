"""Runs of a benchmark: each is one line of a results file, and where memory is measured a process of its own.

What is in the file is not run again, and what one plan has in hand no other starts: a plan can be stopped, continued,
and shared by processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
import transformers

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RESULTS = Path(__file__).resolve().parent / "results"
R = TypeVar("R", bound="DataclassInstance")
Precision = Literal["bf16-mixed", "32-true"]


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none if there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def append(result: Mapping[str, Any], path: Path) -> None:
    """Add one line, whole, whoever else writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(result, ensure_ascii=False) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(line)
        os.fsync(file.fileno())


def same(run: DataclassInstance, row: Mapping[str, Any]) -> bool:
    """Whether a line is this run's: all fields of the run are equal."""
    return all(row.get(key) == value for key, value in asdict(run).items())


def carry_out(stages: Iterable[Sequence[R]], do: Callable[[R], object], finished: Callable[[R], bool]) -> None:
    """Do all runs that are missing.

    Several processes may carry out the same plan: what one has in hand, another leaves for the end of the stage, and
    waits for it there. A stage is asked for when all runs before it are there, and may depend on what they found.
    """
    for stage in stages:
        for wait in (False, True):
            for run in stage:
                with claimed(run, wait) as ours:
                    if ours and not finished(run):
                        do(run)


def alone(script: str, arguments: Callable[[R], Iterable[object]]) -> Callable[[R], object]:
    """Does a run as `script run ARGUMENTS` in a process of its own, whose peak of memory is the run's."""
    return lambda run: subprocess.run([sys.executable, script, "run", *map(str, arguments(run))], check=True)


@contextmanager
def claimed(run: DataclassInstance, wait: bool = True) -> Iterator[bool]:
    """Whether this run is ours and no other plan's; to wait makes it so. A claim ends with the process that has it."""
    name = hashlib.sha256(repr(run).encode()).hexdigest()[:16]
    with (Path(tempfile.gettempdir()) / f"lightning-peft-{name}.claim").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def announced(run: DataclassInstance, execute: Callable[[], dict[str, Any]], path: Path) -> dict[str, Any]:
    """Do a run between a line that says when it began and the line that it is kept in."""
    print(f"{time.strftime('%H:%M:%S')} {run}", flush=True)
    result = execute()
    append(result, path)
    return result


def beside(pairs: Iterable[tuple[float, float]]) -> dict[str, float]:
    """What pairs of measurements, without something and with it, say: ratios are taken within a pair."""
    both = list(pairs)
    ratios = sorted(with_it / without for without, with_it in both)
    return {
        "seconds": round(median(without for without, _ in both), 4),
        "ratio": round(median(ratios), 4),
        "least": round(ratios[0], 4),
        "most": round(ratios[-1], 4),
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of installed packages, by name."""
    return {package: version(package) for package in packages}


def precision(begun: Iterable[Mapping[str, Any]] = ()) -> Precision:
    """That of the runs which the new one is compared with, whatever machine they were on.

    The first run decides: bf16 autocast only where the processor computes in it; emulated it is slower than float32.
    """
    for row in begun:
        if "precision" in row:
            return cast(Precision, row["precision"])
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


def one_quiet_thread() -> None:
    """One thread for this process, and no chatter of the libraries between its lines."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

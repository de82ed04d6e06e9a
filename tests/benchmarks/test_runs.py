"""Plans of benchmarks: several processes share one, and each run is done once."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = f"""
import json, os, sys, time
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results.jsonl"

if sys.argv[1] == "run":
    number, begun = int(sys.argv[2]), time.time()
    if os.environ.get("FAILS") == sys.argv[2]:
        sys.exit(3)
    while os.environ.get("SHARED") and number == 0 and not RESULTS.exists():
        time.sleep(0.05)  # until the other process has done another run
    with RESULTS.open("a") as file:
        file.write(json.dumps(dict(number=number, begun=begun, ended=time.time())) + "\\n")
    sys.exit()

sys.path.insert(0, {str(BENCHMARKS)!r})
import runs

@dataclass(frozen=True)
class Run:
    number: int
    place: str = str(RESULTS)

def stages():
    yield [Run(number) for number in range(4)]
    yield [Run(10 * len(runs.read(RESULTS)))]

def finished(run):
    return any(row["number"] == run.number for row in runs.read(RESULTS))

runs.carry_out(stages(), runs.alone(__file__, lambda run: [run.number]), finished)
"""


def results(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def test_two_processes_share_a_plan(tmp_path: Path) -> None:
    script = tmp_path / "bench.py"
    script.write_text(SCRIPT, encoding="utf-8")
    shared = {**os.environ, "SHARED": "1"}
    both = [subprocess.Popen([sys.executable, str(script), "plan"], env=shared) for _ in range(2)]
    try:
        # Run 0 ends when another one is there: whoever does not have it must have gone on to the next.
        assert [one.wait(120) for one in both] == [0, 0]
    finally:
        for one in both:
            one.kill()
    found = sorted(results(tmp_path), key=lambda row: row["begun"])
    assert sorted(row["number"] for row in found) == [0, 1, 2, 3, 40]
    # The second stage is begun when all of the first is there, whoever did it.
    assert found[-1]["number"] == 40
    assert found[-1]["begun"] > max(row["ended"] for row in found[:-1])


def test_a_plan_that_failed_is_continued(tmp_path: Path) -> None:
    script = tmp_path / "bench.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command, fails = [sys.executable, str(script), "plan"], {**os.environ, "FAILS": "1"}
    first = subprocess.run(command, env=fails, capture_output=True, text=True)
    assert first.returncode == 1
    assert "returned non-zero exit status 3" in first.stderr
    assert [row["number"] for row in results(tmp_path)] == [0]
    subprocess.run(command, check=True)
    assert [row["number"] for row in results(tmp_path)] == [0, 1, 2, 3, 40]


def test_a_table_goes_on_in_the_precision_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    runs = importlib.import_module("runs")
    assert runs.precision([{"job": "speed"}]) == runs.precision()  # the processor's own
    for begun in ("32-true", "bf16-mixed"):  # one of them is another
        assert runs.precision([{"job": "speed"}, {"job": "r8", "precision": begun}]) == begun

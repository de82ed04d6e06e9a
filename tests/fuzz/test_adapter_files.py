"""No mutation of an adapter file crashes, hangs, takes memory, changes the model, or loads what was not saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_peft

SEED = 7


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited and measured as Linux has it")
def test_mutated_adapter_files_are_refused_or_load_as_what_they_are(tmp_path: Path) -> None:
    script = Path(__file__).with_name("adapter_files.py")
    package = str(Path(lightning_peft.__file__).parents[1])
    # In a process of its own: its memory is limited, and a crash of torch would end it.
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(SEED), "1"],
        env=os.environ | {"PYTHONPATH": package, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    outcomes = json.loads(run.stdout.splitlines()[-1])
    assert sum(sum(counts.values()) for counts in outcomes.values()) >= 10_000
    for kind, counts in outcomes.items():
        assert counts.get("refused", 0) > 0, f"{kind}: {counts}"
        if kind not in ("contents under a new digest", "sparse adapters"):
            assert counts.keys() <= {"refused", "equal"}
    # A digest is no signature: where it is computed again, another weight loads as what it is.
    assert outcomes["contents under a new digest"]["legal"] > 0
    assert outcomes["sparse adapters"]["legal"] > 0

"""The Markdown page that `certificate.py` makes of its results file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_PRIORS = {"none": "no data", "split": "half of the examples"}
_HEAD = (
    "| data | prior from | adapter | lambda: adapters, head | seed | certificate | KL, nats | empirical Gibbs risk "
    "| bound set | test error: drawn networks | test error: mean | ECE, mean | parameters in Q | tried "
    "| certificate, s |"
)
_INTRODUCTION = """# Certificates of a language model on real data

MiniLM-L6 with adapters on Reuters {data}, the head in Q. A certificate holds with the probability given, for
networks drawn from Q, on texts like those of the bound set; see [certificates](certificates.md). The test columns are
what it is checked against: the test set was looked at once, afterwards. Time is of all passes, on one core.
Made by `python benchmarks/certificate.py table`.
"""


def table(rows: Sequence[Mapping[str, Any]], times: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page, one row a run, those of one data set and prior together.

    Args:
        rows: finished runs.
        times: of `certificate_time.py`; the last one of each counts.
    """
    data = " and ".join(sorted({row["data"].upper() for row in rows}, key=lambda name: int(name[1:])))
    lines = [_INTRODUCTION.format(data=data), _HEAD, "|" + "---|" * (_HEAD.count("|") - 1)]
    for row in sorted(rows, key=lambda row: (row["data"] != "r8", row["prior"], row["certificate"])):
        cells = (
            row["data"].upper(),
            _PRIORS[row["prior"]],
            f"{row['method']} ({row['targets']})",
            f"{row['prior_sigma']:g}, {row['head_sigma']:g}",
            str(row["seed"]),
            f"**{row['certificate']:.4f}** at {row['confidence']:.3f}",
            f"{row['kl']:,.3g}",
            f"{row['gibbs']:.4f}",
            f"{row['examples']:,}",
            f"{row['test_gibbs']:.4f}",
            f"{row['test_mean']:.4f}",
            f"{row['test_ece']:.4f}",
            f"{row['parameters']:,}",
            str(row["tried"]),
            f"{row['seconds']['certificate']:.0f} ({row['passes']} passes)",
        )
        lines.append(f"| {' | '.join(cells)} |")
    odd = [row for row in rows if row["certificate"] < row["test_gibbs"]]
    said = "No certificate is below the test error of drawn networks."
    lines += ["", f"{len(odd)} certificates are below the test error of drawn networks." if odd else said]
    lines += _pace(times)
    lines.append("")
    return "\n".join(lines)


def _pace(times: Sequence[Mapping[str, Any]]) -> list[str]:
    """What ten passes over R8's training set take, where 5 minutes on one core were asked for."""
    last = {(row["precision"], row["what"]): row for row in times}
    lines = []
    for precision in dict.fromkeys(row["precision"] for row in times):
        alone, whole = (last[precision, what] for what in ("encoder alone", "certificate"))
        lines.append(
            f"- {precision}: {whole['seconds'] / 60:.1f} minutes, {whole['seconds'] / alone['seconds']:.2f} times the "
            f"{alone['seconds'] / 60:.1f} minutes of the encoder alone."
        )
    if not lines:
        return []
    least = min(row["seconds"] for row in times if row["what"] == "certificate") / 60
    alone = min(row["seconds"] for row in times if row["what"] == "encoder alone") / 60
    verdict = "met" if least < 5 else "fell short"
    if least >= 5 and alone >= 5:
        verdict += ", as the encoder alone does for so many texts"
    return [
        "",
        "Ten passes over R8's whole training set, 5,485 texts, CPU time of one core, from batches of all lengths "
        f"(`benchmarks/certificate_time.py`); less than 5 minutes was asked for: {verdict}.",
        "",
        *lines,
    ]

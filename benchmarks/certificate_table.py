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


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page, one row a run, those of one data set and prior together."""
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
    # Seconds of one pass over as many texts as the whole training set, where that was the bound set.
    whole = [
        row["seconds"]["certificate"] / row["passes"] for row in rows if (row["data"], row["prior"]) == ("r8", "none")
    ]
    if whole:
        ten = 10 * min(whole) / 60
        lines += [
            "",
            f"Ten passes over R8's whole training set were to take less than 5 minutes on one core, and take {ten:.0f} "
            "minutes at the pace of the fastest run in this table"
            + (", which shared its machine: fell short." if ten >= 5 else "."),
        ]
    lines.append("")
    return "\n".join(lines)

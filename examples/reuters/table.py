"""The demo's results as a table."""

from __future__ import annotations

from collections.abc import Sequence

from job import Result


def table(results: Sequence[Result]) -> str:
    """A row per method; step times are processor time, compared with LoRA's, or else with the first row's."""
    reference = next((r for r in results if r.title.startswith("LoRA")), results[0])
    header = ("method", "accuracy", "macro-F1", "errors", "trainable", "adapter bytes", "ms/step")
    rows = [(*header, f"÷ {reference.title}")]
    rows += [
        (
            result.title,
            f"{result.accuracy:.4f}",
            f"{result.macro_f1:.4f}",
            f"{result.errors}",
            f"{result.trainable:,}",
            f"{result.adapter_bytes:,}",
            f"{1e3 * result.step_seconds:.0f}",
            f"{result.step_seconds / reference.step_seconds:.2f}",
        )
        for result in results
    ]
    if len(results) == 1:
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

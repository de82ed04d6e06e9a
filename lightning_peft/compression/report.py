"""What a compression did: figures before and after, and the rank of every layer."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_peft.atomic import write_whole
from lightning_peft.compression.figures import Size
from lightning_peft.heat_map import rank_heat_map

Quality = Mapping[str, float]


@dataclass(frozen=True)
class Report:
    """What a compression did; print it.

    Attributes:
        model: what was compressed.
        method: how.
        asked: ratio that was asked for.
        ratio: ratio that was reached: weights of the compressed layers after, by those before.
        ranks: components of every compressed layer.
        full: what they were at full rank.
        dense: layers that stay one dense layer, because two thin ones of their rank would not be smaller.
        before, after: sizes.
        quality_before: of the model that was given; empty where it was not measured, because its head is new.
        quality_compressed: right after compression.
        quality_after: of the model that was saved; after fine-tuning, if there was any.
        quality_on: what it was measured on.
        milliseconds: of one forward pass, before and after, median, one thread.
        timed_on: what that pass had to do.
        steps: optimizer steps of the method, and of fine-tuning after it.
        seconds: wall time of every stage.
        peak_bytes: most memory that the process held.
        versions: of the packages that did it.
    """

    model: str
    method: str
    asked: float
    ratio: float
    ranks: Mapping[str, int]
    full: Mapping[str, int]
    dense: tuple[str, ...]
    before: Size
    after: Size
    quality_before: Quality
    quality_compressed: Quality
    quality_after: Quality
    quality_on: str
    milliseconds: tuple[float, float]
    timed_on: str
    steps: Mapping[str, int]
    seconds: Mapping[str, float]
    peak_bytes: int
    versions: Mapping[str, str]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table: what, before, after, and the second by the first."""
        rows = [
            _row("parameters", self.before.parameters, self.after.parameters),
            _row("in compressed layers", self.before.linear_parameters, self.after.linear_parameters),
            _row("bytes", self.before.bytes, self.after.bytes),
        ]
        first, second = self.milliseconds
        rows.append((f"ms per {self.timed_on}", f"{first:.1f}", f"{second:.1f}", f"{second / first:.2f}"))
        for name in self.quality_after:
            known = self.quality_before.get(name)
            after = self.quality_after[name]
            shown = "not measured" if known is None else f"{known:.4f}"
            rows.append((name, shown, f"{after:.4f}", f"{after / known:.3f}" if known else ""))
            if self.steps.get("fine-tuning"):
                rows.append((f"{name} before fine-tuning", "", f"{self.quality_compressed[name]:.4f}", ""))
        return rows

    def summary(self) -> str:
        """One sentence."""
        thin = len(self.ranks) - len(self.dense)
        return (
            f"{self.method}: {len(self.ranks)} layers at ratio {self.ratio:.3f} (asked: {self.asked:g}), "
            f"{thin} of them thin, {len(self.dense)} dense; ranks {min(self.ranks.values())} to "
            f"{max(self.ranks.values())}."
        )

    def __str__(self) -> str:
        rows = [("", "before", "after", "ratio"), *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [f"{self.model}, {self.summary()}", ""]
        for row in rows:
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            lines.append("  ".join(cells).rstrip())
        took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        lines += ["", f"Quality on {self.quality_on}. {took}; at most {self.peak_bytes / 1e9:.2f} GB."]
        return "\n".join(lines)

    def markdown(self, picture: str) -> str:
        """The report as a page, with a picture of ranks beside it."""
        lines = [
            f"# {self.model}, compressed",
            "",
            self.summary(),
            "",
            "| | before | after | ratio |",
            "|---|---|---|---|",
        ]
        lines += [f"| {' | '.join(row)} |" for row in self.rows()]
        lines += ["", f"Quality on {self.quality_on}.", "", f"![Rank per layer]({picture})", ""]
        lines += ["| layer | rank | of | |", "|---|---|---|---|"]
        for name, rank in self.ranks.items():
            lines.append(f"| {name} | {rank} | {self.full[name]} | {'dense' if name in self.dense else ''} |")
        lines += ["", "| stage | seconds | steps |", "|---|---|---|"]
        lines += [f"| {name} | {seconds:.1f} | {self.steps.get(name, '')} |" for name, seconds in self.seconds.items()]
        lines += ["", ", ".join(f"{package} {version}" for package, version in self.versions.items()) + ".", ""]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Write report.json, report.md and ranks.png."""
        content = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        write_whole(folder / "report.json", content.encode())
        picture = io.BytesIO()
        title = f"Rank per layer, {self.method}, ratio {self.ratio:.2f}"
        rank_heat_map(self.ranks, top=max(self.full.values()), title=title).savefig(picture, dpi=200, format="png")
        write_whole(folder / "ranks.png", picture.getvalue())
        write_whole(folder / "report.md", self.markdown("ranks.png").encode())


def _row(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, f"{before:,}", f"{after:,}", f"{after / before:.3f}"
